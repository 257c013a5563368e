//! Parses the lines of output and error files: the row of a line, and its result. Pure.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::braces::object_end;
use crate::client::attempt_error::{AttemptError, EndpointRefusal, RefusalReason, RowFailure};
use crate::client::batch_object::BatchFileError;
use crate::client::outcome;
use crate::client::response::completion::{Completion, mentions_choices};
use crate::client::response::error::{ApiError, is_error};
use crate::client::response::json;
use crate::client::transport::HttpReply;

/// Result of a row.
pub(crate) struct RowResult {
    pub custom_id: String,
    pub result: Result<Box<Completion>, AttemptError>,
}

/// Line of an output or error file.
#[derive(Deserialize)]
struct ResultLine<'a> {
    custom_id: String,
    #[serde(borrow, default)]
    response: Option<&'a RawValue>,
    #[serde(borrow, default)]
    result: Option<&'a RawValue>,
    #[serde(default)]
    error: Value,
}

/// Response to a row.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Response<'a> {
    status_code: Value,
    status: Value,
    /// Parsed like the body of a real-time reply.
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// Parses a line into the results of its rows: usually one row, but some servers write several rows on a line. An item
/// is None if it names no row.
pub(crate) fn parse_line(line: &Bytes) -> Vec<Option<RowResult>> {
    match parse_strict_row(line) {
        Some(row_result) => vec![Some(row_result)],
        None => split_rows(line).iter().map(parse_row).collect(),
    }
}

/// JSON name, with quotes, of the field that identifies the row.
pub(super) const CUSTOM_ID: &[u8] = b"\"custom_id\"";

/// Maximum nesting depth of a row within a line.
const MAX_DEPTH: usize = 5;

/// Splits a line into rows: items of a list, consecutive objects, or fields of an object, with any text between them.
/// Invalid JSON is repaired.
fn split_rows(line: &Bytes) -> Vec<Bytes> {
    let mut rows = Vec::new();
    let mut position = 0;
    while let Some(brace) = memchr::memchr(b'{', &line[position..]) {
        let start = position + brace;
        let remaining = line.slice(start..);
        let mut strict = serde_json::Deserializer::from_slice(&remaining).into_iter::<&RawValue>();
        if let Some(Ok(value)) = strict.next() {
            rows.extend(rows_in(&remaining, value));
            position = start + strict.byte_offset();
        } else if let Some(end) = object_end(&remaining) {
            rows.extend(repaired_rows(&remaining.slice(..end)));
            position = start + end;
        } else if is_before(CUSTOM_ID, b'{', &remaining[1..]) {
            // The row is truncated.
            rows.extend(split_at_braces(&remaining));
            break;
        } else {
            // The list or object around the rows is truncated.
            position = start + 1;
        }
    }
    if rows.is_empty() {
        rows.push(line.clone());
    }
    rows
}

/// Splits an object that is not strict JSON into rows.
fn repaired_rows(object: &Bytes) -> Vec<Bytes> {
    let Ok(text) = json::repaired(object).map(Bytes::from) else {
        return split_at_braces(object);
    };
    let rows = serde_json::from_slice(&text).map(|value| rows_in(&text, value));
    rows.ok()
        .filter(|rows| !rows.is_empty())
        .unwrap_or_else(|| split_at_braces(object))
}

/// Returns the rows in a value, which is a slice of `text`.
fn rows_in(text: &Bytes, value: &RawValue) -> Vec<Bytes> {
    let mut rows = Vec::new();
    add_rows(value, MAX_DEPTH, &mut rows);
    rows.into_iter()
        .map(|row| text.slice_ref(row.get().as_bytes()))
        .collect()
}

/// Returns true if `text` contains `first` before the first `byte`.
fn is_before(first: &[u8], byte: u8, text: &[u8]) -> bool {
    let end = memchr::memchr(byte, text).unwrap_or(text.len());
    memchr::memmem::find(&text[..end], first).is_some()
}

