//! Encodes conversations and finds the tokens of their answers.
//!
//! Text between two control tokens is encoded in one piece, template text and contents together. The ids therefore
//! equal the ids of the whole rendered conversation, as in pre-training and in all servers. Only answers are encoded
//! separately, from the end of the generation prompt to the end of the content, as a model generates them.

use std::ops::Range;

use anyhow::{Result, bail};
use jiff::civil::DateTime;

use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::answer_tokens::{
    AnswerTokens, EncodedConversation, PromptDifference, ThinkingChange,
};
use crate::tokenizer::chat_template::{
    ChatTemplate, RenderedSpan, THINKING_TAGS, TemplateClock, thinking_spans,
};
use crate::tokenizer::encoder::ConversationEncoder;

impl Tokenizer {
    /// Returns the tokens with which the chat template ends a turn. These are the tokens after an answer, up to and
    /// including the first control token that is a stop token, or, without one, the first control token. None without a
    /// chat template, or if it rejects the test conversation or writes no control token after the answer.
    pub(super) fn find_end_of_turn(&mut self) -> Option<Box<[u32]>> {
        if let Some(tokens) = self.seq2seq {
            return Some([tokens.end].into());
        }
        let template = self.template.clone()?;
        // The end of turn does not depend on the date.
        self.set_date(TemplateClock::Fixed(DateTime::constant(
            2000, 1, 1, 0, 0, 0, 0,
        )));
        let messages = [Message::new("user", "a"), Message::new("assistant", "b")];
        let conversation = self.last_answer(&messages);
        self.template = Some(template);
        let conversation = conversation.ok()?;
        let following_ids = &conversation.ids[conversation.answers.last()?.tokens.end..];
        let is_control = |id: &u32| self.is_special(*id);
        let is_stop = |id: &u32| is_control(id) && self.stop_ids.contains(id);
        let end = following_ids.iter().position(is_stop);
        let end = end.or_else(|| following_ids.iter().position(is_control))?;
        Some(following_ids[..=end].into())
    }

    /// Ids of a conversation with its generation prompt; of an encoder-decoder, the ids of the source.
    ///
    /// # Errors
    /// If there is no chat template, or it rejects these messages.
    pub fn encode_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template()?.with_date(None);
        match self.seq2seq {
            Some(tokens) => self.encode_source(tokens, &template, messages),
            None => encode_template(self, &template, messages),
        }
    }

    /// Ids of a conversation that ends inside its last message, an answer that the model will continue. Also returns
    /// the range of the ids that spell this answer.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`], if the last message is not the assistant's, and for an encoder-decoder.
    pub fn encode_continued(&self, messages: &[Message]) -> Result<(Vec<u32>, Range<usize>)> {
        if self.is_encoder_decoder() {
            bail!("an encoder-decoder cannot continue an answer");
        }
        let EncodedConversation {
            mut ids, answers, ..
        } = self.last_answer(messages)?;
        let last = answers.last();
        let Some(answer) = last.filter(|answer| answer.message + 1 == messages.len()) else {
            bail!("the last message must have the role `assistant`");
        };
        ids.truncate(answer.content.end);
        Ok((ids, answer.content.clone()))
    }

    /// Ids of a conversation, and the supervised ranges: each answer of the assistant with the token that ends it. The
    /// range of an answer that cannot be trained as a part of this conversation is empty.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_conversation(
        &self,
        messages: &[Message],
    ) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let conversation = self.conversation(messages)?;
        let ranges = conversation
            .answers
            .into_iter()
            .map(|answer| answer.supervised);
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

    /// Encodes a conversation as [`Self::conversation`] does, or, without `every_answer`, as [`Self::last_answer`]
    /// does. `date` is the date of the conversation's record.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn conversation_at(
        &self,
        messages: &[Message],
        every_answer: bool,
        date: Option<DateTime>,
    ) -> Result<EncodedConversation> {
        let template = self.template()?.with_date(date);
        match self.seq2seq {
            Some(tokens) => self.encode_seq2seq(tokens, &template, messages),
            None => encode(self, &template, messages, every_answer),
        }
    }
}

