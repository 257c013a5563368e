//! Reads the rows of a prompt file of any supported format.
//!
//! | file | content |
//! |---|---|
//! | `text` | one row per line: plain text or a JSON object |
//! | `json` | an array of JSON objects |
//! | `table` | CSV and TSV |
//! | `parquet` | Parquet, with the feature `parquet` |
//! | `rows` | the callback for a row |

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

/// Calls `on_row` for each row of `path`, as a JSON object: a line of text is `{"text": line}`, and the fields of a
/// table are texts. The suffix of the name determines the format; a name that ends in `.gz` is of a compressed file.
///
/// # Errors
/// [`Exit::Usage`](crate::exit::Exit::Usage), with the line, if the content does not match the format.
pub(crate) fn read(path: &Path, on_row: OnRow<'_>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.to_lowercase();
    let unpacked = name.strip_suffix(".gz").unwrap_or(&name);
    let suffix = unpacked.rsplit_once('.').map_or("", |(_, suffix)| suffix);
    match suffix {
        "jsonl" | "ndjson" => text::read(path, &mut open(path)?, true, on_row),
        "json" => json::read(path, &mut open(path)?, on_row),
        "csv" => table::read(path, open(path)?, b',', on_row),
        "tsv" => table::read(path, open(path)?, b'\t', on_row),
        "parquet" if unpacked == name => read_parquet(path, on_row),
        "" | "txt" | "text" | "md" | "prompts" | "list" | "log" => {
            text::read(path, &mut open(path)?, false, on_row)
        }
        _ => Err(usage(format!(
            "{}: unknown suffix `.{suffix}`: use .jsonl, .json, .csv, .tsv, .parquet (with the feature `parquet`), \
             or .txt with one prompt per line",
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

/// Opens a text file, without its byte order mark. Refuses pipes, devices and UTF-16.
fn open(path: &Path) -> Result<Box<dyn BufRead + Send>> {
    let could_not = |error: std::io::Error| {
        usage(format!(
            "cannot read the prompts in {}: {error}",
            path.display()
        ))
    };
    // Reading a pipe or a device may never end.
    let metadata = path.metadata().map_err(could_not)?;
    if !metadata.is_file() && !metadata.is_dir() {
        return Err(usage(format!(
            "cannot read the prompts in {}: not a regular file",
            path.display()
        )));
    }
    let mut file = crate::fs::open_data(path).map_err(could_not)?;
    let start = file.fill_buf().map_err(could_not)?;
    let (skipped, is_utf16) = match start {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => (0, true),
        [0xef, 0xbb, 0xbf, ..] => (3, false),
        _ => (0, false),
    };
    if is_utf16 {
        return Err(usage(format!(
            "{} is saved as UTF-16: save it as UTF-8",
            path.display()
        )));
    }
    file.consume(skipped);
    Ok(file)
}
