//! A conversation in ids, and where its answers lie.
//!
//! Text between two control tokens is encoded in one go, template text and contents together, so
//! that the ids are those of the whole rendered conversation, which pre-training and every server
//! use. The exception is an answer, which is encoded separately: from the end of the generation prompt to the
//! end of its content, as a model generates it.

use crate::tokenizer::answer_tokens::AnswerTokens;
use crate::tokenizer::answer_tokens::EncodedConversation;
use crate::tokenizer::answer_tokens::PromptDifference;
use crate::tokenizer::answer_tokens::ThinkingChange;
use std::ops::Range;

use crate::tokenizer::chat_template::TemplateClock;
use anyhow::{Result, bail};
use jiff::civil::DateTime;

use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat_template::{ChatTemplate, RenderedSpan, THINKING, thinking_spans};
use crate::tokenizer::writer::ConversationEncoder;

impl Tokenizer {
    /// Tokens with which the chat template ends a turn: text that it writes behind an answer, if any, and the first
    /// token that ends answers, or else the first control token.
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
        let behind = &conversation.ids[conversation.answers.last()?.tokens.end..];
        let is_control = |id: &u32| self.is_special(*id);
        let is_end = |id: &u32| is_control(id) && self.stop_ids.contains(id);
        let end = behind.iter().position(is_end);
        let end = end.or_else(|| behind.iter().position(is_control))?;
        Some(behind[..=end].into())
    }

    /// Ids of a conversation that the model is to continue.
    ///
    /// # Errors
    /// If there is no chat template, or it does not take these messages.
    pub fn encode_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        encode_prompt(self, &self.template()?.at(None), messages)
    }

    /// Ids of a conversation that ends in the midst of its last message, an answer, which the model is to
    /// continue; and which of them spell that answer.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`], and where the last message is no answer.
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

    /// Ids of a conversation, and the ranges of those that a student must learn to predict: each
    /// answer of the assistant with the token that ends it.
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

    /// [`Self::encode_conversation`] with what alignment needs to know about each answer.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn conversation(&self, messages: &[Message]) -> Result<EncodedConversation> {
        self.conversation_at(messages, true, None)
    }

    /// Same, with the ranges of the last answer alone.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn last_answer(&self, messages: &[Message]) -> Result<EncodedConversation> {
        self.conversation_at(messages, false, None)
    }

    /// [`Self::conversation`] or [`Self::last_answer`] of a record of this date.
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
    let mut writer = ConversationEncoder::new(tokenizer);
    writer.prompt(&spans)?;
    Ok(writer.done.ids)
}

/// Encodes a conversation with its answers. Without `every_answer`, earlier answers are part of the prompt for the
/// last one and have no ranges.
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
    let mut writer = ConversationEncoder::new(tokenizer);
    let mut at = 0;
    for (number, answer) in answers.iter().enumerate() {
        let is_last = number + 1 == count;
        if !is_last && !every_answer {
            let skipped = AnswerTokens::separate(answer.message);
            writer.done.answers.push(skipped);
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
                // Some templates render an answer in another way inside a conversation.
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
        writer.before_answer(&spans[at..answer.spans.start], lead)?;
        let said = &text[answer.start - lead.len()..];
        let length = lead.len()
            + spans[answer.spans.clone()]
                .iter()
                .map(|s| s.text().len())
                .sum::<usize>();
        let is_blank = messages[answer.message].content.trim().is_empty();
        let is_trained_here =
            is_last || follows && !is_blank && writer.may_cut_around(said.split_at(length))?;
        if !is_trained_here {
            // Cut there, the prompts of later answers would not be their generation prompts.
            writer.template(lead)?;
            let skipped = AnswerTokens::separate(answer.message);
            writer.done.answers.push(skipped);
            at = answer.spans.start;
            continue;
        }
        writer.flush()?;
        writer.answer(lead, answer.message, &spans[answer.spans.clone()], messages)?;
        if let Some(answer) = writer.done.answers.last_mut() {
            answer.follows_generation_prompt = follows;
            answer.thinking = change;
        }
        at = answer.spans.end;
    }
    writer.prompt(&spans[at..])?;
    Ok(writer.done)
}

/// Encodes an answer after its generation prompt. Thinking is written as in the message: in what the template renders,
/// the end of the generation prompt cannot be found.
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
        Some([_, inner, _, said]) if closes_thinking(&text) => {
            let is_blank = inner.text().trim().is_empty();
            (vec![said], (!is_blank).then_some(ThinkingChange::LeftOut))
        }
        Some([opening, inner, closing, said]) => {
            let opening = RenderedSpan::Template(not_opened(opening.text(), &text).to_owned());
            let restored = answer.thinking_change(all, messages, &text);
            (vec![opening, inner, closing, said], restored)
        }
    };
    let mut writer = ConversationEncoder::new(tokenizer);
    writer.prompt(&prompt)?;
    writer.answer("", answer.message, &spans, messages)?;
    if let Some(answer) = writer.done.answers.last_mut() {
        answer.thinking = change;
    }
    writer.prompt(&all[answer.spans.end..])?;
    Ok(writer.done)
}

/// Does a block of thinking end where the generation prompt ends?
fn closes_thinking(prompt: &str) -> bool {
    prompt.trim_end().ends_with(THINKING.1)
}

/// The opening tag of an answer without what the generation prompt ends with.
fn not_opened<'a>(tag: &'a str, prompt: &str) -> &'a str {
    let opened = prompt.trim_end();
    if !opened.ends_with(THINKING.0) {
        return tag;
    }
    let after = |text: &'a str| text.trim_start().strip_prefix(THINKING.0);
    let space = after(tag).unwrap_or_default();
    space.strip_prefix(&prompt[opened.len()..]).unwrap_or("")
}

/// `text` without the messages that it shares with `other`, whose last one ends at `content_end`; or else from a
/// little before the first difference. Shortened.
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

struct RenderedAnswer {
    message: usize,
    /// First byte of its content.
    start: usize,
    /// First byte of the template text before it.
    earliest: usize,
    /// Spans of its content, and of template text between them.
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
    let (mut at, mut end_of_content, mut before) = (0, 0, None);
    for (index, span) in spans.iter().enumerate() {
        let end = at + span.text().len();
        if let RenderedSpan::Content { message, .. } = span {
            match found.last_mut() {
                Some(last) if before == Some(*message) && last.message == *message => {
                    last.spans.end = index + 1;
                }
                _ if messages[*message].role == "assistant" => {
                    // A summary may print an answer before its turn.
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
