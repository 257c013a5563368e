//! Rows of a prompt file, whatever its format.

pub(crate) mod json;
#[cfg(feature = "parquet")]
pub(crate) mod parquet;
pub(crate) mod rows;
pub(crate) mod table;
pub(crate) mod text;

use crate::prompt::source::rows::OnRow;
use crate::prompt::source::rows::usage;
use std::io::BufRead;
use std::path::Path;

use anyhow::Result;

/// Hands each row of `path` to `on_row`: a JSON object, of a line of text `{"text": line}`, of a table its
/// fields as texts. The name says which format it is; one that ends in `.gz` is that of a packed file.
///
/// # Errors
/// [`Exit::Usage`], with the line, where the file is not what its name says.
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
            "{}: nothing is known of the suffix `.{suffix}`: prompts come as .jsonl, .json, .csv, .tsv, \
             .parquet (built with the feature), or as plain text in .txt, a prompt a line",
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
        "{}: this distill reads no Parquet: build it with `cargo build --release --features parquet`, or \
         save the rows as .jsonl",
        path.display()
    )))
}

/// Opens a file of text, and refuses what is none.
fn open(path: &Path) -> Result<Box<dyn BufRead + Send>> {
    let could_not = |error: std::io::Error| {
        usage(format!(
            "cannot read the prompts in {}: {error}",
            path.display()
        ))
    };
    // A name without a file behind it would never end.
    let metadata = path.metadata().map_err(could_not)?;
    if !metadata.is_file() && !metadata.is_dir() {
        return Err(usage(format!(
            "cannot read the prompts in {}: it is no file",
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
