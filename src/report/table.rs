//! The summary as a table for people.

use std::time::Duration;

use crate::plan::estimate::BatchEstimate;
use crate::plan::estimate::Estimate;
use crate::report::batch_counts::BatchCounts;
use crate::report::summary::HarvestSummary;
use crate::report::timeline;
use crate::terminal::{
    format_bytes, format_count, format_dollars, format_duration, format_share, sanitise, table,
};

/// Minimum number of seconds with waiting rows before the use of a rate limit is shown. Over a shorter time, the
/// initial burst would distort it.
const MIN_OPEN_SECONDS: f64 = 60.0;

impl HarvestSummary {
    /// Formats the summary as a table, followed by advice, the slowest hour and the cost, or by the notes of a dry run.
    pub fn to_table(&self) -> String {
        let count = |name: &str, number| [name.to_string(), format_count(number)];
        let mut rows = vec![
            count("prompts x samples", self.total),
            count("cached before", self.cached - self.repeated),
        ];
        if self.repeated > 0 {
            rows.push(count("identical requests", self.repeated));
        }
        match &self.estimate {
            Some(estimate) => rows.extend(estimate_rows(self, estimate)),
            None => rows.extend(self.result_rows()),
        }
        let mut text = table(&rows);
        if let Some(estimate) = &self.estimate {
            return text + &self.dry_run_notes(estimate);
        }
        for step in &self.advice {
            text.push_str(&format!("next: {}\n", sanitise(step)));
        }
        if let Some(hour) = timeline::slowest(&self.hours).filter(|_| self.hours.len() > 1) {
            text.push_str(&format!(
                "slowest hour: from {}, {} answers, {} of waiting\n",
                hour.start,
                format_count(hour.answered),
                format_duration(Duration::from_secs_f64(hour.waiting_s))
            ));
        }
        text.push_str(&format!("cost: {}\n", self.cost_text()));
        text
    }

    /// Table rows with the results of a run, by counter and reason.
    fn result_rows(&self) -> Vec<[String; 2]> {
        let count = |name: &str, number| [name.to_string(), format_count(number)];
        let mut rows = vec![count("answered now", self.ok)];
        let groups = [
            ("quarantined", self.quarantined, &self.quarantines),
            ("failed", self.failed, &self.failures),
        ];
        for (name, number, by_reason) in groups {
            rows.push(count(name, number));
            rows.extend(by_reason.iter().map(|(reason, &number)| {
                let share = format_share(number, self.total - self.cached);
                [
                    format!("  {}", sanitise(reason)),
                    format!("{} ({share})", format_count(number)),
                ]
            }));
        }
        rows.push(count("pending", self.pending));
        rows.push(count("requests sent", self.requests));
        rows.push(count("prompt tokens", self.usage.prompt_tokens));
        if self.usage.cached_tokens > 0 {
            rows.push(count(
                "  from the provider's cache",
                self.usage.cached_tokens,
            ));
        }
        rows.push(count("completion tokens", self.usage.completion_tokens));
        if self.usage.reasoning_tokens > 0 {
            rows.push(count("  for reasoning", self.usage.reasoning_tokens));
        }
        if self.without_logprobs > 0 {
            rows.push(count("without logprobs", self.without_logprobs));
            let reasons = self.without_logprobs_because.iter();
            rows.extend(
                reasons.map(|(reason, &number)| count(&format!("  {}", sanitise(reason)), number)),
            );
        }
        if self.cut_off > 0 {
            rows.push(count("cut off by max_tokens", self.cut_off));
        }
        rows.extend(self.batches.iter().flat_map(BatchCounts::rows));
        rows.extend(self.limit_rows());
        rows.push([
            "time".into(),
            format_duration(Duration::from_secs_f64(self.seconds)),
        ]);
        rows
    }

