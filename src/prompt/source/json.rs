//! Reads a JSON file: an array of objects, or one object per line.

use std::io::BufRead;
use std::path::Path;

use anyhow::Result;
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::Value;

use super::text;
use crate::prompt::source::rows::{OnRow, usage};

pub(crate) fn read(path: &Path, file: &mut dyn BufRead, on_row: OnRow<'_>) -> Result<()> {
    if first_byte(file) != Some(b'[') {
        return text::read(path, file, true, on_row).map_err(|error| {
            error.context("a .json file must contain an array of objects, or one object per line")
        });
    }
    let mut failure = None;
    let mut json = serde_json::Deserializer::from_reader(file);
    let rows = RowVisitor {
        on_row,
        failure: &mut failure,
    };
    let read = json.deserialize_seq(rows).and_then(|()| json.end());
    match (failure, read) {
        (Some(failure), _) => Err(failure),
        (None, Err(error)) => Err(usage(format!(
            "{}: not an array of JSON objects: {error}",
            path.display()
        ))),
        (None, Ok(())) => Ok(()),
    }
}

/// Returns the first byte that is not white space, without consuming it.
fn first_byte(file: &mut dyn BufRead) -> Option<u8> {
    loop {
        let buffer = file.fill_buf().ok()?;
        let blank = buffer
            .iter()
            .take_while(|b| b.is_ascii_whitespace())
            .count();
        match buffer.get(blank) {
            Some(byte) => return Some(*byte),
            None if buffer.is_empty() => return None,
            // White space is ignored before an array, and between lines of objects.
            None => file.consume(blank),
        }
    }
}

/// Calls `on_row` for each element of the array.
struct RowVisitor<'a, 'b> {
    on_row: OnRow<'a>,
    failure: &'b mut Option<anyhow::Error>,
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
            if let Err(failure) = (self.on_row)(number, row) {
                *self.failure = Some(failure);
                return Err(serde::de::Error::custom("a row was refused"));
            }
        }
        Ok(())
    }
}
