//! Lines of both sources, a cache and a file of conversations, as rows of one type.

use anyhow::{Context, Result, bail};
use jiff::civil::DateTime;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::cache::logprobs_view::LogprobsView;
use crate::cache::record::{Record, Status, is_truncated};
use crate::cache::view::RecordView;
use crate::config::{self, Thinking};
use crate::data::groups::{ExclusionReason, Group, RecordProperties, Selection};
use crate::data::sampling::SamplingKind;
use crate::prompt::message::Message;
use crate::tokenizer::chat_template::answer_start;

/// A conversation that ends in an answer.
pub(crate) struct TrainingRow<'a> {
    /// Cache key, or line number in a file; with `:N` for the answer in message N.
    pub key: String,
    /// Index of the answer in `messages`, if the row was made by [`Self::up_to`].
    pub message: Option<usize>,
    /// Rows with the same id are either all for training or all for validation.
    pub prompt_id: String,
    pub messages: Vec<Message>,
    /// True if every answer is supervised, false if only the last one is. The earlier answers of a record, such as
    /// few-shot examples, are part of its prompt.
    pub every_answer: bool,
    /// False if the answer was truncated at its maximum length. The student must not learn to end there.
    pub is_complete: bool,
    /// How the last answer was sampled.
    pub sampling: SamplingKind,
    /// `top_logprobs` of the request.
    pub top_logprobs: Option<usize>,
    /// None in a file.
    pub group: Option<Group>,
    /// Time of the request; None in a file.
    pub date: Option<DateTime>,
    /// True if the record has reasoning in a separate field, which `messages` do not contain.
    pub has_reasoning: bool,
    /// Logprobs of the last answer.
    pub logprobs: Option<LogprobsView<'a>>,
}

impl<'a> TrainingRow<'a> {
    /// Returns a row that supervises only the earlier answer `message`.
    pub(crate) fn up_to(&self, message: usize) -> TrainingRow<'a> {
        TrainingRow {
            key: self.key_of(message),
            message: Some(message),
            prompt_id: self.prompt_id.clone(),
            messages: self.messages[..=message].to_vec(),
            every_answer: false,
            is_complete: true,
            sampling: SamplingKind::Unknown,
            top_logprobs: None,
            group: None,
            date: self.date,
            has_reasoning: false,
            logprobs: None,
        }
    }

    /// Returns the key of the row for the earlier answer `message`.
    pub(crate) fn key_of(&self, message: usize) -> String {
        format!("{}:{message}", self.key)
    }
}

/// A row that was left out.
#[derive(Debug)]
pub(crate) struct SkippedRow {
    pub key: String,
    pub prompt_id: String,
    /// None in a file.
    pub group: Option<Group>,
    /// Set if the row is not selected.
    pub exclusion: Option<ExclusionReason>,
    pub reason: String,
}

/// Removes thinking from the beginning of answers if `data.thinking` is `drop`.
fn drop_thinking(messages: &mut [Message], settings: &config::DataConfig) {
    if settings.thinking == Thinking::Drop {
        let answers = messages.iter_mut();
        for answer in answers.filter(|message| message.role == "assistant") {
            answer.content.drain(..answer_start(&answer.content));
        }
    }
}

/// Converts a record to a row.
///
/// # Errors
/// The skipped row with the reason, if the record is left out.
pub(crate) fn from_record<'a>(
    record: RecordView<'a>,
    settings: &config::DataConfig,
    selection: &Selection,
) -> Result<TrainingRow<'a>, Box<SkippedRow>> {
    let params = record.params();
    let properties = RecordProperties::from_view(&record, &params);
    let selected = selection.check(&properties);
    let key = record.key.clone();
    let prompt_id = record.prompt_id.clone();
    let group = properties.group;
    let row = match selected {
        Ok(()) => row(record, &params, settings),
        Err(exclusion) => Err(exclusion.to_string()),
    };
    match row {
        Ok(row) => Ok(TrainingRow {
            group: Some(group),
            ..row
        }),
        Err(reason) => Err(Box::new(SkippedRow {
            key,
            prompt_id,
            group: Some(group),
            exclusion: selected.err(),
            reason,
        })),
    }
}

fn row<'a>(
    mut record: RecordView<'a>,
    params: &Value,
    settings: &config::DataConfig,
) -> Result<TrainingRow<'a>, String> {
    check_answer(record.status, &record.answer.finish_reason, settings)?;
    let sampling = SamplingKind::from_params(params);
    let date = record.sent_at();
    let top_logprobs = params["top_logprobs"].as_u64();
    // If a message has other fields, or its content is not a string, the messages are in the parameters.
    let messages = record.take_messages();
    let messages =
        messages.or_else(|params| messages_of_request(&params).ok_or(NO_TEXT.to_owned()));
    let mut messages = messages?;
    let is_complete = !is_truncated(&record.answer.finish_reason);
    messages.push(Message {
        role: "assistant".into(),
        content: record.answer.text,
    });
    drop_thinking(&mut messages, settings);
    Ok(TrainingRow {
        key: record.key,
        message: None,
        prompt_id: record.prompt_id,
        messages,
        every_answer: false,
        is_complete,
        sampling,
        top_logprobs: top_logprobs.and_then(|count| usize::try_from(count).ok()),
        group: None,
        date,
        has_reasoning: !record.answer.reasoning.trim().is_empty(),
        logprobs: record.logprobs,
    })
}

