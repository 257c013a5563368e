//! A conversation in ids, and where its answers lie.
//!
//! Text between two control tokens is encoded in one go, template text and contents together, so
//! that the ids are those of the whole rendered conversation, which pre-training and every server
//! use. The exception is an answer, which is encoded separately: from the end of the generation prompt to the
//! end of its content, as a model generates it.

use std::ops::Range;

use anyhow::{Result, bail};

use super::{Place, Tokenizer, added};
use crate::data::chat_template::{Span, answer_start};
use crate::prompt::Message;

/// A conversation of T tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// (T)
    pub ids: Vec<u32>,
    /// The assistant's messages, in order.
    pub answers: Vec<AnswerTokens>,
    /// Set if the generation prompt differs from the rendered prefix of the last answer; `ids` begin with the
    /// generation prompt.
    pub difference: Option<Difference>,
}

/// Ends of the generation prompt and of the prefix in the rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub generation: String,
    pub conversation: String,
}

/// An answer in a [`Conversation`]; ranges of tokens are in `ids`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerTokens {
    /// The message's index.
    pub message: usize,
    /// Byte range of the content that `tokens` end with.
    pub text: Range<usize>,
    /// Tokens from the end of the generation prompt to the end of the content: text of the template that the
    /// model has to generate, and the content.
    pub tokens: Range<usize>,
    /// `tokens` and what follows up to the token that ends the turn, if one does.
    pub supervised: Range<usize>,
    /// First token after the thinking, or of `tokens` without thinking.
    pub after_thinking: usize,
    /// True if the ids before `tokens` equal the generation prompt.
    pub is_behind_its_prompt: bool,
}

/// Encodes the generation prompt of these messages.
pub fn encode_prompt(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    let spans = tokenizer.template()?.render(messages, true)?;
    let mut writer = Writer::new(tokenizer);
    writer.prompt(&spans)?;
    Ok(writer.done.ids)
}

/// Encodes a conversation with its answers.
pub fn encode(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Conversation> {
    let template = tokenizer.template()?;
    let spans = template.render(messages, false)?;
    let answers = Answers::find(&spans, messages);
    let count = messages.iter().filter(|m| m.role == "assistant").count();
    if answers.0.len() != count {
        bail!(
            "the chat template prints {} of {count} answers",
            answers.0.len()
        );
    }
    let text: String = spans.iter().map(Span::text).collect();
    let mut writer = Writer::new(tokenizer);
    let mut at = 0;
    for (number, answer) in answers.0.iter().enumerate() {
        let before = &text[..answer.start];
        // Some templates reject such a prefix; then there is no generation prompt to compare with.
        let prompt = template.render_text(&messages[..answer.message], true).ok();
        // End of the generation prompt, if it is a prefix that ends after the previous message.
        let end = match &prompt {
            None => Some(answer.start),
            Some(prompt) if before.starts_with(prompt.as_str()) => {
                let earliest = spans[..answer.spans.start]
                    .iter()
                    .rposition(|span| matches!(span, Span::Content { .. }))
                    .map_or(0, |last| length(&spans[..=last]));
                Some(prompt.len()).filter(|end| *end >= earliest)
            }
            Some(_) => None,
        };
        if let (None, Some(prompt)) = (end, &prompt)
            && number + 1 == count
        {
            return composed(tokenizer, messages, &spans, answer, before, prompt, number);
        }
        let is_behind_its_prompt = end.is_some();
        let end = end.unwrap_or(answer.start);
        let (prompt, lead) = writer.split(&spans[at..answer.spans.start], &text, end, answer)?;
        writer.prompt(&prompt)?;
        writer.answer(&lead, answer, &spans, messages, is_behind_its_prompt)?;
        at = answer.spans.end;
    }
    writer.prompt(&spans[at..])?;
    Ok(writer.done)
}

/// Encodes the last answer after the generation prompt, which differs from its prefix in the rendered
/// conversation.
fn composed(
    tokenizer: &Tokenizer,
    messages: &[Message],
    spans: &[Span],
    answer: &Answer,
    before: &str,
    prompt: &str,
    earlier: usize,
) -> Result<Conversation> {
    let mut writer = Writer::new(tokenizer);
    let rendered = tokenizer
        .template()?
        .render(&messages[..answer.message], true)?;
    writer.prompt(&rendered)?;
    writer.answer(&[], answer, spans, messages, true)?;
    writer.prompt(&spans[answer.spans.end..])?;
    let mut done = writer.done;
    // Earlier answers are part of the prompt here.
    let others = messages.iter().enumerate();
    let others = others.filter(|(_, message)| message.role == "assistant");
    let others = others.take(earlier).map(|(message, _)| AnswerTokens {
        message,
        text: 0..0,
        tokens: 0..0,
        supervised: 0..0,
        after_thinking: 0,
        is_behind_its_prompt: false,
    });
    done.answers.splice(0..0, others);
    done.difference = Some(Difference {
        generation: ending(prompt, before),
        conversation: ending(before, prompt),
    });
    Ok(done)
}

/// End of `text` from a little before its first difference to `other`.
fn ending(text: &str, other: &str) -> String {
    const SHOWN: usize = 60;
    let common = text.bytes().zip(other.bytes()).take_while(|(a, b)| a == b);
    let from = common.count().saturating_sub(SHOWN / 3);
    let from = from.max(text.len().saturating_sub(SHOWN));
    let from = (0..=from).rev().find(|at| text.is_char_boundary(*at));
    text[from.unwrap_or_default()..].to_owned()
}

fn length(spans: &[Span]) -> usize {
    spans.iter().map(|span| span.text().len()).sum()
}

/// Answers in a rendered conversation, in order.
struct Answers(Vec<Answer>);

struct Answer {
    message: usize,
    /// First byte of its content.
    start: usize,
    /// Spans of its content, and of template text between them.
    spans: Range<usize>,
}

impl Answers {
    fn find(spans: &[Span], messages: &[Message]) -> Answers {
        let mut found: Vec<Answer> = Vec::new();
        let mut at = 0;
        for (index, span) in spans.iter().enumerate() {
            if let Span::Content { message, .. } = span
                && messages[*message].role == "assistant"
            {
                match found.last_mut() {
                    Some(last) if last.message == *message => last.spans.end = index + 1,
                    _ => found.push(Answer {
                        message: *message,
                        start: at,
                        spans: index..index + 1,
                    }),
                }
            }
            at += span.text().len();
        }
        Answers(found)
    }
}

struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    done: Conversation,
    /// Text not yet encoded, and where it stands.
    run: String,
    place: Place,
    /// Has the last answer's end of turn still to come?
    open: bool,
}