/// Adds the rows in a value. A row is an object with an id and an outcome; other objects may repeat the id.
fn add_rows<'a>(value: &'a RawValue, depth: usize, rows: &mut Vec<&'a RawValue>) {
    const OUTCOMES: [&str; 4] = ["response", "result", "error", "choices"];
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    if let Ok(items) = serde_json::from_str::<Vec<&RawValue>>(value.get()) {
        items
            .into_iter()
            .for_each(|item| add_rows(item, depth, rows));
    } else if let Ok(fields) =
        serde_json::from_str::<BTreeMap<Cow<'_, str>, &RawValue>>(value.get())
    {
        let has_outcome = OUTCOMES.iter().any(|name| fields.contains_key(*name));
        if has_outcome && fields.contains_key("custom_id") {
            rows.push(value);
        } else {
            fields
                .into_values()
                .for_each(|field| add_rows(field, depth, rows));
        }
    }
}

/// Splits a text at its braces, because it cannot be repaired into JSON.
fn split_at_braces(line: &Bytes) -> Vec<Bytes> {
    let mut rows = Vec::new();
    let mut position = 0;
    while let Some(brace) = memchr::memchr(b'{', &line[position..]) {
        let start = position + brace;
        let remaining = &line[start..];
        let ids: Vec<usize> = memchr::memmem::find_iter(remaining, CUSTOM_ID)
            .take(2)
            .collect();
        let end = object_end(remaining).unwrap_or(remaining.len());
        match ids[..] {
            // The object has several rows, or its first row is truncated.
            [first, second] if second < end => {
                let inner = brace_before(remaining, first);
                if inner > 0 {
                    position = start + inner;
                    continue;
                }
                let next = brace_before(remaining, second).max(1);
                rows.push(line.slice(start..start + next));
                position = start + next;
            }
            _ => {
                rows.push(line.slice(start..start + end));
                position = start + end;
            }
        }
    }
    if rows.is_empty() {
        rows.push(line.clone());
    }
    rows
}

/// Finds the opening brace of the object whose field is at `field`: the nearest brace before it if no closing brace
/// lies between, otherwise the nearest one that does not begin the value of a field. Returns 0 if none is found.
fn brace_before(text: &[u8], field: usize) -> usize {
    let mut end = field;
    if let Some(brace) = memchr::memrchr(b'{', &text[..field])
        && !text[brace..field].contains(&b'}')
    {
        return brace;
    }
    while let Some(brace) = memchr::memrchr(b'{', &text[..end]) {
        let before = text[..brace].trim_ascii_end().last();
        // The brace begins the text, an item of a list or the next object: it is not the value of a field.
        if matches!(before, None | Some(b'[' | b',' | b'}' | b']'))
            || !text[..brace].contains(&b':')
        {
            return brace;
        }
        end = brace;
    }
    0
}

/// Parses one row into its result, after a repair if it is not strict JSON. None if it has no id.
fn parse_row(line: &Bytes) -> Option<RowResult> {
    if let Some(row_result) = parse_strict_row(line) {
        return Some(row_result);
    }
    let repaired = json::repaired(line).ok().map(Bytes::from);
    repaired
        .and_then(|line| parse_strict_row(&line))
        .or_else(|| {
            let unreadable = AttemptError::Unreadable {
                problem: "a line of a batch that is not JSON".into(),
                body: line.clone(),
            };
            Some(RowResult {
                custom_id: custom_id(line)?,
                result: Err(unreadable),
            })
        })
}

/// Finds the id of the row in a line that is not JSON.
fn custom_id(line: &[u8]) -> Option<String> {
    let after_name = &line[memchr::memmem::find(line, CUSTOM_ID)? + CUSTOM_ID.len()..];
    let value = after_name
        .trim_ascii_start()
        .strip_prefix(b":")?
        .trim_ascii_start();
    match json::value(value).ok()? {
        Value::String(id) => Some(id),
        _ => None,
    }
}

/// Parses a row of strict JSON. None for any other text.
fn parse_strict_row(line: &Bytes) -> Option<RowResult> {
    let ResultLine {
        custom_id,
        response,
        result,
        error,
    } = serde_json::from_slice(line).ok()?;
    let (status, body) = match response.or(result) {
        Some(response) => reply(response),
        None => (0, &line[..]),
    };
    let status = match status {
        0 if mentions_choices(body) => 200,
        status => status,
    };
    let result = if status > 0 {
        let body = line.slice_ref(body);
        // The time affects only the requested wait, which rows of a batch do not use.
        let reply = HttpReply::without_headers(status, body);
        outcome::classify(Ok(reply), SystemTime::UNIX_EPOCH)
    } else {
        Err(classify_without_response(&error))
    };
    Some(RowResult { custom_id, result })
}