/// Encodes the text that the template renders as the generation prompt of these messages.
pub(crate) fn encode_template(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<Vec<u32>> {
    let spans = template.render(messages, true)?;
    let mut encoder = ConversationEncoder::new(tokenizer);
    encoder.encode_spans(&spans)?;
    Ok(encoder.output.ids)
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
    let answer_count = messages.iter().filter(|m| m.role == "assistant").count();
    if answers.len() != answer_count {
        bail!(
            "the chat template prints {} of the {answer_count} answers",
            answers.len()
        );
    }
    if !answers.is_sorted_by_key(|answer| answer.message) {
        bail!("the chat template prints the answers in another order than the messages");
    }
    let text: String = spans.iter().map(RenderedSpan::text).collect();
    let mut encoder = ConversationEncoder::new(tokenizer);
    let mut next_span = 0;
    for (number, answer) in answers.iter().enumerate() {
        let is_last = number + 1 == answer_count;
        if !is_last && !every_answer {
            let skipped = AnswerTokens::without_tokens(answer.message);
            encoder.output.answers.push(skipped);
            continue;
        }
        // Some templates reject conversations that end before an answer.
        let prompt = template.render_text(&messages[..answer.message], true).ok();
        let prompt_end = match &prompt {
            Some(prompt) => answer.end_of_prompt(&text, prompt),
            None => Some(answer.start),
        };
        let change = prompt
            .as_ref()
            .and_then(|prompt| answer.thinking_change(&spans, messages, prompt));
        let is_restored = change == Some(ThinkingChange::Restored);
        if is_last
            && (prompt_end.is_none() || is_restored)
            && let Some(prompt) = &prompt
        {
            let text_before = &text[..answer.start];
            let mut output = encode_after_prompt(tokenizer, template, messages, &spans, answer)?;
            let earlier = answers[..number].iter();
            let earlier = earlier.map(|answer| AnswerTokens::without_tokens(answer.message));
            output.answers.splice(0..0, earlier);
            output.difference = prompt_end.is_none().then(|| PromptDifference {
                generation: difference(prompt, text_before, answer.template_start),
                conversation: difference(text_before, prompt, answer.template_start),
            });
            return Ok(output);
        }
        let follows_prompt = match (prompt_end, &prompt) {
            _ if is_restored => false,
            (Some(end), Some(prompt)) if !is_last => {
                // Some templates render an answer differently inside a conversation.
                let as_last = template.render_text(&messages[..=answer.message], false);
                let as_last = as_last
                    .as_ref()
                    .ok()
                    .and_then(|text| text.strip_prefix(prompt.as_str()));
                as_last.is_some_and(|as_last| text[end..].starts_with(as_last.trim_end()))
            }
            (end, _) => end.is_some(),
        };
        // The template text between the generation prompt and the content.
        let lead = &text[prompt_end.unwrap_or(answer.start)..answer.start];
        encoder.push_before_answer(&spans[next_span..answer.spans.start], lead)?;
        let from_answer = &text[answer.start - lead.len()..];
        let length = lead.len()
            + spans[answer.spans.clone()]
                .iter()
                .map(|span| span.text().len())
                .sum::<usize>();
        let is_blank = messages[answer.message].content.trim().is_empty();
        let (answer_text, following) = from_answer.split_at(length);
        let is_encoded_separately = is_last
            || follows_prompt && !is_blank && encoder.can_cut_around(answer_text, following)?;
        if !is_encoded_separately {
            // Encoding this answer separately would change the prompts of later answers, which must equal their
            // generation prompts.
            encoder.push_template(lead)?;
            let skipped = AnswerTokens::without_tokens(answer.message);
            encoder.output.answers.push(skipped);
            next_span = answer.spans.start;
            continue;
        }
        encoder.flush()?;
        encoder.encode_answer(lead, answer.message, &spans[answer.spans.clone()], messages)?;
        if let Some(answer) = encoder.output.answers.last_mut() {
            answer.follows_generation_prompt = follows_prompt;
            answer.thinking = change;
        }
        next_span = answer.spans.end;
    }
    encoder.encode_spans(&spans[next_span..])?;
    Ok(encoder.output)
}

/// Encodes an answer after its generation prompt, if the rendered conversation does not contain this prompt or drops
/// the thinking. Thinking is written as in the message, unless the prompt closes a block of thinking.
fn encode_after_prompt(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    all_spans: &[RenderedSpan],
    answer: &RenderedAnswer,
) -> Result<EncodedConversation> {
    let prompt = template.render(&messages[..answer.message], true)?;
    let text: String = prompt.iter().map(RenderedSpan::text).collect();
    let content = &messages[answer.message].content;
    let (spans, change) = match thinking_spans(answer.message, content) {
        None => (all_spans[answer.spans.clone()].to_vec(), None),
        Some([_, inner, _, reply]) if closes_thinking(&text) => {
            let is_blank = inner.text().trim().is_empty();
            (vec![reply], (!is_blank).then_some(ThinkingChange::LeftOut))
        }
        Some([opening, inner, closing, reply]) => {
            let opening = RenderedSpan::Template(unwritten_tag(opening.text(), &text).to_owned());
            let restored = answer.thinking_change(all_spans, messages, &text);
            (vec![opening, inner, closing, reply], restored)
        }
    };
    let mut encoder = ConversationEncoder::new(tokenizer);
    encoder.encode_spans(&prompt)?;
    encoder.encode_answer("", answer.message, &spans, messages)?;
    if let Some(answer) = encoder.output.answers.last_mut() {
        answer.thinking = change;
    }
    encoder.encode_spans(&all_spans[answer.spans.end..])?;
    Ok(encoder.output)
}

/// Number of bytes before a difference that [`difference`] includes.
const CONTEXT_BYTES: usize = 20;
/// Maximum number of characters that [`difference`] returns.
const MAX_CHARACTERS: usize = 60;

/// Returns true if the generation prompt ends with the closing tag of thinking.
fn closes_thinking(prompt: &str) -> bool {
    prompt.trim_end().ends_with(THINKING_TAGS.1)
}

/// Removes from `tag` the part that the end of the generation prompt already contains. `tag` is the opening tag of an
/// answer with the white space around it.
fn unwritten_tag<'a>(tag: &'a str, prompt: &str) -> &'a str {
    let trimmed_prompt = prompt.trim_end();
    if !trimmed_prompt.ends_with(THINKING_TAGS.0) {
        return tag;
    }
    let space = tag.trim_start().strip_prefix(THINKING_TAGS.0);
    space
        .unwrap_or_default()
        .strip_prefix(&prompt[trimmed_prompt.len()..])
        .unwrap_or("")
}

