//! The README of the student's folder.

use std::path::Path;

use crate::config::Config;
use crate::data::groups::GroupCounts;
use crate::terminal::format_count;
use crate::train::summary::Summary;

const HEAD: &str = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- distillation\n---\n\n";

/// A Hugging Face model card: what the model is and how it was made.
pub(crate) fn text(config: &Config, architecture: &str, summary: &Summary) -> String {
    let line = |name: &str, value: Option<f64>| {
        value.map_or(String::new(), |v| format!("- validation {name}: {v:.4}\n"))
    };
    let teacher = match &config.teacher.local {
        Some(dir) => dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        None => answered_by(&summary.data.groups),
    };
    format!(
        "{HEAD}A {architecture} model of {} parameters, trained with `distill train`.\n\n\
         - teacher: {teacher}\n- loss: {}\n- steps: {} of {} examples, {} tokens in all\n{}{}",
        format_count(summary.parameters as u64),
        summary.loss,
        summary.steps,
        config.train.batch_size,
        format_count(summary.tokens),
        line("cross-entropy", summary.validation.ce),
        line("KL to the teacher", summary.validation.kl),
    )
}

/// Groups of a cache that the answers are from.
fn answered_by(groups: &GroupCounts) -> String {
    const SHOWN: usize = 8;
    let mut used: Vec<String> = groups
        .all_used()
        .map(|(group, count)| {
            format!(
                "{} ({} answers)",
                group.model_and_sampling(),
                format_count(count)
            )
        })
        .collect();
    let others = used.len().saturating_sub(SHOWN);
    used.truncate(SHOWN);
    if others > 0 {
        used.push(format!("{others} other groups"));
    }
    if used.is_empty() {
        "none; trained on given answers".into()
    } else {
        used.join("; ")
    }
}

/// That of a teacher that was trained along.
pub(crate) fn of_teacher(config: &Config, architecture: &str) -> String {
    let from = config.teacher.local.as_deref().and_then(Path::file_name);
    format!(
        "{HEAD}A {architecture} model, trained from {} by `distill train` as the teacher of the student \
         beside it, by cross-entropy on the same answers.\n",
        from.unwrap_or_default().to_string_lossy()
    )
}
