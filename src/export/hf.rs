//! A Hugging Face dataset: a folder with `train.jsonl` and a dataset card.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cache::record::Record;
use crate::export::rows::{ExportReport, ExportRow, ExportRows};
use crate::fs::{AtomicFile, write_dir_with};
use crate::prompt::message::Message;
use crate::terminal::{format_count, sanitise};

const DATA: &str = "train.jsonl";
const CARD: &str = "README.md";
/// Text by which a dataset card is recognised. Every version has written it, so it must not change.
const ORIGIN: &str = "harvested with `distill` through the teacher's chat API";

/// A conversation that ends with the answer, and its origin.
#[derive(Debug, Serialize)]
struct HfRow {
    messages: Vec<Message>,
    prompt_id: String,
    sample: u32,
    model: String,
    finish_reason: String,
}

impl HfRow {
    fn new(mut row: ExportRow) -> Self {
        let record = &mut row.record;
        Self {
            prompt_id: std::mem::take(&mut record.prompt_id),
            sample: record.sample,
            model: std::mem::take(&mut record.model),
            finish_reason: std::mem::take(&mut record.answer.finish_reason),
            messages: row.conversation(),
        }
    }
}

/// Returns true if the folder `out` is empty, or is an earlier export: it contains only names that [`write`] uses, and
/// its dataset card contains [`ORIGIN`].
pub(super) fn is_export(out: &Path) -> Result<bool> {
    let entries = std::fs::read_dir(out)
        .and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>())
        .with_context(|| format!("could not read {}", out.display()))?;
    if entries.is_empty() {
        return Ok(true);
    }
    let has_only_our_names = entries
        .iter()
        .all(|entry| [DATA, CARD].iter().any(|name| entry.file_name() == *name));
    // A folder with such names and no readable card of ours may be the user's.
    let card = std::fs::read(out.join(CARD)).unwrap_or_default();
    Ok(has_only_our_names && String::from_utf8_lossy(&card).contains(ORIGIN))
}

/// Writes the dataset to the folder `out`.
pub(super) fn write(
    mut rows: ExportRows<impl Iterator<Item = Result<Record>>>,
    out: &Path,
) -> Result<ExportReport> {
    write_dir_with(out, |folder| {
        let mut data = AtomicFile::create(&folder.join(DATA))?;
        let mut models = BTreeMap::<String, u64>::new();
        rows.write_to(&mut data, |row| {
            *models.entry(row.record.model.clone()).or_default() += 1;
            Ok(HfRow::new(row))
        })?;
        let report = rows.finish()?;
        data.commit(false)?;
        let mut card = AtomicFile::create(&folder.join(CARD))?;
        card.write_all(card_text(&report, &models).as_bytes())
            .context("could not write the dataset card")?;
        card.commit(false)?;
        Ok(report)
    })
}

/// Returns the dataset card. Model names come from endpoints, so they are sanitised and formatted as code.
fn card_text(report: &ExportReport, models: &BTreeMap<String, u64>) -> String {
    let code = |text: &str| match text {
        "" => "(not reported)".to_owned(),
        text => format!(
            "`{}`",
            sanitise(text).replace('`', "'").replace(['\n', '\t'], " ")
        ),
    };
    let mut text = format!(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {DATA}\n\
         task_categories:\n- text-generation\ntags:\n- distillation\n---\n\n\
         # Answers of a teacher model\n\n\
         {} conversations, {ORIGIN} and exported\n\
         from its cache: `messages` are the prompt and, last, the answer; `prompt_id` and\n\
         `sample` identify the answer.\n\n\
         | teacher, as the endpoint reports it | conversations |\n|---|---|\n",
        format_count(report.rows)
    );
    for (model, count) in models {
        let model = code(model).replace('|', "\\|");
        text += &format!("| {model} | {} |\n", format_count(*count));
    }
    if !report.left_out.is_empty() {
        text += "\nLeft out:\n\n";
        for (reason, count) in &report.left_out {
            text += &format!("- {}: {}\n", format_count(*count), code(reason));
        }
    }
    text + "\nThe terms of the teacher's provider apply to models trained on these answers.\n"
}
