//! The progress line of a run: remaining time, counters, rates and cost.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::report::summary::HarvestSummary;
use crate::terminal::{format_count, format_dollars, format_duration};

/// Period over which rates are averaged.
const WINDOW: Duration = Duration::from_secs(60);

/// Samples of the summary over the last minute, for rates.
pub(crate) struct Rates {
    samples: VecDeque<Sample>,
}

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    requests: u64,
    tokens: u64,
    /// Number of rows that have ended.
    done: u64,
}

impl Rates {
    pub(crate) fn new(now: Instant, summary: &HarvestSummary) -> Self {
        Self {
            samples: VecDeque::from([sample(now, summary)]),
        }
    }

    /// Adds a sample; call it about once a second.
    pub(crate) fn note(&mut self, now: Instant, summary: &HarvestSummary) {
        while self.samples.len() > 1 && now - self.samples[1].at >= WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back(sample(now, summary));
    }

    /// Formats the state of the run as one line.
    pub(crate) fn line(&self, summary: &HarvestSummary) -> String {
        let mut parts = Vec::new();
        // The remaining time comes first, because a narrow terminal cuts off the end of the line.
        let rows_per_minute = self.per_minute(|sample| sample.done);
        if rows_per_minute > 0.0 {
            let open_rows = summary.total.saturating_sub(summary.done());
            let minutes = open_rows as f64 / rows_per_minute;
            let remaining = Duration::from_secs_f64(minutes * 60.0);
            parts.push(format!("{} left", format_duration(remaining)));
        }
        for (count, name) in [
            (summary.failed, "failed"),
            (summary.quarantined, "quarantined"),
            (summary.cached, "cached"),
        ] {
            if count > 0 {
                parts.push(format!("{} {name}", format_count(count)));
            }
        }
        let requests = self.per_minute(|sample| sample.requests);
        let tokens = self.per_minute(|sample| sample.tokens);
        parts.push(format!(
            "{} requests/min",
            format_count(requests.round() as u64)
        ));
        parts.push(format!(
            "{} tokens/min",
            format_count(tokens.round() as u64)
        ));
        if let Some(cost) = summary.cost_usd {
            let total = summary.run_folder_usd.unwrap_or(cost);
            parts.push(match summary.budget_usd {
                Some(budget) => format!("{} of {}", format_dollars(total), format_dollars(budget)),
                None => format_dollars(cost),
            });
        }
        parts.join(", ")
    }

    /// Returns the increase of a counter per minute; 0 before the second sample.
    fn per_minute(&self, counter: impl Fn(&Sample) -> u64) -> f64 {
        match (self.samples.front(), self.samples.back()) {
            (Some(first), Some(last)) if last.at > first.at => {
                let minutes = (last.at - first.at).as_secs_f64() / 60.0;
                (counter(last) - counter(first)) as f64 / minutes
            }
            _ => 0.0,
        }
    }
}

fn sample(at: Instant, summary: &HarvestSummary) -> Sample {
    Sample {
        at,
        requests: summary.requests,
        tokens: summary.usage.prompt_tokens + summary.usage.completion_tokens,
        done: summary.done(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_line_shows_rates_of_the_last_minute() {
        let start = Instant::now();
        let mut summary = HarvestSummary {
            total: 1_000,
            cached: 100,
            cost_usd: Some(0.25),
            ..HarvestSummary::default()
        };
        let mut rates = Rates::new(start, &summary);
        // Ten requests a second for a minute, then one.
        for second in 1..=120 {
            let answers = if second <= 60 { 10 } else { 1 };
            summary.requests += answers;
            summary.ok += answers;
            summary.usage.prompt_tokens += 100 * answers;
            rates.note(start + Duration::from_secs(second), &summary);
        }
        assert_eq!(
            rates.line(&summary),
            "4 min 0 s left, 100 cached, 60 requests/min, 6,000 tokens/min, $0.2500"
        );
    }
}
