//! Reads a file with one row per line: plain text, or a JSON object.

use std::io::{BufRead, Read};
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::prompt::source::rows::{OnRow, usage};

/// Maximum length of a line in bytes.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// Reads the rows. Ignores blank lines; lines may end with `\r\n`.
pub(crate) fn read(
    path: &Path,
    file: &mut dyn BufRead,
    is_json: bool,
    on_row: OnRow<'_>,
) -> Result<()> {
    let mut line = Vec::new();
    let mut number = 0;
    loop {
        number += 1;
        let error_at_line =
            |problem: &str| usage(format!("{}:{number}: {problem}", path.display()));
        line.clear();
        let byte_count = file
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut line)
            .map_err(|error| error_at_line(&error.to_string()))?;
        if byte_count == 0 {
            return Ok(());
        }
        if line.len() as u64 > MAX_LINE_BYTES {
            let limit = MAX_LINE_BYTES >> 20;
            return Err(error_at_line(&format!(
                "the line is longer than {limit} MiB: split or remove it"
            )));
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let row = parse(text, is_json).map_err(|problem| error_at_line(&problem))?;
        if let Some(row) = row {
            on_row(number, row)?;
        }
    }
}

/// Parses a line; returns None for a blank line.
fn parse(line: &[u8], is_json: bool) -> Result<Option<Value>, String> {
    let line = std::str::from_utf8(line)
        .map_err(|_| "not valid UTF-8: save the file as UTF-8".to_string())?;
    if line.trim().is_empty() {
        return Ok(None);
    }
    if is_json {
        return object(line).map(Some);
    }
    if line.contains('\0') {
        return Err("the line contains a NUL byte: save the file as UTF-8 text".into());
    }
    if line.contains('\r') {
        return Err(
            "the line contains a \\r without a \\n: save the file with \\n line endings".into(),
        );
    }
    Ok(Some(json!({ "text": line })))
}

/// Parses a JSON object.
pub(crate) fn object(text: &str) -> Result<Value, String> {
    match serde_json::from_str(text) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err("not a JSON object".into()),
        Err(error) => Err(format!("not a JSON object: {error}")),
    }
}
