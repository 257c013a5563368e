//! A conversation in ids, and where its answers lie.
//!
//! Text between two control tokens is encoded in one go, template text and contents together, so
//! that the ids are those of the whole rendered conversation, which pre-training and every server
//! use. The exception is an answer: it begins where a generating model begins, so a new stretch
//! begins there too, and again where the answer ends.

use std::ops::Range;

use anyhow::{Result, bail};

use super::{Place, Tokenizer, added};
use crate::data::chat_template::{ChatTemplate, Span};
use crate::prompt::Message;

/// A conversation of T tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// (T)
    pub ids: Vec<u32>,
    /// The assistant's messages, in order.
    pub answers: Vec<AnswerTokens>,
}

/// An answer in a [`Conversation`]; ranges of tokens are in `ids`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerTokens {
    /// The message's index.
    pub message: usize,
    /// The bytes of its content that the template kept.
    pub text: Range<usize>,
    /// The tokens that spell it, and the white space that the template puts before it where the
    /// model has to generate that as well.
    pub tokens: Range<usize>,
    /// `tokens` and what follows up to the token that ends the turn, if one does.
    pub supervised: Range<usize>,
}

pub fn encode(
    tokenizer: &Tokenizer,
    messages: &[Message],
    add_generation_prompt: bool,
) -> Result<Conversation> {
    let template = tokenizer.template()?;
    let spans = template.render(messages, add_generation_prompt)?;
    let mut writer = Writer::new(tokenizer);
    let mut rendered = String::new();
    for span in &spans {
        match span {
            Span::Template(text) => {
                writer.template(text)?;
                rendered.push_str(text);
            }
            Span::Content { message, text } if messages[*message].role == "assistant" => {
                let lead = lead(template, &messages[..*message], &rendered);
                writer.answer(*message, &messages[*message].content, text, lead)?;
                rendered.push_str(text);
            }
            Span::Content { text, .. } => {
                writer.run.push_str(text);
                rendered.push_str(text);
            }
        }
    }
    writer.flush()?;
    let answers = messages.iter().filter(|m| m.role == "assistant").count();
    if writer.done.answers.len() != answers {
        bail!(
            "the chat template prints {} of {answers} answers",
            writer.done.answers.len()
        );
    }
    Ok(writer.done)
}

/// How many bytes of white space at the end of `rendered`, which stands before an answer, are not
/// part of the prompt for it, so that the model must generate them. `[/INST]` + ` answer`, say.
fn lead(template: &ChatTemplate, before: &[Message], rendered: &str) -> usize {
    if !rendered.ends_with(char::is_whitespace) {
        return 0;
    }
    match template.render_text(before, true) {
        Ok(prompt) => rendered
            .strip_prefix(&prompt)
            .filter(|rest| rest.trim().is_empty())
            .map_or(0, str::len),
        // A template may refuse a conversation that is cut off here; then nothing is known.
        Err(_) => 0,
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

    fn answer(&mut self, message: usize, content: &str, text: &str, lead: usize) -> Result<()> {
        let lead = self.run.split_off(self.run.len().saturating_sub(lead));
        self.flush()?;
        let start = self.done.ids.len();
        self.run = lead + text;
        self.flush()?;
        let tokens = start..self.done.ids.len();
        let kept = content.find(text).unwrap_or(0);
        self.done.answers.push(AnswerTokens {
            message,
            text: kept..kept + text.len(),
            supervised: tokens.clone(),
            tokens,
        });
        self.open = true;
        Ok(())
    }
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
