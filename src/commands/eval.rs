//! `distill eval`: evaluates a model.

use anyhow::Result;

use crate::cli::{EvalArgs, GlobalArgs};
use crate::eval;
use crate::terminal::{format_count, sanitise, table};

/// Evaluates a model and prints the metrics.
pub fn run(args: &EvalArgs, global: &GlobalArgs) -> Result<()> {
    let config = super::load_config(&args.config)?.config;
    let report = eval::run(
        &config,
        &|| crate::plan::questions::selection(&config),
        global.json,
    )?;
    if global.json {
        return super::print_json(&report);
    }
    let mut rows = vec![
        [
            "model".to_string(),
            sanitise(&report.model.display().to_string()).into_owned(),
        ],
        ["parameters".into(), format_count(report.parameters as u64)],
    ];
    let mut row = |name: &str, value: String| rows.push([name.into(), value]);
    if let Some(truth) = &report.truth {
        let percent = 100.0 * truth.accuracy;
        row(
            "correct answers",
            format!("{} of {} ({percent:.1} %)", truth.correct, truth.rows),
        );
        row("malformed answers", truth.malformed.to_string());
        row("cut off at `eval.max_tokens`", truth.cut_off.to_string());
        if truth.too_long > 0 {
            row(
                "prompts longer than the context",
                truth.too_long.to_string(),
            );
        }
        row("generated tokens/s", format!("{:.0}", truth.tokens_per_s));
    }
    if let Some(teacher) = &report.teacher {
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.4}"));
        row(
            "perplexity on the held-out answers",
            number(teacher.perplexity),
        );
        row(
            "top-1 agreement with the teacher",
            number(teacher.teacher_agreement),
        );
        row(
            "expected calibration error",
            number(teacher.calibration_error),
        );
        match config.teacher.local {
            Some(_) => row("KL to the teacher", number(teacher.kl)),
            None => row("KL to the teacher on its top-k", number(teacher.kl)),
        }
        row("positions", format_count(teacher.positions));
    }
    super::print(&table(&rows))
}
