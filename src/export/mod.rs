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
//! cannot represent is left out and counted with the reason. OUT replaces a file or a folder only with `--force`, and
//! a folder only if it is empty or an earlier `hf` export. A pipe or a character device is written to directly.
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

use std::path::Path;

use anyhow::{Result, bail};

use crate::cache::record::Record;
use crate::data::groups::GroupCounts;
use crate::exit::Exit;
use crate::export::rows::{ExportReport, ExportRows, ExportSettings, write_lines};
use crate::fs::is_stream;

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

/// Refuses to replace anything without `force`. With `force`, an `hf` export may replace a folder for which
/// [`hf::is_export`] returns true; the other formats may replace a file. Pipes and character devices are written to.
fn check_replaceable(out: &Path, format: Format, force: bool) -> Result<()> {
    let path = out.display();
    if out.symlink_metadata().is_err() {
        return Ok(());
    }
    if is_stream(out) && format != Format::Hf {
        return Ok(());
    }
    if !force {
        bail!(Exit::Usage(format!(
            "{path} exists already: choose another path, or replace it with --force"
        )));
    }
    let is_replaceable = match format {
        Format::Hf => out.is_dir() && hf::is_export(out)?,
        _ => !out.is_dir(),
    };
    if !is_replaceable {
        bail!(Exit::Usage(format!(
            "{path} is not an export of this format, so --force does not replace it: choose another path"
        )));
    }
    Ok(())
}
