//! Encodes a conversation span by span.

use std::ops::Range;

use anyhow::Result;

use crate::prompt::message::Message;
use crate::tokenizer::answer_tokens::{AnswerTokens, EncodedConversation};
use crate::tokenizer::chat_template::{RenderedSpan, answer_start};
use crate::tokenizer::{TextPosition, Tokenizer, added};

/// Number of bytes after a cut that can affect the tokens at the cut: more than a token has. All bytes before a cut can
/// affect them, because runs of one character are split by their length.
const BYTES_AFTER_CUT: usize = 64;

/// A conversation being encoded.
pub(crate) struct ConversationEncoder<'a> {
    tokenizer: &'a Tokenizer,
    pub done: EncodedConversation,
    /// Text that is not encoded yet.
    pending: String,
    /// Position of the pending text.
    position: TextPosition,
    /// True if the last answer's end of turn has not been written yet.
    is_turn_open: bool,
}

impl<'a> ConversationEncoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            done: EncodedConversation::default(),
            pending: String::new(),
            position: TextPosition::First,
            is_turn_open: false,
        }
    }

    /// Encodes the pending text.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if !self.pending.is_empty() {
            let ids = self.tokenizer.encode_at(&self.pending, self.position)?;
            self.position = self.tokenizer.position_after(&ids);
            self.done.ids.extend(ids);
            self.pending.clear();
        }
        Ok(())
    }

    /// Writes spans and encodes the pending text.
    pub(crate) fn prompt(&mut self, spans: &[RenderedSpan]) -> Result<()> {
        self.spans(spans)?;
        self.flush()
    }

    fn spans(&mut self, spans: &[RenderedSpan]) -> Result<()> {
        for span in spans {
            match span {
                RenderedSpan::Template(text) => self.template(text)?,
                RenderedSpan::Content { text, .. } => self.pending.push_str(text),
            }
        }
        Ok(())
    }

    /// Writes the spans before an answer, without the text `lead` at their end, which belongs to the answer.
    pub(crate) fn before_answer(&mut self, spans: &[RenderedSpan], lead: &str) -> Result<()> {
        match spans.split_last() {
            Some((RenderedSpan::Template(last), others)) => {
                let kept = last.strip_suffix(lead).unwrap_or(last);
                self.spans(&[others, &[RenderedSpan::Template(kept.to_owned())]].concat())
            }
            _ => self.spans(spans),
        }
    }

    /// Returns true if `answer`, which comes next, can be encoded separately from the pending text and from the text
    /// `following` it: no token extends over either boundary.
    pub(crate) fn may_cut_around(&self, (answer, following): (&str, &str)) -> Result<bool> {
        let controls = control_tokens(self.tokenizer, following);
        let next_control = controls
            .first()
            .map_or(following.len(), |found| found.0.start);
        let following = first_bytes(&following[..next_control]);
        Ok(
            self.may_cut(&self.pending, self.position, first_bytes(answer))?
                && self.may_cut(answer, TextPosition::AfterText, following)?,
        )
    }

    /// Returns true if encoding two texts separately gives the tokens of both together.
    fn may_cut(&self, left: &str, position: TextPosition, right: &str) -> Result<bool> {
        if left.is_empty() || right.is_empty() {
            return Ok(true);
        }
        let mut separate = self.tokenizer.encode_at(left, position)?;
        let next = self.tokenizer.position_after(&separate);
        separate.extend(self.tokenizer.encode_at(right, next)?);
        let together = format!("{left}{right}");
        Ok(separate == self.tokenizer.encode_at(&together, position)?)
    }

    /// Writes text of the template, with its control tokens. A stop token ends the turn of the last answer.
    pub(crate) fn template(&mut self, text: &str) -> Result<()> {
        let controls = control_tokens(self.tokenizer, text);
        let is_stop = |id: u32| self.tokenizer.stop_ids().contains(&id);
        let end_of_turn = controls.iter().position(|&(_, id)| is_stop(id));
        let mut at = 0;
        for (number, (range, id)) in controls.into_iter().enumerate() {
            self.pending.push_str(&text[at..range.start]);
            self.flush()?;
            self.done.ids.push(id);
            self.position = TextPosition::AfterControl;
            at = range.end;
            if self.is_turn_open && Some(number) == end_of_turn {
                self.is_turn_open = false;
                if let Some(answer) = self.done.answers.last_mut() {
                    answer.supervised.end = self.done.ids.len();
                }
            }
        }
        self.pending.push_str(&text[at..]);
        self.is_turn_open = false;
        Ok(())
    }

    /// Writes an answer: `lead`, the template text between prompt and content, and the spans of the content.
    pub(crate) fn answer(
        &mut self,
        lead: &str,
        message: usize,
        spans: &[RenderedSpan],
        messages: &[Message],
    ) -> Result<()> {
        self.is_turn_open = false;
        let start = self.done.ids.len();
        self.prompt(&[&[RenderedSpan::Template(lead.to_owned())], spans].concat())?;
        let tokens = start..self.done.ids.len();
        let content = &messages[message].content;
        let written: String = [lead]
            .into_iter()
            .chain(spans.iter().map(RenderedSpan::text))
            .collect();
        let last = spans.last().map_or("", RenderedSpan::text);
        let text = kept_range(content, &written, last);
        let first_of = |bytes| first_of_last(self.tokenizer, &self.done.ids, &tokens, bytes);
        self.done.answers.push(AnswerTokens {
            message,
            content: first_of(text.len())..tokens.end,
            after_thinking: match answer_start(content) {
                0 => tokens.start,
                from => first_of(text.end - text.end.min(from.max(text.start))),
            },
            text,
            supervised: tokens.clone(),
            tokens,
            follows_generation_prompt: true,
            thinking: None,
        });
        self.is_turn_open = true;
        Ok(())
    }
}

