//! What a run has done, for people and for programs: the table at the end (`table`), and `summary.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::terminal::format_count;
use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::cache::record::{Status, Timing};
use crate::cache::usage::Usage;
use crate::exit::Exit;
use crate::plan::Plan;
use crate::plan::estimate::Estimate;
use crate::plan::unanswered::Unanswered;
use crate::report::answer_facts::AnswerFacts;
use crate::report::batch_counts::BatchCounts;
use crate::report::failures;
use crate::report::failures::FailedRow;
use crate::report::timeline::{HourStats, LimitUse};

/// The version of the object that `--json` prints and `summary.json` holds.
pub const SUMMARY_VERSION: u32 = 1;

/// Every row ends as one of `cached`, `ok`, `quarantined`, `failed` and `pending`: they add up to
/// `total`.
#[derive(Debug, Default, Serialize)]
pub struct HarvestSummary {
    pub version: Version,
    /// Prompts times samples, for every teacher that is asked.
    pub total: u64,
    /// Answered before this run, or by another row of it that asks the same.
    pub cached: u64,
    /// Of these, rows that ask word for word what another one asks.
    pub repeated: u64,
    pub ok: u64,
    /// Recorded, but not to be trained on; by reason in `quarantines`.
    pub quarantined: u64,
    /// Ended without an answer; by class in `failures`, one by one in `failures.jsonl`.
    pub failed: u64,
    /// Of these, bought `retry.max_attempts` times: only `harvest --again failed` asks them again.
    pub given_up: u64,
    /// Not asked to the end; the next run goes on with them.
    pub pending: u64,
    /// Requests sent, retries included.
    pub requests: u64,
    pub usage: Usage,
    /// Cost of the answers of this run by their usage; none without prices.
    pub cost_usd: Option<f64>,
    /// Upper bound for attempts of this run that may have been billed, and answers without usage.
    pub estimated_usd: Option<f64>,
    /// Everything that this run folder ever cost, upper bounds included.
    pub run_folder_usd: Option<f64>,
    pub budget_usd: Option<f64>,
    /// Attempts of this run that may have been billed and brought no answer.
    pub attempts_lost: u64,
    pub seconds: f64,
    /// Answers that were asked for logprobs and came without usable ones.
    pub without_logprobs: u64,
    pub without_logprobs_because: BTreeMap<String, u64>,
    /// Answers that `sampling.max_tokens` cut off.
    pub cut_off: u64,
    pub quarantines: BTreeMap<String, u64>,
    pub failures: BTreeMap<String, u64>,
    /// By teacher: what was used of what the limits allowed.
    pub used: Vec<LimitUse>,
    pub hours: Vec<HourStats>,
    /// Of a run in batch mode.
    pub batches: Option<BatchCounts>,
    /// Warnings about the answers that were logged during the run.
    pub warnings: Vec<String>,
    /// What to do next.
    pub advice: Vec<String>,
    /// Turns of the dispatcher's loop, for tests: it must not spin.
    #[serde(skip)]
    pub turns: u64,
    /// What is still to be asked; of a dry run only.
    pub estimate: Option<Estimate>,
    /// Earlier runs in this folder, and this one.
    pub runs: Vec<PastRun>,
    /// The flags that name this config, for commands in what to do next; see [`Config::arguments`].
    ///
    /// [`Config::arguments`]: crate::config::Config::arguments
    #[serde(skip)]
    pub arguments: String,
    /// Changes to the config without which it cannot train; empty if there are none.
    #[serde(skip)]
    pub before_training: &'static str,
    /// The rows of `failed`, and those that a filter refused, for `failures.jsonl`.
    #[serde(skip)]
    pub failed_rows: Vec<FailedRow>,
    /// Why the process must not end with status 0: a fatal error, an outage, a signal, failed rows.
    #[serde(serialize_with = "as_text")]
    pub error: Option<anyhow::Error>,
}

/// [`SUMMARY_VERSION`].
#[derive(Debug, Serialize)]
pub struct Version(u32);

impl Default for Version {
    fn default() -> Self {
        Version(SUMMARY_VERSION)
    }
}

fn as_text<S: serde::Serializer>(
    error: &Option<anyhow::Error>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let text = error.as_ref().map(|error| format!("{error:#}"));
    text.serialize(serializer)
}

/// Entry of the run history in `summary.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PastRun {
    /// End of the run; RFC 3339, in UTC.
    pub at: String,
    pub ok: u64,
    pub quarantined: u64,
    pub failed: u64,
    pub pending: u64,
    pub requests: u64,
    pub cost_usd: Option<f64>,
    pub seconds: f64,
    pub error: Option<String>,
}