impl<'a> Writer<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            done: Conversation::default(),
            run: String::new(),
            place: Place::First,
            open: false,
        }
    }

    fn flush(&mut self) -> Result<()> {
        if !self.run.is_empty() {
            let ids = self.tokenizer.encode_at(&self.run, self.place)?;
            self.place = self.tokenizer.place_after(&ids);
            self.done.ids.extend(ids);
            self.run.clear();
        }
        Ok(())
    }

    /// Writes spans and encodes the pending text.
    fn prompt(&mut self, spans: &[Span]) -> Result<()> {
        for span in spans {
            match span {
                Span::Template(text) => self.template(text)?,
                Span::Content { text, .. } => self.run.push_str(text),
            }
        }
        self.flush()
    }

    /// Splits the spans before an answer at the end of its prompt, byte `end` of the whole text.
    fn split(
        &self,
        spans: &[Span],
        text: &str,
        end: usize,
        answer: &Answer,
    ) -> Result<(Vec<Span>, Vec<Span>)> {
        let lead = &text[end..answer.start];
        let mut prompt = spans.to_vec();
        if lead.is_empty() {
            return Ok((prompt, Vec::new()));
        }
        let Some(Span::Template(last)) = prompt.last_mut() else {
            bail!(
                "the chat template writes the prompt for an answer in a way that cannot be followed"
            );
        };
        let Some(kept) = last.strip_suffix(lead) else {
            bail!(
                "the chat template writes the prompt for an answer in a way that cannot be followed"
            );
        };
        *last = kept.to_owned();
        Ok((prompt, vec![Span::Template(lead.to_owned())]))
    }

    fn template(&mut self, text: &str) -> Result<()> {
        let controls = control_tokens(self.tokenizer, text);
        let is_stop = |id: u32| self.tokenizer.stop_ids().contains(&id);
        let end_of_turn = controls
            .iter()
            .position(|&(_, id)| is_stop(id))
            .unwrap_or(0);
        let mut at = 0;
        for (number, (range, id)) in controls.into_iter().enumerate() {
            self.run.push_str(&text[at..range.start]);
            self.flush()?;
            self.done.ids.push(id);
            self.place = Place::AfterControl;
            at = range.end;
            if self.open && number == end_of_turn {
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
    fn answer(
        &mut self,
        lead: &[Span],
        answer: &Answer,
        spans: &[Span],
        messages: &[Message],
        is_behind_its_prompt: bool,
    ) -> Result<()> {
        self.flush()?;
        self.open = false;
        let start = self.done.ids.len();
        let spans = &spans[answer.spans.clone()];
        self.prompt(&[lead, spans].concat())?;
        let tokens = start..self.done.ids.len();
        let content = &messages[answer.message].content;
        let written: String = lead.iter().chain(spans).map(Span::text).collect();
        let last = spans.last().map_or("", Span::text);
        let text = kept(content, &written, last);
        let after = match answer_start(content) {
            0 => tokens.start,
            from => {
                let bytes = text.end - text.end.min(from.max(text.start));
                first_of_last(self.tokenizer, &self.done.ids, &tokens, bytes)
            }
        };
        self.done.answers.push(AnswerTokens {
            message: answer.message,
            text,
            supervised: tokens.clone(),
            tokens,
            after_thinking: after,
            is_behind_its_prompt,
        });
        self.open = true;
        Ok(())
    }
}

/// First token of the shortest suffix of `tokens` with at least this number of bytes.
pub fn first_of_last(
    tokenizer: &Tokenizer,
    ids: &[u32],
    tokens: &Range<usize>,
    bytes: usize,
) -> usize {
    let mut left = bytes;
    let mut at = tokens.end;
    while left > 0 && at > tokens.start {
        at -= 1;
        let length = tokenizer.token_bytes(ids[at]).map_or(1, <[u8]>::len);
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

/// Would this text, as part of a template, make control tokens?
pub fn holds_control(tokenizer: &Tokenizer, text: &str) -> bool {
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
