//! The two sources of training data, a cache and a file of conversations, as rows of one kind.

use anyhow::{Context, Result, bail};
use jiff::civil::DateTime;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::cache::logprobs_view::LogprobsView;
use crate::cache::record::{Record, Status};
use crate::cache::view::RecordView;
use crate::config::{self, Thinking};
use crate::data::groups::{Candidate, Difference, Group, Selection};
use crate::data::sampling::Sampling;
use crate::prompt::message::Message;
use crate::tokenizer::chat_template::answer_start;

/// A conversation that ends in an answer.
pub(crate) struct Row<'a> {
    /// Names the row in errors.
    pub key: String,
    /// Index of its answer, if the row is an earlier answer of a conversation.
    pub message: Option<usize>,
    /// Rows with the same id land on the same side of the split.
    pub prompt_id: String,
    pub messages: Vec<Message>,
    /// Is every answer to be learnt, or only the last? A prompt's few-shot examples were not said
    /// by the teacher.
    pub every_answer: bool,
    /// Did the teacher end its answer? If it was cut off, the student must not learn to end there.
    pub ended: bool,
    /// How the last answer was drawn.
    pub sampling: Sampling,
    /// `top_logprobs` of the request.
    pub asked: Option<usize>,
    /// None in a file.
    pub group: Option<Group>,
    /// When the answer was requested; None in a file.
    pub date: Option<DateTime>,
    /// The record has reasoning in a field of its own, which `messages` do not contain.
    pub has_reasoning: bool,
    /// Of the last answer.
    pub logprobs: Option<LogprobsView<'a>>,
}

impl<'a> Row<'a> {
    /// A row that supervises the earlier answer `message` alone.
    pub(crate) fn up_to(&self, message: usize) -> Row<'a> {
        Row {
            key: self.key_of(message),
            message: Some(message),
            prompt_id: self.prompt_id.clone(),
            messages: self.messages[..=message].to_vec(),
            every_answer: false,
            ended: true,
            sampling: Sampling::Unknown,
            asked: None,
            group: None,
            date: self.date,
            has_reasoning: false,
            logprobs: None,
        }
    }

    /// Key of the row of an earlier answer.
    pub(crate) fn key_of(&self, message: usize) -> String {
        format!("{}:{message}", self.key)
    }
}

/// A row that makes no example.
#[derive(Debug)]
pub(crate) struct Skipped {
    pub key: String,
    pub prompt_id: String,
    /// None in a file.
    pub group: Option<Group>,
    /// Set if it is not selected.
    pub difference: Option<Difference>,
    pub reason: String,
}

/// Removes thinking from the beginning of answers, if the settings say so.
fn drop_thinking(messages: &mut [Message], settings: &config::DataConfig) {
    if settings.thinking == Thinking::Drop {
        let answers = messages.iter_mut();
        for answer in answers.filter(|message| message.role == "assistant") {
            answer.content.drain(..answer_start(&answer.content));
        }
    }
}

/// A record as a row, or the reason to leave it out.
pub(crate) fn of_record<'a>(
    record: RecordView<'a>,
    settings: &config::DataConfig,
    selection: &Selection,
) -> Result<Row<'a>, Box<Skipped>> {
    let params = record.params();
    let candidate = Candidate::of_view(&record, &params);
    let checked = selection.check(&candidate);
    let (key, prompt_id) = (record.key.clone(), record.prompt_id.clone());
    let group = candidate.group;
    let row = match checked {
        Ok(()) => row(record, &params, settings),
        Err(difference) => Err(difference.to_string()),
    };
    match row {
        Ok(row) => Ok(Row {
            group: Some(group),
            ..row
        }),
        Err(reason) => Err(Box::new(Skipped {
            key,
            prompt_id,
            group: Some(group),
            difference: checked.err(),
            reason,
        })),
    }
}