impl PastRun {
    pub(crate) fn of(summary: &HarvestSummary) -> PastRun {
        PastRun {
            at: Timing::stamp(jiff::Timestamp::now()),
            ok: summary.ok,
            quarantined: summary.quarantined,
            failed: summary.failed,
            pending: summary.pending,
            requests: summary.requests,
            cost_usd: summary.cost_usd,
            seconds: summary.seconds,
            error: summary.error.as_ref().map(|error| format!("{error:#}")),
        }
    }
}

/// Of these, the last ones are kept.
const MOST_RUNS: usize = 1_000;

/// The runs that the summary of the run folder tells of; none where it cannot be read.
pub(crate) fn past_runs(run_dir: &Path) -> Vec<PastRun> {
    #[derive(Deserialize)]
    struct Runs {
        #[serde(default)]
        runs: Vec<PastRun>,
    }
    let text = crate::fs::read(&file(run_dir)).unwrap_or_default();
    let mut runs =
        serde_json::from_slice::<Runs>(&text).map_or_else(|_| Vec::new(), |past| past.runs);
    runs.drain(..runs.len().saturating_sub(MOST_RUNS - 1));
    runs
}

/// Answers that earlier runs have recorded in this folder, as far as the summary tells.
pub fn recorded_before(run_dir: &Path) -> u64 {
    let runs = past_runs(run_dir);
    runs.iter().map(|run| run.ok + run.quarantined).sum()
}

/// Warns where earlier runs have recorded answers and the cache is empty: it may have been moved.
pub(crate) fn warn_of_empty_cache(run_dir: &Path, cache_dir: &Path, records: usize) {
    let before = recorded_before(run_dir);
    if records == 0 && before > 0 {
        tracing::warn!(
            "earlier runs have recorded {} answers, and the cache in {} is empty: they are bought again; if it \
             was moved or compressed by hand, stop this run and put it back",
            format_count(before),
            cache_dir.display()
        );
    }
}

pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("summary.json")
}

impl HarvestSummary {
    /// The summary of a run in which all went well; otherwise its error.
    pub fn into_result(mut self) -> Result<HarvestSummary> {
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok(self),
        }
    }

    /// Rows that have ended, cached ones included.
    pub fn done(&self) -> u64 {
        self.cached + self.ok + self.quarantined + self.failed
    }

    /// Counts an answer.
    pub fn add(&mut self, seen: &AnswerFacts, wants_logprobs: bool) {
        match seen.status {
            Status::Ok => self.ok += 1,
            Status::Quarantined => {
                self.quarantined += 1;
                *self.quarantines.entry(seen.reason.clone()).or_default() += 1;
            }
        }
        if let Some(usage) = &seen.usage {
            self.usage.add(usage);
        }
        self.cut_off += u64::from(seen.is_cut_off);
        // What has no text to train on has no tokens either.
        let is_asked = wants_logprobs && seen.text.1 > 0;
        if let Some(why) = seen.without_logprobs.as_ref().filter(|_| is_asked) {
            self.without_logprobs += 1;
            *self
                .without_logprobs_because
                .entry(why.clone())
                .or_default() += 1;
        }
    }

    /// Logs a warning about the answers, and adds it to the summary.
    pub fn warn(&mut self, text: String) {
        tracing::warn!("{text}");
        self.warnings.push(text);
    }

    /// A row ends without an answer.
    pub fn fail(&mut self, row: FailedRow) {
        self.failed += 1;
        *self.failures.entry(row.class.clone()).or_default() += 1;
        self.failed_rows.push(row);
    }

    /// What is known before anything is asked.
    pub fn from_plan(plan: &Plan, unanswered: &Unanswered) -> HarvestSummary {
        let mut summary = HarvestSummary {
            total: plan.total,
            cached: plan.cached,
            repeated: plan.repeated,
            ..HarvestSummary::default()
        };
        for (endpoint, row) in &plan.given_up {
            let of_old = || unanswered.get(row.old_key.as_deref()?);
            let known = unanswered.get(&row.key).or_else(of_old).cloned();
            let known = known.unwrap_or_default();
            summary.fail(FailedRow::given_up(plan, *endpoint, row, known));
        }
        summary
    }

    /// A content filter refuses a row: it ends without an answer, and is not asked again.
    pub fn filtered(&mut self, row: FailedRow) {
        self.quarantined += 1;
        *self.quarantines.entry(row.class.clone()).or_default() += 1;
        self.failed_rows.push(row);
    }

    /// Rows that failed keep a run from having succeeded.
    pub fn error_of_rows(&self, run_dir: &Path) -> Option<anyhow::Error> {
        let message = format!(
            "{} of {} rows failed: see {}",
            self.failed,
            self.total,
            failures::file(run_dir).display()
        );
        (self.failed > 0).then(|| Exit::SomeFailed(message).into())
    }
}
