//! `distill train`.

use anyhow::Result;
use serde_json::json;

use crate::cli::{Global, TrainArgs};
use crate::harvest::scorer::ScoringStats;
use crate::prompt::Prompt;
use crate::signal::StopFlag;
use crate::terminal::{format_count, format_dollars, sanitise, table};
use crate::train::on_policy::Judge;
use crate::train::summary::Start;
use crate::train::{self, Options};

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
        selection: crate::plan::questions::selection(&config)?,
        force: args.force,
        quiet: global.json,
    };
    let mut judge = crate::harvest::scorer::TextScorer::new(&config, options.quiet)?.map(Asked);
    let asked = judge.as_mut().map(|judge| judge as &mut dyn Judge);
    let summary = train::run_judged(&config, options, asked)?;
    let told = judge.as_ref().map(|judge| judge.0.stats());
    if global.json {
        return super::print_json(&json!({ "version": 1, "summary": summary, "judged": told }));
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
    let mut rows: Vec<[String; 2]> = rows.map(|(name, value)| [name.to_string(), value]).into();
    if let Some(own) = &summary.own_answers {
        let (judged, written) = (format_count(own.judged), format_count(own.written));
        rows.push([
            "own answers judged".into(),
            format!("{judged} of {written}"),
        ]);
    }
    rows.extend(told.into_iter().flat_map(bought));
    super::print(&table(&rows))?;
    let changes = summary.changes.iter();
    let changes: String = changes.map(|change| format!("saved {change}\n")).collect();
    super::print(&format!(
        "{}\n{changes}",
        sanitise(&summary.data.to_string())
    ))
}

/// The endpoint of the config as the judge of what the student writes.
struct Asked(crate::harvest::scorer::TextScorer);

impl Judge for Asked {
    fn judge(&mut self, texts: Vec<Prompt>, stop: &StopFlag) -> Result<Vec<Option<Vec<u8>>>> {
        self.0.judge(texts, stop)
    }
}

/// What judging has come to, as rows of the table.
fn bought(told: &ScoringStats) -> Vec<[String; 2]> {
    let requests = format!(
        "{} ({} texts judged before)",
        format_count(told.requests),
        format_count(told.cached)
    );
    let mut rows = vec![
        ["requests to the judge".into(), requests],
        [
            "their prompt tokens".into(),
            format_count(told.prompt_tokens),
        ],
    ];
    if let Some(usd) = told.cost_usd {
        rows.push(["cost of judging".into(), format_dollars(usd)]);
    }
    rows
}
