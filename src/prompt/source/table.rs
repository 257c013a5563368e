//! A table with a header: CSV or TSV.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

use super::{OnRow, usage};

/// Every field is a text. A row with more or fewer fields than the header is refused.
pub fn read(path: &Path, file: impl Read, delimiter: u8, on_row: OnRow<'_>) -> Result<()> {
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
        .from_reader(file);
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
    while table.read_record(&mut record).map_err(problem)? {
        let fields = header.iter().zip(&record);
        let row: Map<String, Value> = fields
            .map(|(name, field)| (name.to_owned(), Value::from(field)))
            .collect();
        let line = record.position().map_or(0, csv::Position::line);
        on_row(
            usize::try_from(line).unwrap_or(usize::MAX),
            Value::Object(row),
        )?;
    }
    Ok(())
}