    /// Table rows about the rate limits of each teacher.
    fn limit_rows(&self) -> Vec<[String; 2]> {
        let mut rows = Vec::new();
        for used in &self.used {
            let name = match self.used.len() {
                1 => String::new(),
                _ => format!(" ({})", sanitise(&used.teacher)),
            };
            if let Some(share) = used.share()
                && used.open_s >= MIN_OPEN_SECONDS
            {
                rows.push([
                    format!("rate limit used{name}"),
                    format!("{:.1} %", share * 100.0),
                ]);
            }
            if used.throttled > 0 {
                rows.push([
                    format!("throttled requests{name}"),
                    format_count(used.throttled),
                ]);
            }
        }
        rows
    }

    /// Formats the notes and the first request of a dry run.
    fn dry_run_notes(&self, estimate: &Estimate) -> String {
        let mut text = String::new();
        for warning in self
            .warnings
            .iter()
            .chain(&estimate.cached.advice(&self.arguments))
        {
            text.push_str(&format!("note: {}\n", sanitise(warning)));
        }
        for (count, question) in [
            (
                estimate.cached.other_settings,
                "the same prompts with other settings",
            ),
            (estimate.cached.other_prompts, "other prompts"),
        ] {
            if count > 0 {
                let count = format_count(count);
                let searched = estimate
                    .cached
                    .counted_records
                    .map(|records| format!(" of the first {} records", format_count(records)));
                let searched = searched.unwrap_or_default();
                text.push_str(&format!(
                    "note: {count} cached answers{searched} are to {question}\n"
                ));
            }
        }
        if let Some(request) = &estimate.first_request {
            let request = serde_json::to_string_pretty(request).unwrap_or_default();
            text.push_str(&format!("first request:\n{}\n", sanitise(&request)));
        }
        text
    }

    /// Formats the cost, as in `$1.20 measured + at most $0.03 estimated`, and the use of the budget.
    fn cost_text(&self) -> String {
        let Some(measured) = self.cost_usd else {
            return "no price is set (`price.input` and `price.output`)".into();
        };
        let mut text = format!("{} measured", format_dollars(measured));
        if let Some(estimated) = self.estimated_usd.filter(|estimated| *estimated > 0.0) {
            text.push_str(&format!(
                " + at most {} estimated ({} attempts may have been billed without an answer)",
                format_dollars(estimated),
                format_count(self.attempts_lost)
            ));
        }
        if let (Some(total), Some(cap)) = (self.run_folder_usd, self.budget_usd) {
            let (total, cap) = (format_dollars(total), format_dollars(cap));
            text.push_str(&format!("; {total} of the budget of {cap}"));
        }
        text
    }
}

/// Table rows with the estimates of a dry run.
fn estimate_rows(summary: &HarvestSummary, estimate: &Estimate) -> Vec<[String; 2]> {
    let likely =
        |text: Option<String>| text.map_or(String::new(), |text| format!(", likely {text}"));
    let cost = match estimate.cost_usd {
        Some((min, max)) => format!(
            "{} to {}{}",
            format_dollars(min),
            format_dollars(max),
            likely(estimate.likely_cost_usd.map(format_dollars))
        ),
        None => "no price is set (`price.input` and `price.output`)".into(),
    };
    let time = match (&estimate.batches, estimate.minutes) {
        (Some(batches), _) => batch_time(batches),
        (None, 0.0) if summary.pending == 0 => "nothing is left to request".into(),
        (None, 0.0) => "no limit is set".into(),
        (None, minutes) => format!(
            "at least {}",
            format_duration(Duration::from_secs_f64(minutes * 60.0))
        ),
    };
    let disk = match estimate.disk_bytes {
        Some(bytes) => format!("about {}", format_bytes(bytes)),
        None => "unknown before the first answers".into(),
    };
    let mut rows = vec![
        ("to be requested", format_count(summary.pending)),
        (
            "prompt tokens",
            format!("about {}", format_count(estimate.prompt_tokens)),
        ),
        (
            "completion tokens",
            format!(
                "0 to {}{}",
                format_count(estimate.completion_tokens),
                likely(estimate.likely_completion_tokens.map(format_count))
            ),
        ),
        ("cost", cost),
    ];
    if let (Some(spent), Some(cap)) = (summary.run_folder_usd, summary.budget_usd) {
        let (spent, cap) = (format_dollars(spent), format_dollars(cap));
        rows.push(("budget", format!("{spent} of {cap} are spent")));
    }
    rows.extend([("time", time), ("disk", disk)]);
    if summary.failed > 0 {
        // These rows used up `retry.max_attempts` paid attempts.
        rows.insert(0, ("given up", format_count(summary.failed)));
    }
    let rows = rows.into_iter();
    rows.map(|(name, value)| [name.into(), value]).collect()
}

