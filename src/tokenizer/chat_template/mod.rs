//! Renders a model's chat template, and keeps template text and message contents apart.
//!
//! Template text and contents are tokenised differently: `<|im_end|>` is a control token where the template wrote it,
//! and ten characters of text in a message. To separate them, the conversation is rendered twice: once unchanged, and
//! once with a marker in place of each content. The second rendering shows where the template puts the contents, and
//! the first rendering shows how the template changes them.
//!
//! | file | content |
//! |---|---|
//! | `sandbox` | runs a template with limits on work and memory |
//! | `meter` | the environment of a template, which limits the bytes that its operations process |
//! | `python_date`, `python_json`, `python_text` | functions of Python that templates use |

pub(crate) mod meter;
pub(crate) mod python_date;
pub(crate) mod python_json;
pub(crate) mod python_text;
pub(crate) mod sandbox;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use jiff::civil::DateTime;
use minijinja::{Value, context};

use crate::config::TemplateDate;
use crate::exit::Exit;
use crate::prompt::message::Message;
pub use meter::NEEDS_DATE;

/// Prepends default values of variables to a template. Values that are passed at rendering take precedence.
///
/// # Errors
/// [`Exit::Usage`] for a name that is invalid, reserved, or not used by the template.
pub fn with_arguments(
    source: &str,
    arguments: &BTreeMap<String, serde_json::Value>,
) -> Result<String> {
    const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
    let mut text = String::new();
    for (name, value) in arguments {
        let is_name = !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_name {
            bail!(Exit::Usage(format!(
                "`student.template_args` contains {name:?}, which is not a valid variable name"
            )));
        }
        if RESERVED.contains(&name.as_str()) || TOKEN_VARIABLES.contains(&name.as_str()) {
            bail!(Exit::Usage(format!(
                "`student.template_args` must not contain {name:?}: distill sets this variable itself"
            )));
        }
        if !source.contains(name.as_str()) {
            bail!(Exit::Usage(format!(
                "`student.template_args` sets `{name}`, which the chat template does not use"
            )));
        }
        let value = literal(value);
        // `trim_blocks` removes this line break from the output. Without it, the template would not begin at the start
        // of a line, so `lstrip_blocks` would not apply to its first line.
        text.push_str(&format!(
            "{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}\n"
        ));
    }
    Ok(text + source)
}

/// Formats a JSON value as a Jinja literal.
fn literal(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => "none".into(),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(literal).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(fields) => {
            let fields = fields.iter();
            let fields: Vec<_> = fields
                .map(|(name, value)| format!("{}: {}", Value::from(name.as_str()), literal(value)))
                .collect();
            format!("{{{}}}", fields.join(", "))
        }
        scalar => scalar.to_string(),
    }
}

/// Part of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RenderedSpan {
    /// Text of the template, in which the names of control tokens are control tokens.
    Template(String),
    /// Content of message number `message`, possibly stripped of white space. An answer with thinking may have two
    /// spans: the thinking, and the text after it.
    Content { message: usize, text: String },
}

impl RenderedSpan {
    pub fn text(&self) -> &str {
        match self {
            RenderedSpan::Template(text) | RenderedSpan::Content { text, .. } => text,
        }
    }
}

/// Variables of a chat template that hold special tokens.
pub(crate) const TOKEN_VARIABLES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
];

/// Source of the date that `strftime_now` returns.
#[derive(Debug, Clone, Copy)]
pub enum TemplateClock {
    /// The same date for all conversations.
    Fixed(DateTime),
    /// The current time, which `ChatTemplate::with_date` reads once per conversation.
    Clock(fn() -> DateTime),
    /// The date of each record, which is passed to `ChatTemplate::with_date`.
    Record,
}

impl From<TemplateDate> for TemplateClock {
    fn from(date: TemplateDate) -> Self {
        match date {
            TemplateDate::Fixed(date) => TemplateClock::Fixed(date.into()),
            TemplateDate::Record => TemplateClock::Record,
        }
    }
}

impl TemplateClock {
    /// Name of the date in fingerprints. Empty for the clock, which training does not use.
    pub fn name(self) -> String {
        match self {
            TemplateClock::Fixed(date) => date.to_string(),
            TemplateClock::Record => "record".into(),
            TemplateClock::Clock(_) => String::new(),
        }
    }
}

/// A chat template with the special tokens that it may use.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: Arc<str>,
    /// Special tokens by variable name, such as `bos_token`.
    tokens: Vec<(&'static str, String)>,
    date: Option<TemplateClock>,
}

