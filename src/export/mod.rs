//! The cache in the formats of the tools that people train with at scale.
//!
//! ```text
//! Record --Rows (what `distill train` would use)--> Row --one file per format--> lines, columns
//!   --fs--> OUT, whole or not at all
//! ```
//!
//! | format | OUT | read by |
//! |---|---|---|
//! | [`hf`] | a folder: `train.jsonl` and a dataset card | `datasets.load_dataset` |
//! | [`openai_ft`] | JSONL of conversations | the fine-tuning API of OpenAI and who speaks its dialect |
//! | [`trl`] | JSONL of prompts and completions | TRL's `SFTTrainer` |
//! | [`axolotl`] | JSONL of conversations with top-k logprobs | axolotl's KD plugin |
//! | `parquet` | one Parquet file with everything that a record holds for training | pyarrow, pandas, DuckDB |
//!
//! Records stream through: what is held is one of them, or for Parquet one row group. A row that a
//! format cannot hold is left out and counted with the reason.

pub(crate) mod axolotl;
pub(crate) mod hf;
pub(crate) mod openai_ft;
#[cfg(feature = "parquet")]
pub(crate) mod parquet;
pub mod rows;
pub(crate) mod trl;

use crate::export::rows::ExportReport;
use crate::export::rows::ExportRows;
use crate::export::rows::ExportSettings;
use crate::export::rows::write_lines;
use std::path::Path;

use anyhow::{Result, bail};

use crate::cache::record::Record;
use crate::data::groups::Counts;
use crate::exit::Exit;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Hf,
    OpenaiFt,
    Trl,
    Axolotl,
    Parquet,
}

/// Writes the records that are worth training on to `out`, which appears whole or not at all.
///
/// # Errors
/// The first error among the records; [`Exit::Usage`] if `out` is taken, if the format needs
/// something that is missing, and if no row is left (with the reasons).
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
        groups: Counts::default(),
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
            "this build writes no Parquet: install with `--features parquet`".into()
        )),
    }
}

/// Refuses to overwrite, without `force`, anything; with it, whatever an export did not write.
fn check_replaceable(out: &Path, format: Format, force: bool) -> Result<()> {
    let place = out.display();
    let Ok(found) = out.symlink_metadata() else {
        return Ok(());
    };
    if !force {
        bail!(Exit::Usage(format!(
            "{place} is there already; give another place, or --force to replace it"
        )));
    }
    let replaceable = match format {
        Format::Hf => found.is_dir() && hf::is_ours(out)?,
        _ => !found.is_dir(),
    };
    if !replaceable {
        bail!(Exit::Usage(format!(
            "{place} is nothing that this format writes, so --force does not replace it; give \
             another place"
        )));
    }
    Ok(())
}
