//! Exports the cache in the formats of other trainers.
//!
//! ```text
//! Record --rows::ExportRows: the selection of `distill train`--> ExportRow
//!   --one file per format--> lines or columns --fs::AtomicFile--> OUT, written completely or not at all
//! ```
//!
//! | format | OUT | read by |
//! |---|---|---|
//! | `hf` | a folder: `train.jsonl` and a dataset card | `datasets.load_dataset` |
//! | `openai_ft` | JSONL of conversations | OpenAI's fine-tuning API and compatible APIs |
//! | `trl` | JSONL of prompts and completions | TRL's `SFTTrainer` |
//! | `axolotl` | JSONL of conversations with top-k logprobs | axolotl's KD plugin |
//! | `parquet` | one Parquet file with all training data of each record | pyarrow, pandas, DuckDB |
//!
//! Invariants: records are streamed, so memory holds one record, or for Parquet one row group. A row that a format
//! cannot represent is left out and counted with the reason. OUT replaces something only with `--force`, and only an
//! export of the same format. A pipe or a character device is written to directly.
//!
//! # How to add an export format
//!
//! 1. Add a variant to [`Format`], and to `ExportFormat` in `cli.rs` (its name is the value of `--to`); map one to
//!    the other in `commands::export::export_format`.
//! 2. Add a file `export/<format>.rs` with the serialised row type, and a function from `rows::ExportRow` to it,
//!    or to the reason to leave the row out. Copy `trl.rs` for plain text, `axolotl.rs` for token ids.
//! 3. Call it in [`write()`]: through `rows::write_lines` for JSONL; for other files, write to an `AtomicFile`. If OUT
//!    is a folder, extend `check_replaceable`.
//! 4. Declare the module above, and add a row to the table of formats here and in `README.md`.
//! 5. Add a case to `tests/it/export/mod.rs` (or a file beside it), and load the file with the tool that reads it in
//!    `tests/python/exports.py`.

pub(crate) mod axolotl;
pub(crate) mod hf;
pub(crate) mod openai_ft;
#[cfg(feature = "parquet")]
pub(crate) mod parquet;
pub mod rows;
pub(crate) mod trl;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cache::record::Record;
use crate::data::groups::GroupCounts;
use crate::exit::Exit;
use crate::export::rows::{ExportReport, ExportRows, ExportSettings, write_lines};
use crate::fs::is_stream;

/// Number of bytes read of the first line of a file that an export may replace.
const MAX_FIRST_LINE: u64 = 64 << 20;

/// Format of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Hf,
    OpenaiFt,
    Trl,
    Axolotl,
    Parquet,
}

/// Writes the records that `distill train` selects to `out`, atomically.
///
/// # Errors
/// The first error of `records`; [`Exit::Usage`] if `out` exists and may not be replaced, if the format needs a
/// setting that is missing, or if no row can be exported (with the reasons).
pub fn write(
    records: impl Iterator<Item = Result<Record>>,
    format: Format,
    out: &Path,
    settings: &ExportSettings,
) -> Result<ExportReport> {
    check_replaceable(out, format, settings.force)?;
    let rows = ExportRows {
        records,
        settings: settings.data,
        selection: settings.selection,
        groups: GroupCounts::default(),
        report: ExportReport::default(),
    };
    match format {
        Format::Hf => hf::write(rows, out),
        Format::OpenaiFt => write_lines(rows, out, settings.force, openai_ft::line),
        Format::Trl => write_lines(rows, out, settings.force, |row| Ok(trl::line(row))),
        Format::Axolotl => axolotl::write(rows, out, settings),
        #[cfg(feature = "parquet")]
        Format::Parquet => parquet::write(rows, out, settings.force),
        #[cfg(not(feature = "parquet"))]
        Format::Parquet => bail!(Exit::Usage(
            "this build cannot write Parquet: install with `--features parquet`".into()
        )),
    }
}

/// Refuses to replace anything without `force`, and with `force` anything but an export of the same format. Pipes and
/// character devices are written to.
fn check_replaceable(out: &Path, format: Format, force: bool) -> Result<()> {
    let path = out.display();
    if out.symlink_metadata().is_err() {
        return Ok(());
    }
    if is_stream(out) {
        return match format {
            Format::Hf => bail!(Exit::Usage(format!(
                "{path} is not a folder, which an `hf` export writes: choose another path"
            ))),
            _ => Ok(()),
        };
    }
    if !force {
        bail!(Exit::Usage(format!(
            "{path} exists already: choose another path, or replace it with --force"
        )));
    }
    let is_replaceable = match format {
        Format::Hf => out.is_dir() && hf::is_export(out)?,
        _ if !out.exists() => true,
        _ => out.is_file() && is_export_file(out, format)?,
    };
    if !is_replaceable {
        bail!(Exit::Usage(format!(
            "{path} is not an export of this format, so --force does not replace it: choose another path"
        )));
    }
    Ok(())
}

/// Returns true if the file `out` is empty or begins like an export: with the magic number of Parquet, or with a row
/// that has the fields of the format.
fn is_export_file(out: &Path, format: Format) -> Result<bool> {
    let could_not_read = || format!("could not read {}", out.display());
    let file = File::open(out).with_context(could_not_read)?;
    let mut line = Vec::new();
    let mut beginning = BufReader::new(file.take(MAX_FIRST_LINE));
    beginning
        .read_until(b'\n', &mut line)
        .with_context(could_not_read)?;
    let fields: &[&str] = match format {
        _ if line.is_empty() => return Ok(true),
        Format::Parquet => return Ok(line.starts_with(b"PAR1")),
        Format::Hf => return Ok(false),
        Format::OpenaiFt => &["messages"],
        Format::Trl => &["completion", "prompt"],
        Format::Axolotl => &["logprobs", "messages", "target_token_ids"],
    };
    // A file of prompts may have the field `messages` too, but without an answer at the end.
    let ends_with_answer = |row: &BTreeMap<String, Value>| {
        let last = row
            .get("messages")
            .and_then(|messages| messages.as_array()?.last());
        last.is_none_or(|message| message["role"] == "assistant")
    };
    let row: Result<BTreeMap<String, Value>, _> = serde_json::from_slice(&line);
    Ok(row.is_ok_and(|row| row.keys().eq(fields) && ends_with_answer(&row)))
}
