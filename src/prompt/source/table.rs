//! A table with a header: CSV or TSV.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::prompt::source::rows::{OnRow, usage};

/// Every field is a text. A row with more or fewer fields than the header is refused.
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
                "{}:{line}: the row has {len} fields, and the header has {expected_len}: a field that \
                 holds the separator, a quote or a line end stands in quotes",
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
                "{}:1: the first line must name each column, and the name {name:?} is empty or there \
                 twice",
                path.display()
            )));
        }
    }
    let mut record = csv::StringRecord::new();
    let (mut is_last_long, mut last_line) = (false, 1);
    while table.read_record(&mut record).map_err(problem)? {
        let fields = header.iter().zip(&record);
        let row: Map<String, Value> = fields
            .map(|(name, field)| (name.to_owned(), Value::from(field)))
            .collect();
        let line = record.position().map_or(0, csv::Position::line);
        (is_last_long, last_line) = (record.iter().any(|field| field.contains('\n')), line);
        on_row(
            usize::try_from(line).unwrap_or(usize::MAX),
            Value::Object(row),
        )?;
    }
    // One that is never closed takes the rest of the file into its field.
    if is_last_long && !table.get_ref().quotes.is_multiple_of(2) {
        return Err(usage(format!(
            "{}:{last_line}: a quote in this row is not closed, and takes in all that follows",
            path.display()
        )));
    }
    Ok(())
}

/// A file, and the number of quotes in it.
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