/// Beginning of a text that can affect the tokens at its start.
fn first_bytes(text: &str) -> &str {
    let ends = (0..=BYTES_AFTER_CUT.min(text.len())).rev();
    ends.into_iter()
        .find_map(|end| text.get(..end))
        .unwrap_or_default()
}

/// First token of the shortest suffix of `tokens` with at least this number of bytes.
fn first_of_last(tokenizer: &Tokenizer, ids: &[u32], tokens: &Range<usize>, bytes: usize) -> usize {
    let mut remaining = bytes;
    let mut at = tokens.end;
    while remaining > 0 && at > tokens.start {
        at -= 1;
        let length = tokenizer.spelling(ids[at]).map_or(1, |bytes| bytes.len());
        remaining = remaining.saturating_sub(length);
    }
    at
}

/// Byte range of the longest part of `content` that is a suffix of `written`, whose last span is `last`.
fn kept_range(content: &str, written: &str, last: &str) -> Range<usize> {
    let end = content.rfind(last).unwrap_or(0) + last.len();
    let same = content[..end].chars().rev().zip(written.chars().rev());
    let same = same.take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8());
    let start = end - same.sum::<usize>();
    start..end
}

impl Tokenizer {
    /// Returns true if the text contains the name of a control token.
    pub fn contains_control(&self, text: &str) -> bool {
        contains_control(self, text)
    }
}

/// Returns true if the text contains control tokens when it is part of a template.
pub(crate) fn contains_control(tokenizer: &Tokenizer, text: &str) -> bool {
    !control_tokens(tokenizer, text).is_empty()
}

/// Finds the control tokens in template text: ids and byte ranges, which include white space that some tokens strip.
fn control_tokens(tokenizer: &Tokenizer, text: &str) -> Vec<(Range<usize>, u32)> {
    let found = added::find(&tokenizer.control, tokenizer.text.get_normalizer(), text);
    let controls = found.into_iter();
    controls
        .filter(|(_, id)| tokenizer.is_special(*id))
        .collect()
}
