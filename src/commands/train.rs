//! `distill train`: trains the student.

use anyhow::Result;
use serde_json::json;

use crate::cli::{GlobalArgs, TrainArgs};
use crate::data::text_scorer::TextScorer;
use crate::harvest::scorer::{EndpointScorer, ScoringStats};
use crate::terminal::{format_count, format_dollars, sanitise, table};
use crate::train::summary::StartMode;
use crate::train::{self, TrainOptions};

/// Trains the student and prints its folder and metrics.
pub fn run(args: &TrainArgs, global: &GlobalArgs) -> Result<()> {
    let config = super::load_config(&args.config)?.config;
    let start = match (args.resume, args.fresh) {
        (true, _) => StartMode::Resume,
        (_, true) => StartMode::Fresh,
        _ => StartMode::New,
    };
    let options = TrainOptions {
        start,
        selection: crate::plan::questions::selection(&config)?,
        force: args.force,
        quiet: global.json,
    };
    let mut judge = EndpointScorer::new(&config, options.quiet)?;
    let scorer = judge.as_mut().map(|judge| judge as &mut dyn TextScorer);
    let summary = train::run_with_scorer(&config, options, scorer)?;
    let scoring_stats = judge.as_ref().map(EndpointScorer::stats);
    if global.json {
        return super::print_json(
            &json!({ "version": 1, "summary": summary, "judged": scoring_stats }),
        );
    }
    let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.4}"));
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
    let mut rows: Vec<[String; 2]> = rows.map(|(name, value)| [name.to_string(), value]).into();
    if let Some(own_answers) = &summary.own_answers {
        let scored = format_count(own_answers.scored);
        let generated = format_count(own_answers.generated);
        rows.push([
            "student's answers judged".into(),
            format!("{scored} of {generated}"),
        ]);
    }
    rows.extend(scoring_stats.into_iter().flat_map(scoring_rows));
    super::print(&table(&rows))?;
    let changes = summary.changes.iter();
    let changes: String = changes.map(|change| format!("saved {change}\n")).collect();
    super::print(&format!(
        "{}\n{changes}",
        sanitise(&summary.data.to_string())
    ))
}

/// Returns table rows about the requests to the judge, the endpoint that scores the student's answers.
fn scoring_rows(stats: &ScoringStats) -> Vec<[String; 2]> {
    let requests = format!(
        "{} ({} texts judged earlier)",
        format_count(stats.requests),
        format_count(stats.cached)
    );
    let mut rows = vec![
        ["requests to the judge".into(), requests],
        [
            "prompt tokens to the judge".into(),
            format_count(stats.prompt_tokens),
        ],
    ];
    if let Some(usd) = stats.cost_usd {
        rows.push(["cost of judging".into(), format_dollars(usd)]);
    }
    rows
}
