//! Encodes a conversation span by span.

use std::ops::Range;

use anyhow::Result;

use crate::prompt::message::Message;
use crate::tokenizer::answer_tokens::{AnswerTokens, EncodedConversation};
use crate::tokenizer::chat_template::{RenderedSpan, answer_start};
use crate::tokenizer::{TextPosition, Tokenizer, added};

/// Number of bytes after a cut that are encoded to check the cut: more than the length of any usual token. The text
/// before a cut is encoded as a whole: how a run of equal characters splits into tokens depends on the length of the
/// run, which may begin far before the cut.
const BYTES_AFTER_CUT: usize = 64;

/// Encodes the spans of a conversation in order.
pub(crate) struct ConversationEncoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens and answers so far.
    pub output: EncodedConversation,
    /// Text that is not encoded yet.
    pending: String,
    /// The kind of token before the pending text. Not an offset.
    position: TextPosition,
    /// True directly after an answer: the first stop token of the next template text ends the answer's turn.
    is_turn_open: bool,
}

impl<'a> ConversationEncoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            output: EncodedConversation::default(),
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
            self.output.ids.extend(ids);
            self.pending.clear();
        }
        Ok(())
    }

    /// Encodes spans completely: no text stays pending.
    pub(crate) fn encode_spans(&mut self, spans: &[RenderedSpan]) -> Result<()> {
        self.push_spans(spans)?;
        self.flush()
    }

    /// Appends spans. The text after their last control token stays pending.
    fn push_spans(&mut self, spans: &[RenderedSpan]) -> Result<()> {
        for span in spans {
            match span {
                RenderedSpan::Template(text) => self.push_template(text)?,
                RenderedSpan::Content { text, .. } => self.pending.push_str(text),
            }
        }
        Ok(())
    }

    /// Appends the spans before an answer, without the template text `lead` at their end, which the caller appends:
    /// with the answer, or as template text if the answer is not encoded separately.
    pub(crate) fn push_before_answer(&mut self, spans: &[RenderedSpan], lead: &str) -> Result<()> {
        match spans.split_last() {
            Some((RenderedSpan::Template(last), others)) => {
                let without_lead = last.strip_suffix(lead).unwrap_or(last);
                let last = RenderedSpan::Template(without_lead.to_owned());
                self.push_spans(&[others, &[last]].concat())
            }
            _ => self.push_spans(spans),
        }
    }

    /// Returns true if `answer`, the next text, can be encoded separately from the pending text before it and from the
    /// text `following` it: no token extends over either boundary.
    pub(crate) fn can_cut_around(&self, answer: &str, following: &str) -> Result<bool> {
        let controls = control_tokens(self.tokenizer, following);
        let next_control = controls
            .first()
            .map_or(following.len(), |(range, _)| range.start);
        let following = first_bytes(&following[..next_control]);
        Ok(
            self.can_cut(&self.pending, self.position, first_bytes(answer))?
                && self.can_cut(answer, TextPosition::AfterText, following)?,
        )
    }

    /// Returns true if encoding two texts separately gives the same tokens as encoding them together.
    fn can_cut(&self, left: &str, position: TextPosition, right: &str) -> Result<bool> {
        if left.is_empty() || right.is_empty() {
            return Ok(true);
        }
        let mut separate = self.tokenizer.encode_at(left, position)?;
        let next = self.tokenizer.position_after(&separate);
        separate.extend(self.tokenizer.encode_at(right, next)?);
        let together = format!("{left}{right}");
        Ok(separate == self.tokenizer.encode_at(&together, position)?)
    }

    /// Appends text of the template, with its control tokens. If the text directly follows an answer, its first stop
    /// token ends the answer's turn.
    pub(crate) fn push_template(&mut self, text: &str) -> Result<()> {
        let controls = control_tokens(self.tokenizer, text);
        let is_stop = |id: u32| self.tokenizer.stop_ids().contains(&id);
        let end_of_turn = controls.iter().position(|&(_, id)| is_stop(id));
        let mut start = 0;
        for (number, (range, id)) in controls.into_iter().enumerate() {
            self.pending.push_str(&text[start..range.start]);
            self.flush()?;
            self.output.ids.push(id);
            self.position = TextPosition::AfterControl;
            start = range.end;
            if self.is_turn_open && Some(number) == end_of_turn {
                self.is_turn_open = false;
                if let Some(answer) = self.output.answers.last_mut() {
                    answer.supervised.end = self.output.ids.len();
                }
            }
        }
        self.pending.push_str(&text[start..]);
        self.is_turn_open = false;
        Ok(())
    }

    /// Encodes the answer in message number `message`: `lead`, the template text between generation prompt and content,
    /// and the `spans` of the content.
    pub(crate) fn encode_answer(
        &mut self,
        lead: &str,
        message: usize,
        spans: &[RenderedSpan],
        messages: &[Message],
    ) -> Result<()> {
        self.is_turn_open = false;
        let start = self.output.ids.len();
        self.encode_spans(&[&[RenderedSpan::Template(lead.to_owned())], spans].concat())?;
        let tokens = start..self.output.ids.len();
        let content = &messages[message].content;
        let written: String = [lead]
            .into_iter()
            .chain(spans.iter().map(RenderedSpan::text))
            .collect();
        let last = spans.last().map_or("", RenderedSpan::text);
        let text = written_range(content, &written, last);
        let start_of_last = |bytes| suffix_start(self.tokenizer, &self.output.ids, &tokens, bytes);
        self.output.answers.push(AnswerTokens {
            message,
            content: start_of_last(text.len())..tokens.end,
            after_thinking: match answer_start(content) {
                0 => tokens.start,
                reply => start_of_last(text.end - text.end.min(reply.max(text.start))),
            },
            text,
            token_ends: None,
            supervised: tokens.clone(),
            tokens,
            follows_generation_prompt: true,
            thinking: None,
        });
        self.is_turn_open = true;
        Ok(())
    }
}

