//! Encodes a conversation, text by text.

use std::ops::Range;

use anyhow::Result;

use crate::prompt::message::Message;
use crate::tokenizer::answer_tokens::{AnswerTokens, EncodedConversation};
use crate::tokenizer::chat_template::{RenderedSpan, answer_start};
use crate::tokenizer::{TextPosition, Tokenizer, added};

/// Bytes behind a cut that matter to it: more than a token has. Before it, all do: runs of one character are tokens
/// by their length.
const NEAR: usize = 64;

/// A conversation being encoded.
pub(crate) struct ConversationEncoder<'a> {
    tokenizer: &'a Tokenizer,
    pub done: EncodedConversation,
    /// Text not yet encoded, and where it stands.
    run: String,
    place: TextPosition,
    /// Has the last answer's end of turn still to come?
    open: bool,
}

impl<'a> ConversationEncoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            done: EncodedConversation::default(),
            run: String::new(),
            place: TextPosition::First,
            open: false,
        }
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        if !self.run.is_empty() {
            let ids = self.tokenizer.encode_at(&self.run, self.place)?;
            self.place = self.tokenizer.place_after(&ids);
            self.done.ids.extend(ids);
            self.run.clear();
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
                RenderedSpan::Content { text, .. } => self.run.push_str(text),
            }
        }
        Ok(())
    }

    /// Writes the spans before an answer without their end `lead`, which belongs to the answer.
    pub(crate) fn before_answer(&mut self, spans: &[RenderedSpan], lead: &str) -> Result<()> {
        match spans.split_last() {
            Some((RenderedSpan::Template(last), others)) => {
                let kept = last.strip_suffix(lead).unwrap_or(last);
                self.spans(&[others, &[RenderedSpan::Template(kept.to_owned())]].concat())
            }
            _ => self.spans(spans),
        }
    }

    /// May `answer`, which comes next, be encoded apart from the pending text, and from what follows it? Not
    /// where the tokenizer makes one token of what is on both sides.
    pub(crate) fn may_cut_around(&self, (answer, following): (&str, &str)) -> Result<bool> {
        let controls = control_tokens(self.tokenizer, following);
        let next_control = controls
            .first()
            .map_or(following.len(), |found| found.0.start);
        let following = first_bytes(&following[..next_control]);
        Ok(self.may_cut(&self.run, self.place, first_bytes(answer))?
            && self.may_cut(answer, TextPosition::AfterText, following)?)
    }

    /// Are the tokens of two texts those of both together?
    fn may_cut(&self, left: &str, place: TextPosition, right: &str) -> Result<bool> {
        if left.is_empty() || right.is_empty() {
            return Ok(true);
        }
        let mut apart = self.tokenizer.encode_at(left, place)?;
        let next = self.tokenizer.place_after(&apart);
        apart.extend(self.tokenizer.encode_at(right, next)?);
        let together = format!("{left}{right}");
        Ok(apart == self.tokenizer.encode_at(&together, place)?)
    }

    pub(crate) fn template(&mut self, text: &str) -> Result<()> {
        let controls = control_tokens(self.tokenizer, text);
        let is_stop = |id: u32| self.tokenizer.stop_ids().contains(&id);
        let end_of_turn = controls.iter().position(|&(_, id)| is_stop(id));
        let mut at = 0;
        for (number, (range, id)) in controls.into_iter().enumerate() {
            self.run.push_str(&text[at..range.start]);
            self.flush()?;
            self.done.ids.push(id);
            self.place = TextPosition::AfterControl;
            at = range.end;
            if self.open && Some(number) == end_of_turn {
                self.open = false;
                if let Some(answer) = self.done.answers.last_mut() {
                    answer.supervised.end = self.done.ids.len();
                }
            }
        }
        self.run.push_str(&text[at..]);
        self.open = false;
        Ok(())
    }

    /// Writes an answer: `lead`, the text of the template between prompt and content, and the content.
    pub(crate) fn answer(
        &mut self,
        lead: &str,
        message: usize,
        spans: &[RenderedSpan],
        messages: &[Message],
    ) -> Result<()> {
        self.open = false;
        let start = self.done.ids.len();
        self.prompt(&[&[RenderedSpan::Template(lead.to_owned())], spans].concat())?;
        let tokens = start..self.done.ids.len();
        let content = &messages[message].content;
        let written: String = [lead]
            .into_iter()
            .chain(spans.iter().map(RenderedSpan::text))
            .collect();
        let last = spans.last().map_or("", RenderedSpan::text);
        let text = kept(content, &written, last);
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
        self.open = true;
        Ok(())
    }
}

/// As much of a text as the tokens at its start depend on.
fn first_bytes(text: &str) -> &str {
    let ends = (0..=NEAR.min(text.len())).rev();
    ends.into_iter()
        .find_map(|end| text.get(..end))
        .unwrap_or_default()
}

/// First token of the shortest suffix of `tokens` with at least this number of bytes.
fn first_of_last(tokenizer: &Tokenizer, ids: &[u32], tokens: &Range<usize>, bytes: usize) -> usize {
    let mut left = bytes;
    let mut at = tokens.end;
    while left > 0 && at > tokens.start {
        at -= 1;
        let length = tokenizer.spelling(ids[at]).map_or(1, |bytes| bytes.len());
        left = left.saturating_sub(length);
    }
    at
}

/// Byte range of the longest part of `content` that `written` ends with; `last` is its last span.
fn kept(content: &str, written: &str, last: &str) -> Range<usize> {
    let end = content.rfind(last).unwrap_or(0) + last.len();
    let same = content[..end].chars().rev().zip(written.chars().rev());
    let same = same.take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8());
    let start = end - same.sum::<usize>();
    start..end
}

impl Tokenizer {
    /// Is the name of a control token somewhere in this text?
    pub fn holds_control(&self, text: &str) -> bool {
        holds_control(self, text)
    }
}

/// Would this text, as part of a template, make control tokens?
pub(crate) fn holds_control(tokenizer: &Tokenizer, text: &str) -> bool {
    !control_tokens(tokenizer, text).is_empty()
}

/// The control tokens in template text, with the white space that some of them swallow.
fn control_tokens(tokenizer: &Tokenizer, text: &str) -> Vec<(Range<usize>, u32)> {
    let found = added::find(&tokenizer.control, tokenizer.text.get_normalizer(), text);
    let controls = found.into_iter();
    controls
        .filter(|(_, id)| tokenizer.is_special(*id))
        .collect()
}
