//! Reads the lines of input files and writes the lines of result files. Pure.

use std::collections::HashSet;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::mock::chat::ParsedChat;
use crate::mock::script::Script;

/// Maximum number of validation errors that a batch reports.
const MAX_ERRORS: usize = 100;

/// A request: one line of the input file.
#[derive(Debug)]
pub(crate) struct BatchRow {
    pub custom_id: String,
    pub body: Bytes,
    /// Number of tokens that count towards `batch.enqueued_tokens`: those of the prompt, plus `max_tokens` or its
    /// default for each of `n` choices; 0 if the body is invalid.
    pub tokens: u64,
}

/// Returns the number of tokens of all rows. It saturates, because a client may send any `max_tokens`.
pub(crate) fn total_tokens(rows: &[BatchRow]) -> u64 {
    let tokens = rows.iter().map(|row| row.tokens);
    tokens.fold(0, u64::saturating_add)
}

#[derive(Deserialize)]
struct InputLine<'a> {
    custom_id: Option<String>,
    method: Option<String>,
    url: Option<String>,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// Reads an input file. Returns the rows and the entries of `errors.data`. The batch fails if there is an error.
pub(crate) fn parse_input_file(
    file: &Bytes,
    endpoint: &str,
    script: &Script,
) -> (Vec<BatchRow>, Vec<Value>) {
    let mut errors = Vec::new();
    let mut rows = Vec::new();
    let mut ids = HashSet::new();
    if file.len() > script.batch.max_bytes {
        let message = format!("The file has more than {} bytes.", script.batch.max_bytes);
        errors.push(error_entry("file_too_large", None, None, &message));
    }
    // Only a newline ends a line: JSON strings may contain U+2028.
    for (index, text) in file.split(|byte| *byte == b'\n').enumerate() {
        if text.trim_ascii().is_empty() {
            continue;
        }
        match read_line(file, text, endpoint, script) {
            Ok(row) if !ids.insert(row.custom_id.clone()) => {
                let message = format!("The custom_id '{}' is used twice.", row.custom_id);
                let line = Some(index + 1);
                errors.push(error_entry(
                    "duplicate_custom_id",
                    line,
                    Some("custom_id"),
                    &message,
                ));
            }
            Ok(row) => rows.push(row),
            Err((code, param, message)) => {
                errors.push(error_entry(code, Some(index + 1), param, &message));
            }
        }
    }
    if rows.is_empty() && errors.is_empty() {
        errors.push(error_entry(
            "empty_file",
            None,
            None,
            "The input file is empty.",
        ));
    }
    if rows.len() > script.batch.max_rows {
        let message = format!("The file has more than {} requests.", script.batch.max_rows);
        errors.push(error_entry("too_many_requests", None, None, &message));
    }
    errors.truncate(MAX_ERRORS);
    (rows, errors)
}

/// Code, parameter and message of an error in a line.
type LineError = (&'static str, Option<&'static str>, String);

fn read_line(
    file: &Bytes,
    text: &[u8],
    endpoint: &str,
    script: &Script,
) -> Result<BatchRow, LineError> {
    let line: InputLine = serde_json::from_slice(text).map_err(|_| {
        let message = "This line is not parseable as valid JSON.".to_string();
        ("invalid_json_line", None, message)
    })?;
    let missing = |param: &'static str| {
        let message = format!("Missing required parameter: '{param}'.");
        ("missing_required_parameter", Some(param), message)
    };
    let custom_id = line.custom_id.ok_or_else(|| missing("custom_id"))?;
    let method = line.method.ok_or_else(|| missing("method"))?;
    let url = line.url.ok_or_else(|| missing("url"))?;
    let body = line.body.ok_or_else(|| missing("body"))?;
    if method != "POST" {
        let message = format!("Invalid method '{method}': expected POST.");
        return Err(("invalid_method", Some("method"), message));
    }
    if url != endpoint {
        let message = format!("The url '{url}' is not the batch's endpoint '{endpoint}'.");
        return Err(("invalid_url", Some("url"), message));
    }
    let body = file.slice_ref(body.get().as_bytes());
    let tokens = match ParsedChat::parse(&body, script) {
        Ok(chat) => chat.cost().total(),
        // An unknown model fails the batch. After other errors, only the row fails.
        Err(reply) if reply.status == 404 => {
            let message = "The provided model does not exist.".to_string();
            return Err(("model_not_found", Some("body.model"), message));
        }
        Err(_) => 0,
    };
    Ok(BatchRow {
        custom_id,
        body,
        tokens,
    })
}

/// Creates an entry of `errors.data`.
pub(crate) fn error_entry(
    code: &str,
    line: Option<usize>,
    param: Option<&str>,
    message: &str,
) -> Value {
    json!({"code": code, "line": line, "message": message, "param": param})
}

/// Creates a line with a response, for the output file, or for the error file if the status is an error.
pub(crate) fn response_line(id: &str, custom_id: &str, status: u16, body: &[u8]) -> Vec<u8> {
    let mut line = line_start(id, custom_id);
    let response =
        format!(",\"response\":{{\"status_code\":{status},\"request_id\":\"req_{id}\",\"body\":");
    line.extend_from_slice(response.as_bytes());
    line.extend_from_slice(body);
    line.extend_from_slice(b"},\"error\":null}\n");
    line
}

/// Creates a line of the error file without a response.
pub(crate) fn error_line(id: &str, custom_id: &str, code: &str, message: &str) -> Vec<u8> {
    let mut line = line_start(id, custom_id);
    let error = json!({"code": code, "message": message});
    line.extend_from_slice(format!(",\"response\":null,\"error\":{error}}}\n").as_bytes());
    line
}

/// Creates a line of the error file with an empty response of status 0.
pub(crate) fn empty_response_line(id: &str, custom_id: &str) -> Vec<u8> {
    let mut line = line_start(id, custom_id);
    line.extend_from_slice(
        b",\"response\":{\"status_code\":0,\"request_id\":\"\",\"body\":{}},\"error\":null}\n",
    );
    line
}

fn line_start(id: &str, custom_id: &str) -> Vec<u8> {
    format!("{{\"id\":{},\"custom_id\":{}", json!(id), json!(custom_id)).into_bytes()
}
