//! Summary of a run: its counters, and `summary.json` with the history of the run folder.

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
use crate::plan::run_settings::TrainingObstacle;
use crate::plan::unanswered::Unanswered;
use crate::report::answer_facts::AnswerFacts;
use crate::report::batch_counts::BatchCounts;
use crate::report::failures;
use crate::report::failures::FailedRow;
use crate::report::timeline::{HourStats, LimitUse};

/// Version of the JSON object that `--json` prints and `summary.json` contains.
pub(crate) const SUMMARY_VERSION: u32 = 1;

/// Counters of a run. `cached`, `ok`, `quarantined`, `failed` and `pending` add up to `total`.
#[derive(Debug, Default, Serialize)]
pub struct HarvestSummary {
    pub version: Version,
    /// Number of rows: prompts times samples, for every teacher.
    pub total: u64,
    /// Number of rows that this run does not request: answered or refused by a content filter earlier, or with the same
    /// request as another row.
    pub cached: u64,
    /// Number of rows in `cached` with the same request as another row.
    pub repeated: u64,
    pub ok: u64,
    /// Number of answers that are recorded but not used for training, and of rows that a content filter refused; by
    /// reason in `quarantines`.
    pub quarantined: u64,
    /// Number of rows that ended without an answer; by class in `failures`, in full in `failures.jsonl`.
    pub failed: u64,
    /// Number of rows in `failed` that used up `retry.max_attempts` paid attempts: only `harvest --again failed`
    /// requests them again.
    pub given_up: u64,
    /// Number of rows that have not ended; the next run resumes with them.
    pub pending: u64,
    /// Number of requests sent, retries included.
    pub requests: u64,
    pub usage: Usage,
    /// Cost of the answers of this run by their usage, in US dollars; `None` without prices.
    pub cost_usd: Option<f64>,
    /// Upper bound in US dollars for attempts of this run that may have been billed, and for answers without usage.
    pub estimated_usd: Option<f64>,
    /// Cost of all runs in this run folder in US dollars, upper bounds included.
    pub run_folder_usd: Option<f64>,
    /// `budget.usd`.
    pub budget_usd: Option<f64>,
    /// Number of attempts of this run that may have been billed without an answer.
    pub attempts_lost: u64,
    /// Duration of this run in seconds.
    pub seconds: f64,
    /// Number of answers without usable logprobs although the request asked for logprobs.
    pub without_logprobs: u64,
    /// The answers in `without_logprobs`, by reason.
    pub without_logprobs_because: BTreeMap<String, u64>,
    /// Number of answers that `sampling.max_tokens` cut off.
    pub cut_off: u64,
    /// Number of complete answers that training leaves out, because their finish reason is not in
    /// `data.keep_finish_reasons`.
    pub not_kept: u64,
    pub quarantines: BTreeMap<String, u64>,
    pub failures: BTreeMap<String, u64>,
    /// Use of the rate limits, by teacher.
    pub used: Vec<LimitUse>,
    pub hours: Vec<HourStats>,
    /// Batch mode only.
    pub batches: Option<BatchCounts>,
    /// Warnings about the answers that were logged during the run.
    pub warnings: Vec<String>,
    /// Next steps, the most urgent first.
    pub advice: Vec<String>,
    /// Number of iterations of the dispatcher's loop; tests check that it does not spin.
    #[serde(skip)]
    pub turns: u64,
    /// Dry run only: estimate for the pending rows.
    pub estimate: Option<Estimate>,
    /// Earlier runs in this folder, followed by this run.
    pub runs: Vec<PastRun>,
    /// Flags that name this config, for the commands in `advice`; see [`Config::arguments`].
    ///
    /// [`Config::arguments`]: crate::config::Config::arguments
    #[serde(skip)]
    pub arguments: String,
    /// Reason why `distill train` with this config would not train on the answers.
    #[serde(skip)]
    pub before_training: Option<TrainingObstacle>,
    /// Number of answers of a mock teacher, which `distill train` uses only if `data.groups` selects them.
    #[serde(skip)]
    pub from_mock: u64,
    /// Number of rows in `quarantined` that a content filter refused.
    #[serde(skip)]
    pub filtered_rows: u64,
    /// Rows that failed or were refused by a content filter, for `failures.jsonl`.
    #[serde(skip)]
    pub failed_rows: Vec<FailedRow>,
    /// Reason for a nonzero exit status: a fatal error, an outage, a signal, failed rows.
    #[serde(serialize_with = "as_text")]
    pub error: Option<anyhow::Error>,
}

/// The version number, by default `SUMMARY_VERSION`.
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
    /// Number of rows in `quarantined` that a content filter refused: the cache has no record of them.
    #[serde(default)]
    pub filtered: u64,
    pub failed: u64,
    pub pending: u64,
    pub requests: u64,
    pub cost_usd: Option<f64>,
    pub seconds: f64,
    pub error: Option<String>,
}