impl ChatTemplate {
    /// Creates a template from its source in a model folder.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Self {
        let tokens = [
            ("bos_token", Some(bos_token)),
            ("eos_token", Some(eos_token)),
        ];
        Self::with_tokens(source, tokens)
    }

    /// Creates a template with the text of each special token of the model.
    pub fn with_tokens<'a>(
        source: &str,
        tokens: impl IntoIterator<Item = (&'static str, Option<&'a str>)>,
    ) -> Self {
        let tokens = tokens.into_iter();
        let tokens = tokens.filter_map(|(name, token)| Some((name, token?.to_owned())));
        Self {
            source: without_generation_tags(source).into(),
            tokens: tokens.collect(),
            date: None,
        }
    }

    /// Sets the source of the date that `strftime_now` returns. A template that calls `strftime_now` can be rendered
    /// only with [`TemplateClock::Fixed`]; `Self::with_date` replaces the other sources by it.
    pub fn set_date(&mut self, date: TemplateClock) {
        self.date = Some(date);
    }

    pub(crate) fn clear_date(&mut self) {
        self.date = None;
    }

    /// Returns the template with the date of a conversation: the fixed date, the current time, or `date`, the date of
    /// the conversation's record.
    pub(crate) fn with_date(&self, date: Option<DateTime>) -> Cow<'_, ChatTemplate> {
        let date = match (self.date, date) {
            (Some(TemplateClock::Record), Some(date)) => date,
            (Some(TemplateClock::Clock(now)), _) => now(),
            _ => return Cow::Borrowed(self),
        };
        Cow::Owned(ChatTemplate {
            date: Some(TemplateClock::Fixed(date)),
            ..self.clone()
        })
    }

    /// Renders a conversation as one text.
    ///
    /// # Errors
    /// If the template is invalid, rejects the conversation, or exceeds its limits of work or memory.
    pub fn render_text(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let input_bytes = messages
            .iter()
            .map(|message| message.role.len() + message.content.len())
            .sum();
        let context = context! {
            messages => messages.iter().map(as_value).collect::<Vec<_>>(),
            add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from_pairs(self.tokens.iter().map(|(name, token)| (*name, token.as_str())))
        };
        sandbox::render(
            &self.source,
            context,
            messages.len(),
            input_bytes,
            match self.date {
                Some(TemplateClock::Fixed(date)) => Some(date),
                _ => None,
            },
        )
        .map_err(|e| anyhow!("the chat template failed: {e}"))
    }

    /// Renders a conversation as spans. Their concatenated texts equal [`Self::render_text`].
    ///
    /// # Errors
    /// As [`Self::render_text`], and if the template does more to a content than strip white space, for example if it
    /// changes the case.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<RenderedSpan>> {
        let unmarked = self.render_text(messages, add_generation_prompt)?;
        let marker_start = marker_start(messages);
        // A template may omit an empty message, but would print its marker. The second attempt therefore leaves empty
        // contents empty.
        for mark_empty in [true, false] {
            let mut parts = Vec::new();
            let marked_messages: Vec<Message> = messages
                .iter()
                .enumerate()
                .map(|(message, Message { role, content })| {
                    let mut marked_content = String::new();
                    for part in split_thinking(role, content) {
                        if part.is_tag || part.text.is_empty() && !mark_empty {
                            marked_content.push_str(part.text);
                        } else {
                            marked_content
                                .push_str(&format!("{marker_start}{}{MARKER_LAST}", parts.len()));
                            parts.push((message, part.text));
                        }
                    }
                    Message::new(role.as_str(), marked_content)
                })
                .collect();
            let marked = self.render_text(&marked_messages, add_generation_prompt)?;
            if let Some(spans) = split_at_markers(&unmarked, &marked, &marker_start, &parts) {
                return Ok(spans);
            }
        }
        bail!("the chat template changes the text of a message other than by stripping white space")
    }
}

/// First and last character of a marker: private-use characters, which no template searches for.
const MARKER_FIRST: char = '\u{F8F0}';
const MARKER_LAST: char = '\u{F8F1}';

/// Returns the start of every marker; a number and [`MARKER_LAST`] follow it. No message contains this start, because
/// it contains the hash of all messages.
fn marker_start(messages: &[Message]) -> String {
    let mut hasher = blake3::Hasher::new();
    for message in messages {
        hasher.update(message.role.as_bytes());
        hasher.update(b"\0");
        hasher.update(message.content.as_bytes());
        hasher.update(b"\0");
    }
    format!("{MARKER_FIRST}{}-", hasher.finalize().to_hex())
}

/// Part of a message: text, or a thinking tag with the white space around it.
struct ContentPart<'a> {
    text: &'a str,
    is_tag: bool,
}

/// The opening and the closing tag of thinking.
pub(crate) const THINKING_TAGS: (&str, &str) = ("<think>", "</think>");

/// Splits a message of the assistant that begins with thinking into four parts: opening tag, thinking, closing tag, and
/// the answer after it. They are separate because some templates parse, move or drop thinking. Any other message is one
/// part.
fn split_thinking<'a>(role: &str, content: &'a str) -> Vec<ContentPart<'a>> {
    let text = |text: &'a str| ContentPart {
        text,
        is_tag: false,
    };
    let tag = |text: &'a str| ContentPart { text, is_tag: true };
    match find_thinking(content).filter(|_| role == "assistant") {
        Some(ThinkingBlock { inner, answer }) => vec![
            tag(&content[..inner.start]),
            text(&content[inner.clone()]),
            tag(&content[inner.end..answer]),
            text(&content[answer..]),
        ],
        None => vec![text(content)],
    }
}

