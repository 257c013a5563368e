//! Encodes conversations and finds the tokens of their answers.
//!
//! Text between two control tokens is encoded as a whole, template text and contents together. The ids are then those of
//! the whole rendered conversation, which pre-training and all servers use. The exception is an answer: it is encoded
//! separately, from the end of the generation prompt to the end of its content, as a model generates it.

use std::ops::Range;

use anyhow::{Result, bail};
use jiff::civil::DateTime;

use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::answer_tokens::{
    AnswerTokens, EncodedConversation, PromptDifference, ThinkingChange,
};
use crate::tokenizer::chat_template::{
    ChatTemplate, RenderedSpan, THINKING, TemplateClock, thinking_spans,
};
use crate::tokenizer::writer::ConversationEncoder;

impl Tokenizer {
    /// Tokens with which the chat template ends a turn: text that it writes after an answer, if any, and the first
    /// control token that is a stop token, or else the first control token.
    pub(super) fn find_end_of_turn(&mut self) -> Option<Box<[u32]>> {
        let template = self.template.clone()?;
        // The end of turn does not depend on the date.
        self.set_date(TemplateClock::Fixed(DateTime::constant(
            2000, 1, 1, 0, 0, 0, 0,
        )));
        let messages = [Message::new("user", "a"), Message::new("assistant", "b")];
        let conversation = self.last_answer(&messages);
        self.template = Some(template);
        let conversation = conversation.ok()?;
        let after = &conversation.ids[conversation.answers.last()?.tokens.end..];
        let is_control = |id: &u32| self.is_special(*id);
        let is_end = |id: &u32| is_control(id) && self.stop_ids.contains(id);
        let end = after.iter().position(is_end);
        let end = end.or_else(|| after.iter().position(is_control))?;
        Some(after[..=end].into())
    }

    /// Ids of a conversation with its generation prompt.
    ///
    /// # Errors
    /// If there is no chat template, or it rejects these messages.
    pub fn encode_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        encode_prompt(self, &self.template()?.at(None), messages)
    }

    /// Ids of a conversation that ends inside its last message, an answer that the model will continue; and the range of
    /// the ids that spell this answer.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`], and if the last message is not an answer.
    pub fn encode_continued(&self, messages: &[Message]) -> Result<(Vec<u32>, Range<usize>)> {
        let EncodedConversation {
            mut ids, answers, ..
        } = self.last_answer(messages)?;
        let last = answers.last();
        let Some(answer) = last.filter(|answer| answer.message + 1 == messages.len()) else {
            bail!("the last message is not the assistant's");
        };
        ids.truncate(answer.content.end);
        Ok((ids, answer.content.clone()))
    }

    /// Ids of a conversation, and the supervised ranges: each answer of the assistant with the token that ends it.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_conversation(
        &self,
        messages: &[Message],
    ) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let conversation = self.conversation(messages)?;
        let ranges = conversation.answers.into_iter().map(|a| a.supervised);
        Ok((conversation.ids, ranges.collect()))
    }

    /// Encodes a conversation with the tokens of each answer.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn conversation(&self, messages: &[Message]) -> Result<EncodedConversation> {
        self.conversation_at(messages, true, None)
    }

    /// Encodes a conversation with the tokens of the last answer only.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn last_answer(&self, messages: &[Message]) -> Result<EncodedConversation> {
        self.conversation_at(messages, false, None)
    }

    /// Encodes a conversation as [`Self::conversation`] or [`Self::last_answer`] do, with the date of its record.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn conversation_at(
        &self,
        messages: &[Message],
        every_answer: bool,
        date: Option<DateTime>,
    ) -> Result<EncodedConversation> {
        let template = self.template()?.at(date);
        encode(self, &template, messages, every_answer)
    }
}