impl PastRun {
    pub(crate) fn new(summary: &HarvestSummary) -> PastRun {
        PastRun {
            at: Timing::stamp(jiff::Timestamp::now()),
            ok: summary.ok,
            quarantined: summary.quarantined,
            filtered: summary.filtered_rows,
            failed: summary.failed,
            pending: summary.pending,
            requests: summary.requests,
            cost_usd: summary.cost_usd,
            seconds: summary.seconds,
            error: summary.error.as_ref().map(|error| format!("{error:#}")),
        }
    }
}

/// Maximum number of entries in the run history; older ones are dropped.
const MAX_RUNS: usize = 1_000;

/// Returns the history in `summary.json` of the run folder: at most [`MAX_RUNS`] - 1 entries, so that this run fits.
/// Empty if the file cannot be read.
pub(crate) fn past_runs(run_dir: &Path) -> Vec<PastRun> {
    #[derive(Deserialize)]
    struct History {
        #[serde(default)]
        runs: Vec<PastRun>,
    }
    let text = crate::fs::read(&file(run_dir)).unwrap_or_default();
    let mut runs = serde_json::from_slice::<History>(&text)
        .map_or_else(|_| Vec::new(), |history| history.runs);
    runs.drain(..runs.len().saturating_sub(MAX_RUNS - 1));
    runs
}

/// Returns the number of answers that earlier runs in this folder recorded, according to `summary.json`.
pub(crate) fn recorded_before(run_dir: &Path) -> u64 {
    let runs = past_runs(run_dir);
    let recorded = |run: &PastRun| run.ok + run.quarantined.saturating_sub(run.filtered);
    runs.iter().map(recorded).sum()
}

/// Warns if the cache is empty although earlier runs have recorded answers: it may have been moved.
pub(crate) fn warn_of_empty_cache(run_dir: &Path, cache_dir: &Path, records: usize) {
    let recorded = recorded_before(run_dir);
    if records == 0 && recorded > 0 {
        tracing::warn!(
            "earlier runs recorded {} answers, but the cache in {} is empty: this run pays for them again; if the \
             cache was moved or compressed by hand, stop this run and restore it",
            format_count(recorded),
            cache_dir.display()
        );
    }
}

/// Returns the path of `summary.json`.
pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("summary.json")
}

impl HarvestSummary {
    /// Returns the summary or, if it contains an error, the error.
    pub fn into_result(mut self) -> Result<HarvestSummary> {
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok(self),
        }
    }

    /// Number of rows that have ended, cached ones included.
    pub fn done(&self) -> u64 {
        self.cached + self.ok + self.quarantined + self.failed
    }

    /// Counts an answer. `wants_logprobs` is true if its request asked for logprobs.
    pub fn add(&mut self, answer: &AnswerFacts, wants_logprobs: bool) {
        match answer.status {
            Status::Ok => self.ok += 1,
            Status::Quarantined => {
                self.quarantined += 1;
                *self.quarantines.entry(answer.reason.clone()).or_default() += 1;
            }
        }
        if let Some(usage) = &answer.usage {
            self.usage.add(usage);
        }
        self.cut_off += u64::from(answer.is_cut_off);
        self.from_mock += u64::from(answer.is_mock);
        // An empty answer has no tokens, and so no logprobs.
        let expects_logprobs = wants_logprobs && answer.text_bytes > 0;
        if let Some(reason) = &answer.without_logprobs
            && expects_logprobs
        {
            self.without_logprobs += 1;
            *self
                .without_logprobs_because
                .entry(reason.clone())
                .or_default() += 1;
        }
    }

    /// Logs a warning about the answers, and adds it to the summary.
    pub(crate) fn warn(&mut self, text: String) {
        tracing::warn!("{text}");
        self.warnings.push(text);
    }

    /// Counts a row that ended without an answer.
    pub fn fail(&mut self, row: FailedRow) {
        self.failed += 1;
        *self.failures.entry(row.class.clone()).or_default() += 1;
        self.failed_rows.push(row);
    }

    /// Creates the summary of a run before its first request. Rows that earlier runs gave up count as failed.
    pub(crate) fn from_plan(plan: &Plan, unanswered: &Unanswered) -> HarvestSummary {
        let mut summary = HarvestSummary {
            total: plan.total,
            cached: plan.cached,
            repeated: plan.repeated,
            ..HarvestSummary::default()
        };
        for (endpoint, row) in &plan.given_up {
            let from_old_key = || unanswered.get(row.old_key.as_deref()?);
            let history = unanswered.get(&row.key).or_else(from_old_key).cloned();
            let history = history.unwrap_or_default();
            summary.fail(FailedRow::given_up(plan, *endpoint, row, history));
        }
        summary
    }

    /// Counts a row that a content filter refused, as quarantined.
    pub fn filtered(&mut self, row: FailedRow) {
        self.filtered_rows += 1;
        self.quarantined += 1;
        *self.quarantines.entry(row.class.clone()).or_default() += 1;
        self.failed_rows.push(row);
    }

    /// Returns an [`Exit::SomeFailed`] error if rows failed.
    pub(crate) fn failed_rows_error(&self, run_dir: &Path) -> Option<anyhow::Error> {
        let message = format!(
            "{} of {} rows failed: see {}",
            self.failed,
            self.total,
            failures::file(run_dir).display()
        );
        (self.failed > 0).then(|| Exit::SomeFailed(message).into())
    }
}