/// Returns the prompt of a record.
///
/// # Errors
/// The reason, if the answer is left out or a message is not text. The selection of records is not checked.
pub(crate) fn prompt_of(
    record: &Record,
    settings: &config::DataConfig,
) -> Result<Vec<Message>, String> {
    check_answer(record.status, &record.answer.finish_reason, settings)?;
    messages_of_request(&record.request).ok_or_else(|| NO_TEXT.into())
}

/// Reason to leave out a record whose prompt is not only text, but contains images, for example.
const NO_TEXT: &str = "the request has messages that are not text";

/// Checks status and finish reason of an answer.
///
/// # Errors
/// The reason, if the answer is left out.
fn check_answer(
    status: Status,
    finish_reason: &str,
    settings: &config::DataConfig,
) -> Result<(), String> {
    if status != Status::Ok {
        return Err("quarantined".into());
    }
    let mut accepted = settings.keep_finish_reasons.iter();
    if accepted.any(|reason| reason == finish_reason) {
        Ok(())
    } else {
        Err(format!(
            "finish_reason `{finish_reason}` is not in `data.keep_finish_reasons`"
        ))
    }
}

fn messages_of_request(request: &Value) -> Option<Vec<Message>> {
    let messages = request["messages"].as_array()?;
    messages
        .iter()
        .map(|message| {
            let content = match &message["content"] {
                Value::String(text) => text.clone(),
                Value::Array(parts) => parts
                    .iter()
                    .map(|part| part["text"].as_str())
                    .collect::<Option<_>>()?,
                _ => return None,
            };
            Some(Message {
                role: message["role"].as_str()?.into(),
                content,
            })
        })
        .collect()
}

/// Line of a file of conversations. Unknown fields are ignored unless [`check_fields`] refuses them.
#[derive(Deserialize)]
#[serde(expecting = "a conversation: an object with `messages`")]
struct ConversationLine {
    id: Option<Value>,
    messages: Vec<MessageLine>,
    #[serde(flatten)]
    other_fields: Map<String, Value>,
}

/// Message of a line, with its other fields.
#[derive(Deserialize)]
struct MessageLine {
    #[serde(flatten)]
    message: Message,
    #[serde(flatten)]
    other_fields: Map<String, Value>,
}

/// Fields of rows and messages for tool calls, as other programs and servers name them.
const TOOL_FIELDS: [&str; 4] = ["tools", "functions", "tool_calls", "function_call"];
/// Fields of messages for reasoning. Rows may have fields of these names, because they may be flags there.
const REASONING_FIELDS: [&str; 5] = [
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking",
    "thought",
];

/// Refuses fields that are not supported and would change what is trained.
fn check_fields(fields: &Map<String, Value>, is_message: bool) -> Result<()> {
    let is_set = |value: &Value| !(value.is_null() || *value == "" || *value == json!([]));
    for (name, _) in fields.iter().filter(|(_, value)| is_set(value)) {
        if TOOL_FIELDS.contains(&name.as_str()) {
            bail!("`{name}` is not supported: render it into the text of a message");
        }
        if is_message && REASONING_FIELDS.contains(&name.as_str()) {
            bail!(
                "`{name}` is not supported: put reasoning at the beginning of `content`, between <think> and </think>"
            );
        }
    }
    if fields
        .get("weight")
        .is_some_and(|weight| is_set(weight) && weight.as_f64() != Some(1.0))
    {
        bail!(
            "`weight` other than 1 is not supported: leave the answer out, or shorten the conversation"
        );
    }
    Ok(())
}

/// Parses line `number`, from 1, of a JSONL file of `{"messages": [{"role", "content"}, ...]}`.
///
/// # Errors
/// If the line is not such a row.
pub(crate) fn from_line(
    line: &str,
    number: u64,
    settings: &config::DataConfig,
) -> Result<TrainingRow<'static>> {
    let line: ConversationLine = serde_json::from_str(line)
        .context(r#"expected {"messages": [{"role": "...", "content": "..."}, ...]}"#)?;
    check_fields(&line.other_fields, false)?;
    for message in &line.messages {
        check_fields(&message.other_fields, true)?;
    }
    let messages = line.messages.into_iter().map(|line| line.message);
    let mut messages: Vec<Message> = messages.collect();
    let last = messages.iter().rposition(|m| m.role == "assistant");
    let last = last.context("the conversation has no message of the role `assistant`")?;
    // Later messages are not trained on, and some templates render an answer differently if messages follow.
    messages.truncate(last + 1);
    drop_thinking(&mut messages, settings);
    let prompt_id = match line.id {
        Some(Value::String(id)) => id,
        Some(id) => id.to_string(),
        None => {
            let prompt = serde_json::to_vec(&messages[..last])?;
            blake3::hash(&prompt).to_hex().to_string()
        }
    };
    Ok(TrainingRow {
        key: number.to_string(),
        message: None,
        prompt_id,
        messages,
        every_answer: true,
        is_complete: true,
        sampling: SamplingKind::Unknown,
        top_logprobs: None,
        group: None,
        date: None,
        has_reasoning: false,
        logprobs: None,
    })
}
