//! What a run has done, for people and for programs.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::plan::Estimate;
use crate::terminal::{format_count, format_dollars, format_duration, sanitise, table};

/// The version of the object that `--json` prints.
pub const SUMMARY_VERSION: u32 = 1;

/// Every row ends as one of `cached`, `ok`, `quarantined`, `failed` and `pending`: they add up to
/// `total`.
#[derive(Debug, Default, Serialize)]
pub struct Summary {
    pub version: u32,
    /// Prompts times samples.
    pub total: u64,
    /// Answered before this run.
    pub cached: u64,
    pub ok: u64,
    /// Recorded, but not to be trained on; by reason in `quarantines`.
    pub quarantined: u64,
    /// Without an answer for good; by class in `failures`, one by one in `failures.jsonl`.
    pub failed: u64,
    /// Not asked to the end; the next run goes on with them.
    pub pending: u64,
    /// Requests sent, retries included.
    pub requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Cost of the answers of this run; none without prices or where no answer reported its usage.
    pub cost_usd: Option<f64>,
    pub seconds: f64,
    /// Answers that were asked for logprobs and came without usable ones.
    pub without_logprobs: u64,
    pub quarantines: BTreeMap<String, u64>,
    pub failures: BTreeMap<String, u64>,
    /// What is still to be asked; of a dry run only.
    pub estimate: Option<Estimate>,
    /// Why the process must not end with status 0: a fatal error, an outage, a signal, failed rows.
    #[serde(skip)]
    pub error: Option<anyhow::Error>,
}

impl Summary {
    /// The summary of a run in which all went well; otherwise its error.
    pub fn into_result(mut self) -> Result<Summary> {
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok(self),
        }
    }

    /// Rows that have ended, cached ones included.
    pub fn done(&self) -> u64 {
        self.cached + self.ok + self.quarantined + self.failed
    }

    /// The summary as a table.
    pub fn to_table(&self) -> String {
        let count = |name: &str, number| [name.to_string(), format_count(number)];
        let mut rows = vec![
            count("prompts x samples", self.total),
            count("cached before", self.cached),
        ];
        match &self.estimate {
            Some(estimate) => rows.extend(estimate_rows(self.pending, estimate)),
            None => rows.extend(self.result_rows()),
        }
        table(&rows)
    }

    fn result_rows(&self) -> Vec<[String; 2]> {
        let count = |name: &str, number| [name.to_string(), format_count(number)];
        let mut rows = vec![count("answered now", self.ok)];
        let groups = [
            ("quarantined", self.quarantined, &self.quarantines),
            ("failed", self.failed, &self.failures),
        ];
        for (name, number, by_reason) in groups {
            rows.push(count(name, number));
            rows.extend(
                by_reason
                    .iter()
                    .map(|(reason, number)| count(&format!("  {}", sanitise(reason)), *number)),
            );
        }
        rows.push(count("pending", self.pending));
        rows.push(count("requests sent", self.requests));
        rows.push(count("prompt tokens", self.prompt_tokens));
        rows.push(count("completion tokens", self.completion_tokens));
        if self.without_logprobs > 0 {
            rows.push(count("without logprobs", self.without_logprobs));
        }
        rows.push([
            "cost".into(),
            self.cost_usd
                .map_or("no price is set".into(), format_dollars),
        ]);
        rows.push([
            "time".into(),
            format_duration(Duration::from_secs_f64(self.seconds)),
        ]);
        rows
    }
}

fn estimate_rows(pending: u64, estimate: &Estimate) -> Vec<[String; 2]> {
    let cost = match estimate.cost_usd {
        Some((least, most)) => format!("{} to {}", format_dollars(least), format_dollars(most)),
        None => "no price is set".into(),
    };
    let time = match estimate.minutes {
        0.0 => "no limit is set".into(),
        minutes => format!(
            "at least {}",
            format_duration(Duration::from_secs_f64(minutes * 60.0))
        ),
    };
    [
        ("to be asked", format_count(pending)),
        (
            "prompt tokens",
            format!("about {}", format_count(estimate.prompt_tokens)),
        ),
        (
            "completion tokens",
            format!("0 to {}", format_count(estimate.completion_tokens)),
        ),
        ("cost", cost),
        ("time under the limits", time),
    ]
    .map(|(name, value)| [name.into(), value])
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_every_row_and_reason() {
        let summary = Summary {
            total: 1_010,
            cached: 1_000,
            ok: 6,
            quarantined: 1,
            failed: 2,
            pending: 1,
            requests: 12,
            cost_usd: Some(0.5),
            seconds: 75.0,
            quarantines: BTreeMap::from([("refusal".into(), 1)]),
            failures: BTreeMap::from([("http 400".into(), 2)]),
            ..Summary::default()
        };
        let text = summary.to_table();
        for line in [
            "prompts x samples       1,010",
            "answered now                6",
            "  refusal                   1",
            "  http 400                  2",
            "cost                  $0.5000",
            "time               1 min 15 s",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
    }

    #[test]
    fn a_dry_run_shows_ranges() {
        let summary = Summary {
            pending: 10,
            estimate: Some(Estimate {
                prompt_tokens: 1_234,
                completion_tokens: 5_120,
                cost_usd: Some((0.0012, 1.5)),
                minutes: 2.5,
            }),
            ..Summary::default()
        };
        let text = summary.to_table();
        for part in [
            "about 1,234",
            "0 to 5,120",
            "$0.0012 to $1.50",
            "at least 2 min 30 s",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }
}