/// Encodes the generation prompt of these messages.
pub(crate) fn encode_prompt(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<Vec<u32>> {
    let spans = template.render(messages, true)?;
    let mut encoder = ConversationEncoder::new(tokenizer);
    encoder.prompt(&spans)?;
    Ok(encoder.done.ids)
}

/// Encodes a conversation with its answers. Without `every_answer`, earlier answers are part of the prompt of the last
/// one and have no ranges.
pub(crate) fn encode(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    every_answer: bool,
) -> Result<EncodedConversation> {
    let spans = template.render(messages, false)?;
    let answers = rendered_answers(&spans, messages);
    let count = messages.iter().filter(|m| m.role == "assistant").count();
    if answers.len() != count {
        bail!(
            "the chat template prints {} of {count} answers",
            answers.len()
        );
    }
    if !answers.is_sorted_by_key(|answer| answer.message) {
        bail!("the chat template prints the answers in another order");
    }
    let text: String = spans.iter().map(RenderedSpan::text).collect();
    let mut encoder = ConversationEncoder::new(tokenizer);
    let mut at = 0;
    for (number, answer) in answers.iter().enumerate() {
        let is_last = number + 1 == count;
        if !is_last && !every_answer {
            let skipped = AnswerTokens::separate(answer.message);
            encoder.done.answers.push(skipped);
            continue;
        }
        // Some templates reject conversations that end before an answer.
        let prompt = template.render_text(&messages[..answer.message], true).ok();
        let end = match &prompt {
            Some(prompt) => answer.end_of_prompt(&text, prompt),
            None => Some(answer.start),
        };
        let change = prompt
            .as_ref()
            .and_then(|prompt| answer.thinking_change(&spans, messages, prompt));
        let is_restored = change == Some(ThinkingChange::Restored);
        if let (true, true, Some(prompt)) = (end.is_none() || is_restored, is_last, &prompt) {
            let before = &text[..answer.start];
            let mut done = after_prompt(tokenizer, template, messages, &spans, answer)?;
            let earlier = answers[..number].iter();
            let earlier = earlier.map(|answer| AnswerTokens::separate(answer.message));
            done.answers.splice(0..0, earlier);
            done.difference = end.is_none().then(|| PromptDifference {
                generation: difference(prompt, before, answer.earliest),
                conversation: difference(before, prompt, answer.earliest),
            });
            return Ok(done);
        }
        let follows = match (end, &prompt) {
            _ if is_restored => false,
            (Some(end), Some(prompt)) if !is_last => {
                // Some templates render an answer differently inside a conversation.
                let alone = template.render_text(&messages[..=answer.message], false);
                let alone = alone
                    .as_ref()
                    .ok()
                    .and_then(|text| text.strip_prefix(prompt.as_str()));
                alone.is_some_and(|alone| text[end..].starts_with(alone.trim_end()))
            }
            (end, _) => end.is_some(),
        };
        let lead = &text[end.unwrap_or(answer.start)..answer.start];
        encoder.before_answer(&spans[at..answer.spans.start], lead)?;
        let answer_and_rest = &text[answer.start - lead.len()..];
        let length = lead.len()
            + spans[answer.spans.clone()]
                .iter()
                .map(|s| s.text().len())
                .sum::<usize>();
        let is_blank = messages[answer.message].content.trim().is_empty();
        let is_trained_here = is_last
            || follows && !is_blank && encoder.may_cut_around(answer_and_rest.split_at(length))?;
        if !is_trained_here {
            // A cut here would change the prompts of later answers, which must equal their generation prompts.
            encoder.template(lead)?;
            let skipped = AnswerTokens::separate(answer.message);
            encoder.done.answers.push(skipped);
            at = answer.spans.start;
            continue;
        }
        encoder.flush()?;
        encoder.answer(lead, answer.message, &spans[answer.spans.clone()], messages)?;
        if let Some(answer) = encoder.done.answers.last_mut() {
            answer.follows_generation_prompt = follows;
            answer.thinking = change;
        }
        at = answer.spans.end;
    }
    encoder.prompt(&spans[at..])?;
    Ok(encoder.done)
}

/// Encodes an answer after its generation prompt. Thinking is written as in the message, because the end of the
/// generation prompt cannot be found in the rendered conversation.
fn after_prompt(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    all: &[RenderedSpan],
    answer: &RenderedAnswer,
) -> Result<EncodedConversation> {
    let prompt = template.render(&messages[..answer.message], true)?;
    let text: String = prompt.iter().map(RenderedSpan::text).collect();
    let content = &messages[answer.message].content;
    let (spans, change) = match thinking_spans(answer.message, content) {
        None => (all[answer.spans.clone()].to_vec(), None),
        Some([_, inner, _, reply]) if closes_thinking(&text) => {
            let is_blank = inner.text().trim().is_empty();
            (vec![reply], (!is_blank).then_some(ThinkingChange::LeftOut))
        }
        Some([opening, inner, closing, reply]) => {
            let opening = RenderedSpan::Template(not_opened(opening.text(), &text).to_owned());
            let restored = answer.thinking_change(all, messages, &text);
            (vec![opening, inner, closing, reply], restored)
        }
    };
    let mut encoder = ConversationEncoder::new(tokenizer);
    encoder.prompt(&prompt)?;
    encoder.answer("", answer.message, &spans, messages)?;
    if let Some(answer) = encoder.done.answers.last_mut() {
        answer.thinking = change;
    }
    encoder.prompt(&all[answer.spans.end..])?;
    Ok(encoder.done)
}

/// Returns true if the generation prompt ends with the end of a block of thinking.
fn closes_thinking(prompt: &str) -> bool {
    prompt.trim_end().ends_with(THINKING.1)
}

/// Opening tag of an answer, without the part that the generation prompt has already written.
fn not_opened<'a>(tag: &'a str, prompt: &str) -> &'a str {
    let opened = prompt.trim_end();
    if !opened.ends_with(THINKING.0) {
        return tag;
    }
    let after = |text: &'a str| text.trim_start().strip_prefix(THINKING.0);
    let space = after(tag).unwrap_or_default();
    space.strip_prefix(&prompt[opened.len()..]).unwrap_or("")
}