/// Returns the status of a response (0 if missing) and its body (the response itself if missing).
fn reply(response: &RawValue) -> (u16, &[u8]) {
    let fields: Response = serde_json::from_str(response.get()).unwrap_or_default();
    let code = |value: &Value| -> Option<u16> {
        let code = value
            .as_f64()
            .or_else(|| value.as_str()?.trim().parse().ok())?;
        (100.0..600.0).contains(&code).then_some(code as u16)
    };
    let status = code(&fields.status_code).or_else(|| code(&fields.status));
    let body = fields.body.unwrap_or(response);
    (status.unwrap_or(0), body.get().as_bytes())
}

/// Classifies a row without a response by the code of its error.
fn classify_without_response(error: &Value) -> AttemptError {
    if !is_error(error) {
        // The row may have been run.
        return crate::client::attempt_error::possibly_billed("no answer in the batch", "");
    }
    let error = &ApiError::from_value(error);
    let class = match error.code.as_str() {
        "" => "no answer in the batch",
        code => code,
    };
    let failure = RowFailure::new(class, &error.message);
    if let Some(reason) = crate::client::refusal_reason::refusal_reason(error, false) {
        return AttemptError::EndpointRefused(EndpointRefusal { reason, failure });
    }
    if error.is_content_filter() {
        return AttemptError::Filtered(failure);
    }
    if is_row_specific(error) {
        AttemptError::Refused(failure)
    } else {
        AttemptError::Transient {
            failure,
            wait: std::time::Duration::ZERO,
        }
    }
}

/// Returns true if the code or type of the error means that the row can never be answered. Other codes, such as
/// `server_error` and `batch_expired`, are transient.
fn is_row_specific(error: &ApiError) -> bool {
    ["invalid", "content", "context", "unsupported", "policy"]
        .iter()
        .any(|word| error.code.contains(word) || error.kind.contains(word))
}

/// Reason why a batch failed as a whole.
#[derive(Debug, Default)]
pub(crate) struct BatchFailure {
    /// Some if more tokens are enqueued than the account allows; the inner value is the limit, if stated.
    pub over_tokens: Option<Option<u64>>,
    /// Reason and message of an error that says that no batch can succeed.
    pub endpoint_refusal: Option<(RefusalReason, String)>,
    /// Index, from 0, and failure of each line of the input file that the endpoint refuses.
    pub lines: Vec<(usize, RowFailure)>,
    /// First error message, or a text that says that the endpoint gave no reason.
    pub message: String,
}

/// Classifies the errors of a failed batch.
pub(crate) fn classify_batch_failure(errors: &[BatchFileError]) -> BatchFailure {
    let mut batch_failure = BatchFailure {
        message: "no reason given".into(),
        ..BatchFailure::default()
    };
    for (index, BatchFileError { error, line }) in errors.iter().enumerate() {
        let failure = RowFailure::new(error.code.as_str(), &error.message);
        if index == 0 {
            batch_failure.message = failure.message.clone();
        }
        if error.code == "token_limit_exceeded" {
            batch_failure.over_tokens = Some(stated_limit(&error.message));
        } else if let Some(reason) = crate::client::refusal_reason::refusal_reason(error, false) {
            let refusal = (reason, failure.message);
            batch_failure.endpoint_refusal.get_or_insert(refusal);
        } else if let Some(line) = line.and_then(|line| usize::try_from(line).ok()?.checked_sub(1))
        {
            batch_failure.lines.push((line, failure));
        }
    }
    batch_failure
}

/// Parses the number in "Limit: 90,000 enqueued tokens".
fn stated_limit(message: &str) -> Option<u64> {
    let (_, after) = message.split_once("Limit: ")?;
    let digits = after.chars().take_while(|char| !char.is_whitespace());
    let digits: String = digits.filter(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests;
