//! `distill train`.

use anyhow::Result;
use serde_json::json;

use crate::cli::{Global, TrainArgs};
use crate::terminal::{format_count, sanitise, table};
use crate::train::{self, Options, Start};

/// Trains the student and prints where it is and how it did.
pub fn run(args: &TrainArgs, global: &Global) -> Result<()> {
    let config = super::load_config(&args.config)?.config;
    let start = match (args.resume, args.fresh) {
        (true, _) => Start::Resume,
        (_, true) => Start::Fresh,
        _ => Start::Ask,
    };
    let options = Options {
        start,
        force: args.force,
        quiet: global.json,
    };
    let summary = train::run(&config, options)?;
    if global.json {
        return super::print_json(&json!({ "version": 1, "summary": summary }));
    }
    let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.4}"));
    let validation = &summary.validation;
    let rows = [
        (
            "student",
            sanitise(&summary.student.display().to_string()).into_owned(),
        ),
        ("parameters", format_count(summary.parameters as u64)),
        (
            "steps",
            match summary.best_step {
                Some(best) => format!(
                    "{}, best after {}",
                    format_count(summary.steps),
                    format_count(best)
                ),
                None => format_count(summary.steps),
            },
        ),
        ("tokens", format_count(summary.tokens)),
        ("tokens/s", format!("{:.0}", summary.tokens_per_s)),
        ("validation cross-entropy", number(validation.ce)),
        ("validation KL to the teacher", number(validation.kl)),
        (
            "validation token accuracy",
            number(validation.token_accuracy),
        ),
    ];
    super::print(&table(&rows.map(|(name, value)| [name.to_string(), value])))?;
    super::print(&format!("{}\n", summary.data))
}
