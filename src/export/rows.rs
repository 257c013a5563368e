//! Selects the records to export, and counts the records that are left out.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::cache::record::Record;
use crate::config;
use crate::data::dataset::rows::prompt_of;
use crate::data::groups::{GroupCounts, RecordProperties, Selection};
use crate::exit::Exit;
use crate::fs::AtomicFile;
use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;

/// Counts of an export.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ExportReport {
    pub rows: u64,
    /// Number of records left out, by reason.
    pub left_out: BTreeMap<String, u64>,
    /// Number of top-k alternatives dropped because the tokenizer has no token for them, or another alternative has the
    /// same token. `None` for formats without token ids.
    pub dropped_alternatives: Option<u64>,
}

/// A record to export.
pub(crate) struct ExportRow {
    pub record: Record,
    /// Messages of the request.
    pub prompt: Vec<Message>,
}

impl ExportRow {
    /// Returns the messages of the request and the answer.
    pub(crate) fn conversation(self) -> Vec<Message> {
        let mut messages = self.prompt;
        messages.push(Message::new("assistant", self.record.answer.text));
        messages
    }
}

/// Iterates over the records that `distill train` selects. Counts the other records by reason. Does not check whether
/// a record can become a training example: `data.max_length`, for example, is ignored.
pub(crate) struct ExportRows<'a, R> {
    pub(crate) records: R,
    pub(crate) settings: &'a config::DataConfig,
    pub(crate) selection: &'a Selection,
    pub(crate) groups: GroupCounts,
    pub(crate) report: ExportReport,
}

impl<R: Iterator<Item = Result<Record>>> ExportRows<'_, R> {
    pub(crate) fn next(&mut self) -> Result<Option<ExportRow>> {
        while let Some(record) = self.records.next().transpose()? {
            let properties = RecordProperties::from_record(&record);
            let group = &properties.group;
            if let Err(exclusion) = self.selection.check(&properties) {
                self.groups.count_left_out(group, exclusion);
                self.leave_out(format!("{exclusion}: group {} ({group})", group.id()));
                continue;
            }
            match prompt_of(&record, self.settings) {
                Ok(prompt) => return Ok(Some(ExportRow { record, prompt })),
                Err(reason) => self.leave_out(reason),
            }
        }
        Ok(None)
    }

    fn leave_out(&mut self, reason: String) {
        *self.report.left_out.entry(reason).or_default() += 1;
    }

    /// Writes one line of JSON per row. `line` converts a row to the object of its line, or returns the reason to leave
    /// the row out.
    pub(crate) fn write_to<L: Serialize>(
        &mut self,
        file: &mut AtomicFile,
        mut line: impl FnMut(ExportRow) -> Result<L, String>,
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

    /// Returns the counts, once all rows are written.
    ///
    /// # Errors
    /// If no row was written.
    pub(crate) fn finish(self) -> Result<ExportReport> {
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
        bail!(Exit::Usage(if reasons.is_empty() {
            "the cache is empty: run `distill harvest` first".into()
        } else {
            format!("no record to export ({}){advice}", reasons.join("; "))
        }))
    }
}

/// Settings of an export.
pub struct ExportSettings<'a> {
    /// Data settings of the config, which select the answers.
    pub data: &'a config::DataConfig,
    pub selection: &'a Selection,
    /// Teacher's tokenizer, which [`Format::Axolotl`](super::Format::Axolotl) needs for token ids.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Replace an existing export.
    pub force: bool,
}

/// Writes the export as one JSONL file: see [`ExportRows::write_to`].
pub(crate) fn write_lines<L: Serialize>(
    mut rows: ExportRows<impl Iterator<Item = Result<Record>>>,
    out: &Path,
    force: bool,
    line: impl FnMut(ExportRow) -> Result<L, String>,
) -> Result<ExportReport> {
    let mut file = AtomicFile::create(out)?;
    rows.write_to(&mut file, line)?;
    let report = rows.finish()?;
    file.commit(force)?;
    Ok(report)
}
