//! The README of the student's folder.

use super::Summary;
use crate::config::{Config, Kd};
use crate::terminal::format_count;

/// A Hugging Face model card: what the model is and how it was made.
pub fn text(config: &Config, architecture: &str, summary: &Summary) -> String {
    let line = |name: &str, value: Option<f64>| {
        value.map_or(String::new(), |v| format!("- validation {name}: {v:.4}\n"))
    };
    let loss = match config.loss.kd {
        Kd::None => "cross-entropy on the answers".to_string(),
        kd => format!(
            "cross-entropy and the teacher's top-k (`{}`, weight {})",
            kd.name(),
            config.loss.kd_weight
        ),
    };
    format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- distillation\n---\n\n\
         A {architecture} model of {} parameters, trained with `distill train`.\n\n\
         - teacher: {}\n- loss: {loss}\n- steps: {} of {} examples, {} tokens in all\n{}{}",
        format_count(summary.parameters as u64),
        if config.teacher.model.is_empty() || config.data.source.is_some() {
            "none; trained on given answers"
        } else {
            &config.teacher.model
        },
        summary.steps,
        config.train.batch_size,
        format_count(summary.tokens),
        line("cross-entropy", summary.validation.ce),
        line("KL to the teacher", summary.validation.kl),
    )
}