fn row<'a>(
    mut record: RecordView<'a>,
    params: &Value,
    settings: &config::DataConfig,
) -> Result<Row<'a>, String> {
    is_wanted(record.status, &record.answer.finish_reason, settings)?;
    let sampling = Sampling::of(params);
    let date = record.sent_at();
    let asked = params["top_logprobs"].as_u64();
    let messages = record.take_messages();
    let messages =
        messages.or_else(|request| messages_of_request(&request).ok_or(NO_TEXT.to_owned()));
    let mut messages = messages?;
    let ended = !matches!(
        record.answer.finish_reason.as_str(),
        "length" | "max_tokens"
    );
    messages.push(Message {
        role: "assistant".into(),
        content: record.answer.text,
    });
    drop_thinking(&mut messages, settings);
    Ok(Row {
        key: record.key,
        message: None,
        prompt_id: record.prompt_id,
        messages,
        every_answer: false,
        ended,
        sampling,
        asked: asked.and_then(|asked| usize::try_from(asked).ok()),
        group: None,
        date,
        has_reasoning: !record.answer.reasoning.trim().is_empty(),
        logprobs: record.logprobs,
    })
}

/// What was asked in a record whose answer is to be learnt, or the reason to leave it out.
pub fn prompt_of(record: &Record, settings: &config::DataConfig) -> Result<Vec<Message>, String> {
    is_wanted(record.status, &record.answer.finish_reason, settings)?;
    messages_of_request(&record.request).ok_or_else(|| NO_TEXT.into())
}

const NO_TEXT: &str = "the request has messages that are not text";

/// The reason to leave an answer out, if there is one.
fn is_wanted(
    status: Status,
    finish_reason: &str,
    settings: &config::DataConfig,
) -> Result<(), String> {
    if status != Status::Ok {
        return Err("quarantined".into());
    }
    let mut kept = settings.keep_finish_reasons.iter();
    match kept.any(|reason| reason == finish_reason) {
        true => Ok(()),
        false => Err(format!(
            "finish_reason `{finish_reason}` is not in `data.keep_finish_reasons`"
        )),
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

/// A line of a file of conversations; other fields are for other programs.
#[derive(Deserialize)]
struct Line {
    id: Option<Value>,
    messages: Vec<Turn>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// A message with its other fields.
#[derive(Deserialize)]
struct Turn {
    #[serde(flatten)]
    message: Message,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Fields of rows and messages that would change how these are trained, as programs and servers name them.
const TOOLS: [&str; 4] = ["tools", "functions", "tool_calls", "function_call"];
/// Of messages alone: a row may say so that it has some.
const REASONING: [&str; 5] = [
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking",
    "thought",
];

/// Refuses fields that are not supported, rather than training on something else.
fn check(fields: &Map<String, Value>, is_message: bool) -> Result<()> {
    let is_set = |value: &Value| !(value.is_null() || *value == "" || *value == json!([]));
    for (name, _) in fields.iter().filter(|(_, value)| is_set(value)) {
        if TOOLS.contains(&name.as_str()) {
            bail!("`{name}` is not supported: render it into the text of a message");
        }
        if is_message && REASONING.contains(&name.as_str()) {
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
            "`weight` other than 1 is not supported: leave the answer out, or cut the conversation"
        );
    }
    Ok(())
}

/// Line `number`, from 1, of a JSONL file of `{"messages": [{"role", "content"}, ...]}`.
///
/// # Errors
/// If it is no such row.
pub(crate) fn of_line(
    line: &str,
    number: u64,
    settings: &config::DataConfig,
) -> Result<Row<'static>> {
    let line: Line = serde_json::from_str(line)
        .context(r#"expected {"messages": [{"role": "...", "content": "..."}, ...]}"#)?;
    check(&line.others, false)?;
    for turn in &line.messages {
        check(&turn.others, true)?;
    }
    let messages = line.messages.into_iter().map(|turn| turn.message);
    let mut messages: Vec<Message> = messages.collect();
    let last = messages.iter().rposition(|m| m.role == "assistant");
    let last = last.context("the conversation has no message of the role `assistant`")?;
    // Nothing is learnt from what follows, and some templates render the answer in another way before it.
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
    Ok(Row {
        key: number.to_string(),
        message: None,
        prompt_id,
        messages,
        every_answer: true,
        ended: true,
        sampling: Sampling::Unknown,
        asked: None,
        group: None,
        date: None,
        has_reasoning: false,
        logprobs: None,
    })
}