/// Thinking at the beginning of a message.
struct ThinkingBlock {
    /// Byte range of the text between the tags, without line breaks at its ends.
    inner: Range<usize>,
    /// Offset of the answer after the thinking.
    answer: usize,
}

/// Finds thinking at the beginning of a message, between its tags. The opening tag is missing if the prompt ends with
/// it; the closing tag is missing in an answer that was truncated.
fn find_thinking(content: &str) -> Option<ThinkingBlock> {
    let (open, close) = THINKING_TAGS;
    let trimmed = content.trim_start();
    let opened = trimmed.strip_prefix(open);
    let inside = opened.unwrap_or(trimmed);
    let (inside, answer) = match inside.split_once(close) {
        Some((before, after)) if opened.is_none() => {
            // Without the opening tag, the closing tag must be a line of its own: other text may mention it.
            let is_own_line = (before.is_empty() || before.ends_with('\n'))
                && (after.is_empty() || after.starts_with(['\n', '\r']));
            if !is_own_line || before.contains(open) {
                return None;
            }
            (before, after)
        }
        Some(parts) => parts,
        None => (opened?, ""),
    };
    let line_breaks = ['\n', '\r'];
    let inside_start = opened.map_or(0, |_| open.len()) + content.len() - trimmed.len();
    let start = inside_start + inside.len() - inside.trim_start_matches(line_breaks).len();
    let inner = inside.trim_matches(line_breaks);
    Some(ThinkingBlock {
        inner: start..start + inner.len(),
        answer: content.len() - answer.trim_start().len(),
    })
}

/// Returns the offset of the answer in a message: after the thinking, or 0 in a message without thinking.
pub(crate) fn answer_start(content: &str) -> usize {
    find_thinking(content).map_or(0, |thinking| thinking.answer)
}

/// Splits an answer that begins with thinking, as a model writes it, into four spans: tag, thinking, tag, answer. None
/// for any other message.
pub(crate) fn thinking_spans(message: usize, content: &str) -> Option<[RenderedSpan; 4]> {
    let parts = split_thinking("assistant", content);
    let spans = parts.into_iter().map(|part| {
        let text = part.text.to_owned();
        if part.is_tag {
            RenderedSpan::Template(text)
        } else {
            RenderedSpan::Content { message, text }
        }
    });
    spans.collect::<Vec<_>>().try_into().ok()
}

/// Splits `unmarked` at the places of the markers in `marked`, which hold indices into `parts` (message index and
/// text). Returns None if the template changed a part other than by stripping white space, or the renderings differ
/// outside the parts.
fn split_at_markers(
    unmarked: &str,
    marked: &str,
    marker_start: &str,
    parts: &[(usize, &str)],
) -> Option<Vec<RenderedSpan>> {
    let mut pieces = marked.split(marker_start);
    let first = pieces.next().unwrap_or_default();
    let mut remaining = unmarked.strip_prefix(first)?;
    let mut spans = Vec::new();
    push_template(&mut spans, first);
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        let (number, template) = piece.split_once(MARKER_LAST)?;
        let &(message, content) = parts.get(number.parse::<usize>().ok()?)?;
        let is_last = pieces.peek().is_none();
        let (text, after) = printed_forms(content).into_iter().find_map(|form| {
            let after = remaining.strip_prefix(form)?.strip_prefix(template)?;
            (!is_last || after.is_empty()).then_some((form, after))
        })?;
        spans.push(RenderedSpan::Content {
            message,
            text: text.into(),
        });
        push_template(&mut spans, template);
        remaining = after;
    }
    remaining.is_empty().then_some(spans)
}

fn push_template(spans: &mut Vec<RenderedSpan>, text: &str) {
    if !text.is_empty() {
        spans.push(RenderedSpan::Template(text.into()));
    }
}

/// Returns the forms in which templates print a content: unchanged, or without white space at its ends.
fn printed_forms(content: &str) -> [&str; 7] {
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

/// Replaces the `generation` tags of `transformers`, which mark the assistant's part and print nothing, by an `if` that
/// is always true. An `if` strips the same white space.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut remaining = source;
    while let Some(start) = remaining.find("{%") {
        let Some(length) = remaining[start..].find("%}") else {
            break;
        };
        let tag = &remaining[start + 2..start + length];
        out.push_str(&remaining[..start + 2]);
        match tag.trim_matches(['-', '+', ' ', '\t', '\n']) {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        remaining = &remaining[start + length..];
    }
    out.push_str(remaining);
    out
}

fn as_value(message: &Message) -> Value {
    Value::from_pairs([
        ("role", message.role.as_str()),
        ("content", message.content.as_str()),
    ])
}
