//! Reads the rows of a prompt file of any supported format.
//!
//! | module | reads |
//! |---|---|
//! | `text` | one row per line: plain text or a JSON object |
//! | `json` | an array of JSON objects, or one object per line |
//! | `table` | CSV and TSV |
//! | `parquet` | Parquet, with the feature `parquet` |
//!
//! `rows` has the type of the callback for each row.

pub(crate) mod json;
#[cfg(feature = "parquet")]
pub(crate) mod parquet;
pub(crate) mod rows;
pub(crate) mod table;
pub(crate) mod text;

use std::io::BufRead;
use std::path::Path;

use anyhow::Result;

use crate::prompt::source::rows::{OnRow, usage};

/// Calls `on_row` for each row of `path`, as a JSON object: a line of plain text becomes `{"text": line}`, and every
/// field of a CSV or TSV file is a string. The suffix of the file name determines the format. Files of all formats
/// except Parquet may be compressed with gzip; their names have `.gz` after the suffix.
///
/// # Errors
/// [`Exit::Usage`](crate::exit::Exit::Usage) if the file cannot be read or does not match the format; the message names
/// the line if it is known. The errors of `on_row` as well.
pub(crate) fn read(path: &Path, on_row: OnRow<'_>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.to_lowercase();
    let uncompressed = name.strip_suffix(".gz").unwrap_or(&name);
    let suffix = uncompressed
        .rsplit_once('.')
        .map_or("", |(_, suffix)| suffix);
    match suffix {
        "jsonl" | "ndjson" => text::read(path, &mut open(path)?, true, on_row),
        "json" => json::read(path, &mut open(path)?, on_row),
        "csv" => table::read(path, open(path)?, b',', on_row),
        "tsv" => table::read(path, open(path)?, b'\t', on_row),
        "parquet" if uncompressed == name => read_parquet(path, on_row),
        "parquet" => Err(usage(format!(
            "{}: a Parquet file must not be compressed with gzip: decompress it",
            path.display()
        ))),
        "" | "txt" | "text" | "md" | "prompts" | "list" | "log" => {
            text::read(path, &mut open(path)?, false, on_row)
        }
        _ => Err(usage(format!(
            "{}: unknown suffix `.{suffix}`: use .jsonl, .json, .csv, .tsv, .txt with one prompt per line, or .parquet \
             (in a build with the feature `parquet`)",
            path.display()
        ))),
    }
}

#[cfg(feature = "parquet")]
fn read_parquet(path: &Path, on_row: OnRow<'_>) -> Result<()> {
    parquet::read(path, on_row)
}

#[cfg(not(feature = "parquet"))]
fn read_parquet(path: &Path, _: OnRow<'_>) -> Result<()> {
    Err(usage(format!(
        "{}: this build cannot read Parquet: build it with `cargo build --release --features parquet`, or save \
         the rows as .jsonl",
        path.display()
    )))
}

/// Byte order mark of UTF-8.
const UTF8_MARK: &[u8] = &[0xef, 0xbb, 0xbf];
/// Byte order marks of UTF-16, little-endian and big-endian.
const UTF16_MARKS: [[u8; 2]; 2] = [[0xff, 0xfe], [0xfe, 0xff]];

/// Opens a text file, which may be compressed, and skips a UTF-8 byte order mark. Refuses pipes, devices and UTF-16.
fn open(path: &Path) -> Result<Box<dyn BufRead + Send>> {
    let read_error = |error: std::io::Error| {
        usage(format!(
            "cannot read the prompts in {}: {error}",
            path.display()
        ))
    };
    // Reading a pipe or a device may never end.
    let metadata = path.metadata().map_err(read_error)?;
    if !metadata.is_file() && !metadata.is_dir() {
        return Err(usage(format!(
            "cannot read the prompts in {}: not a regular file",
            path.display()
        )));
    }
    let mut file = crate::fs::open_data(path).map_err(read_error)?;
    let start = file.fill_buf().map_err(read_error)?;
    if UTF16_MARKS.iter().any(|mark| start.starts_with(mark)) {
        return Err(usage(format!(
            "{} is saved as UTF-16: save it as UTF-8",
            path.display()
        )));
    }
    if start.starts_with(UTF8_MARK) {
        file.consume(UTF8_MARK.len());
    }
    Ok(file)
}
