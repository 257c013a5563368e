//! `[batch]`: the life of a batch, on a clock of its own.

use serde::{Deserialize, Serialize};

use crate::mock::script::{is_time, require};

/// How a batch ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchOutcome {
    Completed,
    /// After validation, with an error that names a line.
    Failed,
    /// When the window closes, with the rows that were done.
    Expired,
    /// By the endpoint, halfway.
    Cancelled,
}

/// What `request_counts` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestCountsMode {
    Right,
    /// Every row completed, whatever the files say.
    AllCompleted,
    Zero,
    Null,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchScript {
    /// Virtual seconds that pass in a second. The times below are virtual.
    pub clock: f64,
    pub validating_s: f64,
    /// For all rows; they finish one after another.
    pub in_progress_s: f64,
    pub finalizing_s: f64,
    pub cancelling_s: f64,
    pub outcome: BatchOutcome,
    /// Rows that end in the error file, in three shapes in turn.
    pub error_rows: usize,
    /// Rows that end in neither file.
    pub lost_rows: usize,
    pub request_counts: RequestCountsMode,
    /// Shown in place of `in_progress`.
    pub status: Option<String>,
    /// An uploaded file is "not found" for so long; in real seconds.
    pub missing_s: f64,
    /// The first so many batches are created, and their reply is lost.
    pub lost_creates: u32,
    /// More tokens than this in batches under way: the next one fails.
    pub enqueued_tokens: Option<u64>,
    pub max_rows: usize,
    pub max_bytes: usize,
}

impl Default for BatchScript {
    fn default() -> Self {
        Self {
            clock: 1.0,
            validating_s: 60.0,
            in_progress_s: 3600.0,
            finalizing_s: 60.0,
            cancelling_s: 60.0,
            outcome: BatchOutcome::Completed,
            error_rows: 0,
            lost_rows: 0,
            request_counts: RequestCountsMode::Right,
            status: None,
            missing_s: 0.0,
            lost_creates: 0,
            enqueued_tokens: None,
            max_rows: 50_000,
            max_bytes: 200_000_000,
        }
    }
}

impl BatchScript {
    pub(crate) fn check(&self) -> Result<(), String> {
        let times = [
            ("batch.clock", self.clock),
            ("batch.validating_s", self.validating_s),
            ("batch.in_progress_s", self.in_progress_s),
            ("batch.finalizing_s", self.finalizing_s),
            ("batch.cancelling_s", self.cancelling_s),
            ("batch.missing_s", self.missing_s),
        ];
        for (key, seconds) in times {
            require(is_time(seconds), key, "must be finite and not negative")?;
        }
        Ok(())
    }
}
