//! The README of the student's folder.

use std::path::Path;

use super::Summary;
use crate::config::{Config, Kd};
use crate::terminal::format_count;

const HEAD: &str = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- distillation\n---\n\n";

/// A Hugging Face model card: what the model is and how it was made.
pub fn text(config: &Config, architecture: &str, summary: &Summary) -> String {
    let line = |name: &str, value: Option<f64>| {
        value.map_or(String::new(), |v| format!("- validation {name}: {v:.4}\n"))
    };
    let loss = match config.loss.kd {
        Kd::None => "cross-entropy on the answers".to_string(),
        kd => format!(
            "cross-entropy and the teacher's {} (`{}`, weight {})",
            match config.teacher.local {
                Some(_) => "distribution",
                None => "top-k",
            },
            kd.name(),
            config.loss.kd_weight
        ),
    };
    format!(
        "{HEAD}A {architecture} model of {} parameters, trained with `distill train`.\n\n\
         - teacher: {}\n- loss: {loss}\n- steps: {} of {} examples, {} tokens in all\n{}{}",
        format_count(summary.parameters as u64),
        match &config.teacher.local {
            Some(dir) => dir.file_name().unwrap_or_default().to_string_lossy(),
            None if config.teacher.model.is_empty() || config.data.source.is_some() =>
                "none; trained on given answers".into(),
            None => config.teacher.model.as_str().into(),
        },
        summary.steps,
        config.train.batch_size,
        format_count(summary.tokens),
        line("cross-entropy", summary.validation.ce),
        line("KL to the teacher", summary.validation.kl),
    )
}

/// That of a teacher that was trained along.
pub fn of_teacher(config: &Config, architecture: &str) -> String {
    let from = config.teacher.local.as_deref().and_then(Path::file_name);
    format!(
        "{HEAD}A {architecture} model, trained from {} by `distill train` as the teacher of the student \
         beside it, by cross-entropy on the same answers.\n",
        from.unwrap_or_default().to_string_lossy()
    )
}
