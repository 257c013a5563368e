//! A model's chat template, rendered with template text and message content kept apart.
//!
//! Apart, since they are tokenised differently: `<|im_end|>` is a control token where the template
//! wrote it, and ten characters of text where a message did. How: the conversation is rendered
//! twice, once as it is and once with a marker in place of each content. The second shows where the
//! template puts contents; the first decides what it makes of them.

mod meter;
mod python_json;
mod sandbox;

use anyhow::{Result, anyhow, bail};
use minijinja::{Value, context};

use crate::prompt::Message;

/// A piece of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Span {
    /// Text of the template itself, where control tokens are control tokens.
    Template(String),
    /// Content of message number `message`, possibly without the white space at its ends.
    Content { message: usize, text: String },
}

/// A template and the tokens that it may name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Takes the template as it stands in a model folder.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Self {
        Self {
            source: without_generation_tags(source),
            bos_token: bos_token.into(),
            eos_token: eos_token.into(),
        }
    }

    /// The conversation as one text, without telling template and content apart.
    ///
    /// # Errors
    /// If the template does not parse, refuses the conversation, or takes more than its share of
    /// time or memory.
    pub fn render_text(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let input = messages
            .iter()
            .map(|m| m.role.len() + m.content.len())
            .sum();
        let context = context! {
            messages => messages.iter().map(as_value).collect::<Vec<_>>(),
            add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
            tools => Value::from(()),
            documents => Value::from(()),
        };
        sandbox::render(&self.source, context, messages.len(), input)
            .map_err(|e| anyhow!("the chat template fails: {e}"))
    }

    /// The conversation in pieces, whose texts joined are [`Self::render_text`].
    ///
    /// # Errors
    /// As there; and if the template does something to a content that cannot be followed, such as
    /// writing it in capitals.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<Span>> {
        let real = self.render_text(messages, add_generation_prompt)?;
        let marker = marker(messages);
        // A template may leave out an empty message, which a marker would hide: so the second try
        // leaves empty contents empty.
        for mark_empty in [true, false] {
            let marked: Vec<Message> = messages
                .iter()
                .enumerate()
                .map(|(number, message)| Message {
                    role: message.role.clone(),
                    content: match message.content.is_empty() && !mark_empty {
                        true => String::new(),
                        false => format!("{marker}{number}{MARKER_END}"),
                    },
                })
                .collect();
            let marked = self.render_text(&marked, add_generation_prompt)?;
            if let Some(spans) = follow(&real, &marked, &marker, messages) {
                return Ok(spans);
            }
        }
        bail!("the chat template changes the text of a message in a way that cannot be followed")
    }
}

/// Private-use characters: no template looks for them.
const MARKER_START: char = '\u{F8F0}';
const MARKER_END: char = '\u{F8F1}';

/// Text that occurs in no message: it contains the hash of all of them.
fn marker(messages: &[Message]) -> String {
    let mut hasher = blake3::Hasher::new();
    for message in messages {
        hasher.update(message.role.as_bytes());
        hasher.update(b"\0");
        hasher.update(message.content.as_bytes());
        hasher.update(b"\0");
    }
    format!("{MARKER_START}{}-", hasher.finalize().to_hex())
}

/// Cuts `real` where `marked` has its markers. None if the two do not agree.
fn follow(real: &str, marked: &str, marker: &str, messages: &[Message]) -> Option<Vec<Span>> {
    let mut pieces = marked.split(marker);
    let first = pieces.next().unwrap_or_default();
    let mut rest = real.strip_prefix(first)?;
    let mut spans = Vec::new();
    push_template(&mut spans, first);
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        let (number, template) = piece.split_once(MARKER_END)?;
        let message: usize = number.parse().ok()?;
        let content = &messages.get(message)?.content;
        let last = pieces.peek().is_none();
        let (text, after) = forms(content).into_iter().find_map(|form| {
            let after = rest.strip_prefix(form)?.strip_prefix(template)?;
            (!last || after.is_empty()).then_some((form, after))
        })?;
        spans.push(Span::Content {
            message,
            text: text.into(),
        });
        push_template(&mut spans, template);
        rest = after;
    }
    rest.is_empty().then_some(spans)
}

fn push_template(spans: &mut Vec<Span>, text: &str) {
    if !text.is_empty() {
        spans.push(Span::Template(text.into()));
    }
}

/// What templates make of a content: the content, or the content without white space at its ends.
fn forms(content: &str) -> [&str; 7] {
    [
        content,
        content.trim(),
        content.trim_start(),
        content.trim_end(),
        content.trim_matches('\n'),
        content.trim_start_matches('\n'),
        content.trim_end_matches('\n'),
    ]
}

/// Takes out the tags with which `transformers` marks the assistant's part. An `if` in their place
/// keeps their effect on the white space around them.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start + 2..start + length];
        out.push_str(&rest[..start + 2]);
        match tag.trim_matches(['-', '+', ' ', '\t', '\n']) {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

fn as_value(message: &Message) -> Value {
    Value::from_pairs([
        ("role", message.role.as_str()),
        ("content", message.content.as_str()),
    ])
}