/// Part of `text` that differs from `other`, shortened. It starts after the shared messages, which end at
/// `content_end`, or else a little before the first difference.
fn difference(text: &str, other: &str, content_end: usize) -> String {
    const BEFORE: usize = 20;
    const SHOWN: usize = 60;
    let common = text.bytes().zip(other.bytes()).take_while(|(a, b)| a == b);
    let common = common.count();
    let from = if common >= content_end {
        content_end
    } else {
        common.saturating_sub(BEFORE)
    };
    let from = (0..=from).rev().find(|at| text.is_char_boundary(*at));
    let shown = &text[from.unwrap_or_default()..];
    shown.chars().take(SHOWN).collect()
}

/// An answer in a rendered conversation.
struct RenderedAnswer {
    message: usize,
    /// First byte of the content.
    start: usize,
    /// First byte of the template text before it.
    earliest: usize,
    /// Spans of the content, and of template text between them.
    spans: Range<usize>,
}

impl RenderedAnswer {
    /// Byte of `text`, the rendered conversation, at which the generation prompt ends. None if the prompt is not
    /// a prefix that ends after the previous message.
    fn end_of_prompt(&self, text: &str, prompt: &str) -> Option<usize> {
        let is_prefix = text[..self.start].starts_with(prompt);
        (is_prefix && prompt.len() >= self.earliest).then_some(prompt.len())
    }

    /// How this answer's thinking is written after `prompt`. None if the template prints it.
    fn thinking_change(
        &self,
        spans: &[RenderedSpan],
        messages: &[Message],
        prompt: &str,
    ) -> Option<ThinkingChange> {
        let [_, inner, ..] = thinking_spans(self.message, &messages[self.message].content)?;
        let spans = spans[self.spans.clone()].iter();
        let printed = spans.filter(|span| matches!(span, RenderedSpan::Content { .. }));
        if printed.count() > 1 || inner.text().trim().is_empty() {
            None
        } else if closes_thinking(prompt) {
            Some(ThinkingChange::LeftOut)
        } else {
            Some(ThinkingChange::Restored)
        }
    }
}

/// Answers in a rendered conversation, in order.
fn rendered_answers(spans: &[RenderedSpan], messages: &[Message]) -> Vec<RenderedAnswer> {
    let mut found: Vec<RenderedAnswer> = Vec::new();
    let mut at = 0;
    let mut end_of_content = 0;
    let mut before = None;
    for (index, span) in spans.iter().enumerate() {
        let end = at + span.text().len();
        if let RenderedSpan::Content { message, .. } = span {
            match found.last_mut() {
                Some(last) if before == Some(*message) && last.message == *message => {
                    last.spans.end = index + 1;
                }
                _ if messages[*message].role == "assistant" => {
                    // A template may print an answer in a summary before its turn.
                    found.retain(|answer| answer.message != *message);
                    found.push(RenderedAnswer {
                        message: *message,
                        start: at,
                        earliest: end_of_content,
                        spans: index..index + 1,
                    });
                }
                _ => {}
            }
            before = Some(*message);
            end_of_content = end;
        }
        at = end;
    }
    found
}
