//! Reads a table with a header: CSV or TSV.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::prompt::source::rows::{OnRow, usage};

/// Reads a table; every field is a text. Refuses a row with more or fewer fields than the header.
pub(crate) fn read(path: &Path, file: impl Read, delimiter: u8, on_row: OnRow<'_>) -> Result<()> {
    let problem = |error: csv::Error| {
        let line = error.position().map_or(0, csv::Position::line);
        match error.kind() {
            csv::ErrorKind::Utf8 { .. } => usage(format!(
                "{}:{line}: not valid UTF-8: save the file as UTF-8",
                path.display()
            )),
            csv::ErrorKind::UnequalLengths {
                expected_len, len, ..
            } => usage(format!(
                "{}:{line}: the row has {len} fields, and the header has {expected_len}: put a field that contains \
                 the separator, a quote or a line break in quotes",
                path.display()
            )),
            _ => usage(format!("{}: {error}", path.display())),
        }
    };
    let mut table = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .from_reader(QuoteCounter { file, quotes: 0 });
    let header = table.headers().map_err(problem)?.clone();
    let mut names = HashSet::new();
    for name in &header {
        if name.trim().is_empty() || !names.insert(name) {
            return Err(usage(format!(
                "{}:1: the first line must have unique column names, but {name:?} is empty or repeated",
                path.display()
            )));
        }
    }
    let mut record = csv::StringRecord::new();
    let mut is_last_multiline = false;
    let mut last_line = 1;
    while table.read_record(&mut record).map_err(problem)? {
        let fields = header.iter().zip(&record);
        let row: Map<String, Value> = fields
            .map(|(name, field)| (name.to_owned(), Value::from(field)))
            .collect();
        let line = record.position().map_or(0, csv::Position::line);
        is_last_multiline = record.iter().any(|field| field.contains('\n'));
        last_line = line;
        on_row(
            usize::try_from(line).unwrap_or(usize::MAX),
            Value::Object(row),
        )?;
    }
    // A quote that is never closed makes the rest of the file one field.
    if is_last_multiline && !table.get_ref().quotes.is_multiple_of(2) {
        return Err(usage(format!(
            "{}:{last_line}: a quote in this row is not closed",
            path.display()
        )));
    }
    Ok(())
}

/// Reader that counts quotes.
struct QuoteCounter<R> {
    file: R,
    quotes: u64,
}

impl<R: Read> Read for QuoteCounter<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(into)?;
        self.quotes += memchr::memchr_iter(b'"', &into[..read]).count() as u64;
        Ok(read)
    }
}
