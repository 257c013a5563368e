//! `[batch]`: the batch API, on a virtual clock.

use serde::{Deserialize, Serialize};

use crate::mock::script::values::{is_valid_amount, require};

/// The final status of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScriptedOutcome {
    Completed,
    /// Fails at the end of validation, with an error that names a line.
    Failed,
    /// Expires at the end of the completion window, with at most half of the rows processed.
    Expired,
    /// Cancelled by the endpoint when half of the rows are processed.
    Cancelled,
}

/// How `request_counts` is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestCountsMode {
    /// The actual counts.
    Right,
    /// All processed rows count as completed. When the batch has ended, all rows count as completed, even rows that
    /// failed or are in no file.
    AllCompleted,
    Zero,
    Null,
}

/// The section `[batch]`. Times are in virtual seconds, except `missing_s`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchScript {
    /// Number of virtual seconds per real second.
    pub clock: f64,
    pub validating_s: f64,
    /// Time to process all rows of a batch, one after another.
    pub in_progress_s: f64,
    pub finalizing_s: f64,
    pub cancelling_s: f64,
    pub outcome: ScriptedOutcome,
    /// Number of rows of each batch that are in the error file. Their lines have three formats in turn.
    pub error_rows: usize,
    /// Number of rows of each batch that are in neither result file.
    pub lost_rows: usize,
    pub request_counts: RequestCountsMode,
    /// Status to report instead of `in_progress`.
    pub status: Option<String>,
    /// Real seconds after an upload during which the file is "not found".
    pub missing_s: f64,
    /// Number of batches, counted from the first, whose creation succeeds but whose reply is lost.
    pub lost_creates: u32,
    /// Maximum number of tokens in all unfinished batches; a batch that exceeds it fails.
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
            outcome: ScriptedOutcome::Completed,
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
        let amounts = [
            ("batch.clock", self.clock),
            ("batch.validating_s", self.validating_s),
            ("batch.in_progress_s", self.in_progress_s),
            ("batch.finalizing_s", self.finalizing_s),
            ("batch.cancelling_s", self.cancelling_s),
            ("batch.missing_s", self.missing_s),
        ];
        for (key, amount) in amounts {
            require(is_valid_amount(amount), key, "must be from 0 to 1e9")?;
        }
        Ok(())
    }
}