/// Returns the part of `text` that differs from `other`, shortened. It starts after the shared messages, which end at
/// `content_end`. If the texts already differ before `content_end`, it starts [`CONTEXT_BYTES`] before the first
/// difference.
fn difference(text: &str, other: &str, content_end: usize) -> String {
    let common = text.bytes().zip(other.bytes()).take_while(|(a, b)| a == b);
    let common = common.count();
    let start = if common >= content_end {
        content_end
    } else {
        common.saturating_sub(CONTEXT_BYTES)
    };
    let start = (0..=start)
        .rev()
        .find(|index| text.is_char_boundary(*index));
    let part = &text[start.unwrap_or_default()..];
    part.chars().take(MAX_CHARACTERS).collect()
}

/// An answer in a rendered conversation.
struct RenderedAnswer {
    /// Index of the message.
    message: usize,
    /// Offset of the content in the rendered text.
    start: usize,
    /// Offset at which the template text before the content begins.
    template_start: usize,
    /// Spans of the content, and of template text between them.
    spans: Range<usize>,
}

impl RenderedAnswer {
    /// Offset in `text`, the rendered conversation, at which the generation prompt ends. None if the prompt is not
    /// a prefix of `text` that ends between the previous message and this answer's content.
    fn end_of_prompt(&self, text: &str, prompt: &str) -> Option<usize> {
        let is_prefix = text[..self.start].starts_with(prompt);
        (is_prefix && prompt.len() >= self.template_start).then_some(prompt.len())
    }

    /// Change of this answer's thinking after `prompt`. None if the answer has no thinking or the template prints it.
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

/// Returns the answers in a rendered conversation, in order.
fn rendered_answers(spans: &[RenderedSpan], messages: &[Message]) -> Vec<RenderedAnswer> {
    let mut answers: Vec<RenderedAnswer> = Vec::new();
    let mut start = 0;
    let mut end_of_content = 0;
    let mut previous_message = None;
    for (index, span) in spans.iter().enumerate() {
        let end = start + span.text().len();
        if let RenderedSpan::Content { message, .. } = span {
            match answers.last_mut() {
                Some(last) if previous_message == Some(*message) && last.message == *message => {
                    last.spans.end = index + 1;
                }
                _ if messages[*message].role == "assistant" => {
                    // A template may print an answer twice, first in a summary. Only the answer in its own turn is
                    // used.
                    answers.retain(|answer| answer.message != *message);
                    answers.push(RenderedAnswer {
                        message: *message,
                        start,
                        template_start: end_of_content,
                        spans: index..index + 1,
                    });
                }
                _ => {}
            }
            previous_message = Some(*message);
            end_of_content = end;
        }
        start = end;
    }
    answers
}
