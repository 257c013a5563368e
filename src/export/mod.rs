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

pub mod axolotl;
pub mod hf;
pub mod openai_ft;
#[cfg(feature = "parquet")]
pub mod parquet;
pub mod trl;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::cache::record::Record;
use crate::config;
use crate::data::dataset::rows::prompt_of;
use crate::data::groups::{Candidate, Counts, Selection};
use crate::exit::Exit;
use crate::fs::Whole;
use crate::prompt::Message;
use crate::tokenizer::Tokenizer;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Hf,
    OpenaiFt,
    Trl,
    Axolotl,
    Parquet,
}

/// How to write it.
pub struct Settings<'a> {
    /// Which answers are worth training on.
    pub data: &'a config::Data,
    pub selection: &'a Selection,
    /// The teacher's tokenizer, which [`Format::Axolotl`] needs for its token ids.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Replace what is there.
    pub force: bool,
}

/// What became of the records.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub rows: u64,
    /// Records that are in no row, by the reason.
    pub left_out: BTreeMap<String, u64>,
    /// Top-k alternatives that are in no row though their record is: the tokenizer has no token
    /// for them. None where the format holds no token ids.
    pub dropped_alternatives: Option<u64>,
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
    settings: &Settings,
) -> Result<Report> {
    check_free(out, format, settings.force)?;
    let rows = Rows {
        records,
        settings: settings.data,
        selection: settings.selection,
        groups: Counts::default(),
        report: Report::default(),
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
fn check_free(out: &Path, format: Format, force: bool) -> Result<()> {
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

/// A record to be trained on.
pub struct Row {
    pub record: Record,
    /// What was asked.
    pub prompt: Vec<Message>,
}

impl Row {
    /// What was asked, and the answer.
    pub fn conversation(self) -> Vec<Message> {
        let mut messages = self.prompt;
        messages.push(Message {
            role: "assistant".into(),
            content: self.record.answer.text,
        });
        messages
    }
}

/// The records that `distill train` would use, and the count of the others.
pub struct Rows<'a, R> {
    records: R,
    settings: &'a config::Data,
    selection: &'a Selection,
    groups: Counts,
    report: Report,
}

impl<R: Iterator<Item = Result<Record>>> Rows<'_, R> {
    fn next(&mut self) -> Result<Option<Row>> {
        while let Some(record) = self.records.next().transpose()? {
            let candidate = Candidate::of_record(&record);
            let group = &candidate.group;
            if let Err(difference) = self.selection.check(&candidate) {
                self.groups.left_out(group, difference);
                self.leave_out(format!("{difference}: group {} ({group})", group.id()));
                continue;
            }
            match prompt_of(&record, self.settings) {
                Ok(prompt) => return Ok(Some(Row { record, prompt })),
                Err(reason) => self.leave_out(reason),
            }
        }
        Ok(None)
    }

    fn leave_out(&mut self, reason: String) {
        *self.report.left_out.entry(reason).or_default() += 1;
    }

    /// Writes a line of JSON for each row for which `line` makes one.
    fn write_to<L: Serialize>(
        &mut self,
        file: &mut Whole,
        mut line: impl FnMut(Row) -> Result<L, String>,
    ) -> Result<()> {
        while let Some(row) = self.next()? {
            match line(row) {
                Ok(line) => {
                    serde_json::to_writer(&mut *file, &line).context("could not write a row")?;
                    file.write_all(b"\n").context("could not write a row")?;
                    self.report.rows += 1;
                }
                Err(reason) => self.leave_out(reason),
            }
        }
        Ok(())
    }

    /// The counts, once all rows are written.
    fn finish(self) -> Result<Report> {
        if self.report.rows > 0 {
            return Ok(self.report);
        }
        let reasons = self.report.left_out.iter();
        let reasons: Vec<_> = reasons
            .map(|(reason, count)| format!("{count}: {reason}"))
            .collect();
        let advice = match self.groups.advice() {
            Some(advice) => format!("; {advice} (or --groups)"),
            None => String::new(),
        };
        bail!(Exit::Usage(match reasons.is_empty() {
            true => "the cache is empty: run `distill harvest` first".into(),
            false => format!(
                "no record is left to export ({}){advice}",
                reasons.join("; ")
            ),
        }))
    }
}

/// Writes one JSONL file.
fn write_lines<L: Serialize>(
    mut rows: Rows<impl Iterator<Item = Result<Record>>>,
    out: &Path,
    force: bool,
    line: impl FnMut(Row) -> Result<L, String>,
) -> Result<Report> {
    let mut file = Whole::create(out)?;
    rows.write_to(&mut file, line)?;
    let report = rows.finish()?;
    file.commit(force)?;
    Ok(report)
}