/// Returns the first [`BYTES_AFTER_CUT`] bytes of a text, or fewer so that no character is cut.
fn first_bytes(text: &str) -> &str {
    let ends = (0..=BYTES_AFTER_CUT.min(text.len())).rev();
    ends.into_iter()
        .find_map(|end| text.get(..end))
        .unwrap_or_default()
}

/// Returns the start of the shortest suffix of `tokens`, a range of `ids`, that spells at least `bytes` bytes. A token
/// without a known spelling counts as one byte.
fn suffix_start(tokenizer: &Tokenizer, ids: &[u32], tokens: &Range<usize>, bytes: usize) -> usize {
    let mut remaining = bytes;
    let mut start = tokens.end;
    while remaining > 0 && start > tokens.start {
        start -= 1;
        let length = tokenizer
            .spelling(ids[start])
            .map_or(1, |bytes| bytes.len());
        remaining = remaining.saturating_sub(length);
    }
    start
}

/// Returns the byte range of the part of `content` that was written. `written` is the encoded text of the answer, and
/// `last` its last span. The range ends with the last occurrence of `last` and extends to the left as far as `content`
/// equals the end of `written`.
fn written_range(content: &str, written: &str, last: &str) -> Range<usize> {
    let end = content.rfind(last).unwrap_or(0) + last.len();
    let common = content[..end].chars().rev().zip(written.chars().rev());
    let common = common
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8());
    let start = end - common.sum::<usize>();
    start..end
}

impl Tokenizer {
    /// Returns true if the text contains the name of a control token.
    pub fn contains_control(&self, text: &str) -> bool {
        !control_tokens(self, text).is_empty()
    }
}

/// Finds the control tokens in template text. Returns their byte ranges, which include white space that some tokens
/// strip, and their ids.
fn control_tokens(tokenizer: &Tokenizer, text: &str) -> Vec<(Range<usize>, u32)> {
    let tokens = added::find(&tokenizer.control, tokenizer.text.get_normalizer(), text);
    tokens
        .into_iter()
        .filter(|(_, id)| tokenizer.is_special(*id))
        .collect()
}