/// Formats the number of batches and their maximum time: a provider may take 24 hours for the batches of one round.
fn batch_time(batches: &BatchEstimate) -> String {
    let to_submit = match batches.batches {
        0 => "no new batch".to_owned(),
        1 => "1 batch".to_owned(),
        count => format!("{} batches", format_count(count)),
    };
    let under_way = match batches.under_way {
        0 => String::new(),
        count => format!(
            ", besides {} under way with {} of these rows",
            format_count(count),
            format_count(batches.rows_under_way)
        ),
    };
    if batches.batches == 0 && batches.under_way == 0 {
        return "no batch is needed".to_owned();
    }
    let rounds = match batches.rounds {
        0 | 1 => "up to 24 h".to_owned(),
        rounds => {
            format!("{rounds} rounds because of `batch.enqueued_tokens`, up to 24 h each")
        }
    };
    format!("{to_submit}{under_way}: {rounds}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn batch_time_shows_new_batches_and_those_under_way() {
        let time = |batches, under_way, rounds| {
            batch_time(&BatchEstimate {
                batches,
                under_way,
                rows_under_way: 250 * under_way,
                rounds,
            })
        };
        assert_eq!(time(0, 0, 0), "no batch is needed");
        assert_eq!(time(1, 0, 1), "1 batch: up to 24 h");
        assert_eq!(
            time(0, 2, 0),
            "no new batch, besides 2 under way with 500 of these rows: up to 24 h"
        );
        assert_eq!(
            time(3, 0, 3),
            "3 batches: 3 rounds because of `batch.enqueued_tokens`, up to 24 h each"
        );
    }

    #[test]
    fn summary_table_shows_counters_reasons_and_cost() {
        let summary = HarvestSummary {
            total: 1_010,
            cached: 1_000,
            ok: 6,
            quarantined: 1,
            failed: 2,
            pending: 1,
            requests: 12,
            cost_usd: Some(0.5),
            estimated_usd: Some(0.25),
            run_folder_usd: Some(1.75),
            budget_usd: Some(2.0),
            attempts_lost: 3,
            seconds: 75.0,
            quarantines: BTreeMap::from([("refusal".into(), 1)]),
            failures: BTreeMap::from([("http 400".into(), 2)]),
            ..HarvestSummary::default()
        };
        let text = summary.to_table();
        for line in [
            "  refusal          1 (10.0 %)",
            "  http 400         2 (20.0 %)",
            "$0.5000 measured + at most $0.2500 estimated (3 attempts may have been billed without \
             an answer); $1.75 of the budget of $2.00",
            "1 min 15 s",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
    }

    #[test]
    fn dry_run_table_shows_ranges() {
        let summary = HarvestSummary {
            pending: 10,
            estimate: Some(Estimate {
                prompt_tokens: 1_234,
                completion_tokens: 5_120,
                likely_completion_tokens: Some(2_000),
                cost_usd: Some((0.0012, 1.5)),
                likely_cost_usd: Some(0.75),
                minutes: 2.5,
                disk_bytes: Some(12_000_000),
                ..Estimate::default()
            }),
            ..HarvestSummary::default()
        };
        let text = summary.to_table();
        for part in [
            "about 1,234",
            "0 to 5,120, likely 2,000",
            "$0.0012 to $1.50, likely $0.7500",
            "about 12.0 MB",
            "at least 2 min 30 s",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }
}
