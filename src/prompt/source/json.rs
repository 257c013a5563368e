//! Reads a JSON file: an array of objects, or one object per line.

use std::io::BufRead;
use std::path::Path;

use anyhow::Result;
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::Value;

use super::text;
use crate::prompt::source::rows::{OnRow, usage};

pub(crate) fn read(path: &Path, file: &mut dyn BufRead, on_row: OnRow<'_>) -> Result<()> {
    if first_byte(file) == Some(b'[') {
        read_array(path, file, on_row)
    } else {
        read_lines(path, file, on_row)
    }
}

fn read_lines(path: &Path, file: &mut dyn BufRead, on_row: OnRow<'_>) -> Result<()> {
    let mut is_row_error = false;
    let result = text::read(path, file, true, &mut |line, row| {
        on_row(line, row).inspect_err(|_| is_row_error = true)
    });
    // An error of `on_row` is about the content of a valid row.
    result.map_err(|error| {
        if is_row_error {
            error
        } else {
            error.context("a .json file must contain an array of objects, or one object per line")
        }
    })
}

fn read_array(path: &Path, file: &mut dyn BufRead, on_row: OnRow<'_>) -> Result<()> {
    let mut row_error = None;
    let mut json = serde_json::Deserializer::from_reader(file);
    let rows = RowVisitor {
        on_row,
        row_error: &mut row_error,
    };
    let result = json.deserialize_seq(rows).and_then(|()| json.end());
    match (row_error, result) {
        (Some(error), _) => Err(error),
        (None, Err(error)) if error.is_io() => Err(usage(format!(
            "cannot read the prompts in {}: {error}",
            path.display()
        ))),
        (None, Err(error)) => Err(usage(format!(
            "{}: not an array of JSON objects: {error}",
            path.display()
        ))),
        (None, Ok(())) => Ok(()),
    }
}

/// Returns the first byte that is not white space, without consuming it. May consume white space before it.
fn first_byte(file: &mut dyn BufRead) -> Option<u8> {
    loop {
        let buffer = file.fill_buf().ok()?;
        let white_space = buffer
            .iter()
            .take_while(|byte| byte.is_ascii_whitespace())
            .count();
        match buffer.get(white_space) {
            Some(byte) => return Some(*byte),
            None if buffer.is_empty() => return None,
            // Consuming it is safe: white space before the first row has no meaning in either format.
            None => file.consume(white_space),
        }
    }
}

/// Calls `on_row` for each element of the array.
struct RowVisitor<'a, 'b> {
    on_row: OnRow<'a>,
    /// Receives the error of `on_row`, which the error type of serde_json cannot hold.
    row_error: &'b mut Option<anyhow::Error>,
}

impl<'de> Visitor<'de> for RowVisitor<'_, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        let mut number = 0;
        while let Some(row) = rows.next_element::<Value>()? {
            number += 1;
            if !row.is_object() {
                let message = format!("row {number} is not a JSON object");
                return Err(serde::de::Error::custom(message));
            }
            if let Err(error) = (self.on_row)(number, row) {
                *self.row_error = Some(error);
                return Err(serde::de::Error::custom("a row was refused"));
            }
        }
        Ok(())
    }
}
