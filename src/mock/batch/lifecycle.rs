//! [`BatchLifecycle`]: the status of a batch as a function of time. Pure. Times are virtual seconds since the start of
//! the mock.

use crate::mock::script::batch::{BatchScript, ScriptedOutcome};

/// The events and sizes that determine the status of a batch.
#[derive(Debug, Clone)]
pub(crate) struct BatchLifecycle {
    pub created: f64,
    /// Seconds from creation to expiry.
    pub window_s: f64,
    pub rows: usize,
    /// True if validation fails.
    pub is_invalid: bool,
    /// Time of the client's request to cancel the batch.
    pub cancelled: Option<f64>,
}

/// The state of a batch at one time. Timestamps of later events are None.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct BatchSnapshot {
    pub status: BatchStatus,
    /// Number of processed rows.
    pub processed_rows: usize,
    pub in_progress_at: Option<f64>,
    pub finalizing_at: Option<f64>,
    pub cancelling_at: Option<f64>,
    /// Time at which the batch reached its final status.
    pub ended_at: Option<f64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum BatchStatus {
    #[default]
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

impl BatchStatus {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            BatchStatus::Validating => "validating",
            BatchStatus::Failed => "failed",
            BatchStatus::InProgress => "in_progress",
            BatchStatus::Finalizing => "finalizing",
            BatchStatus::Completed => "completed",
            BatchStatus::Expired => "expired",
            BatchStatus::Cancelling => "cancelling",
            BatchStatus::Cancelled => "cancelled",
        }
    }

    /// Returns true if the status can no longer change.
    pub(crate) fn is_final(self) -> bool {
        matches!(
            self,
            BatchStatus::Failed
                | BatchStatus::Completed
                | BatchStatus::Expired
                | BatchStatus::Cancelled
        )
    }
}

impl BatchLifecycle {
    pub(crate) fn expires(&self) -> f64 {
        self.created + self.window_s
    }

    /// Returns the state of the batch at `now`.
    pub(crate) fn snapshot(&self, script: &BatchScript, now: f64) -> BatchSnapshot {
        let validated = self.created + script.validating_s;
        let (stopped, final_status) = self.end_of_processing(script, validated);
        let is_cancel = final_status == BatchStatus::Cancelled;
        let closing_s = if is_cancel {
            script.cancelling_s
        } else {
            script.finalizing_s
        };
        // A batch that is cancelled during validation never starts.
        let has_started = validated <= now.min(stopped) && !self.is_invalid;
        let mut snapshot = BatchSnapshot {
            status: if has_started {
                BatchStatus::InProgress
            } else {
                BatchStatus::Validating
            },
            processed_rows: if has_started {
                self.processed_rows(script, now.min(stopped))
            } else {
                0
            },
            in_progress_at: has_started.then_some(validated),
            ..BatchSnapshot::default()
        };
        if now < stopped {
            return snapshot;
        }
        if final_status == BatchStatus::Failed {
            snapshot.status = final_status;
            snapshot.ended_at = Some(stopped);
            return snapshot;
        }
        if is_cancel {
            snapshot.cancelling_at = Some(stopped);
        } else {
            snapshot.finalizing_at = Some(stopped);
        }
        let ended = stopped + closing_s;
        snapshot.status = match (now < ended, is_cancel) {
            (true, true) => BatchStatus::Cancelling,
            (true, false) => BatchStatus::Finalizing,
            (false, _) => final_status,
        };
        snapshot.ended_at = (now >= ended).then_some(ended);
        snapshot
    }

    /// Returns the time at which processing stops, and the final status that follows.
    fn end_of_processing(&self, script: &BatchScript, validated: f64) -> (f64, BatchStatus) {
        let scripted = match script.outcome {
            _ if self.is_invalid => (validated, BatchStatus::Failed),
            ScriptedOutcome::Failed => (validated, BatchStatus::Failed),
            ScriptedOutcome::Completed => {
                (validated + script.in_progress_s, BatchStatus::Completed)
            }
            ScriptedOutcome::Expired => (f64::INFINITY, BatchStatus::Expired),
            ScriptedOutcome::Cancelled => (
                validated + script.in_progress_s / 2.0,
                BatchStatus::Cancelled,
            ),
        };
        let expired = (self.expires(), BatchStatus::Expired);
        let cancelled = (
            self.cancelled.unwrap_or(f64::INFINITY),
            BatchStatus::Cancelled,
        );
        [expired, cancelled]
            .into_iter()
            .fold(scripted, |earliest, other| {
                if other.0 < earliest.0 {
                    other
                } else {
                    earliest
                }
            })
    }

    /// Returns the number of rows processed by the time `until`. A batch that is scripted to expire stops halfway.
    fn processed_rows(&self, script: &BatchScript, until: f64) -> usize {
        let processing_s = until - self.created - script.validating_s;
        let share = if script.in_progress_s > 0.0 {
            (processing_s / script.in_progress_s).clamp(0.0, 1.0)
        } else {
            1.0
        };
        let share = match script.outcome {
            ScriptedOutcome::Expired => share.min(0.5),
            _ => share,
        };
        // A rounding error may turn 3 rows into 2.9999999.
        (share * self.rows as f64 + 1e-6).floor() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifecycle() -> BatchLifecycle {
        BatchLifecycle {
            created: 1000.0,
            window_s: 86_400.0,
            rows: 4,
            is_invalid: false,
            cancelled: None,
        }
    }

    /// Checks the status and the number of processed rows. Each time is in seconds after the creation.
    #[track_caller]
    fn check(
        lifecycle: &BatchLifecycle,
        script: &BatchScript,
        expected: &[(f64, BatchStatus, usize)],
    ) {
        for &(second, status, done) in expected {
            let snapshot = lifecycle.snapshot(script, lifecycle.created + second);
            assert_eq!(
                (snapshot.status, snapshot.processed_rows),
                (status, done),
                "at {second} s"
            );
            assert_eq!(snapshot.status.is_final(), snapshot.ended_at.is_some());
        }
    }

    #[test]
    fn valid_batch_completes() {
        check(
            &lifecycle(),
            &BatchScript::default(),
            &[
                (0.0, BatchStatus::Validating, 0),
                (60.0, BatchStatus::InProgress, 0),
                (960.0, BatchStatus::InProgress, 1),
                (3659.0, BatchStatus::InProgress, 3),
                (3660.0, BatchStatus::Finalizing, 4),
                (3720.0, BatchStatus::Completed, 4),
                (1e9, BatchStatus::Completed, 4),
            ],
        );
    }

    #[test]
    fn invalid_batch_fails_after_validation() {
        let expected = [
            (59.0, BatchStatus::Validating, 0),
            (60.0, BatchStatus::Failed, 0),
        ];
        let bad = BatchLifecycle {
            is_invalid: true,
            ..lifecycle()
        };
        check(&bad, &BatchScript::default(), &expected);
        let script = BatchScript {
            outcome: ScriptedOutcome::Failed,
            ..BatchScript::default()
        };
        check(&lifecycle(), &script, &expected);
    }

    #[test]
    fn expired_batch_keeps_processed_rows() {
        let stuck = BatchScript {
            outcome: ScriptedOutcome::Expired,
            ..BatchScript::default()
        };
        let slow = BatchScript {
            in_progress_s: 2.0 * (86_400.0 - 60.0),
            ..BatchScript::default()
        };
        for script in [stuck, slow] {
            check(
                &lifecycle(),
                &script,
                &[
                    (
                        86_399.0,
                        BatchStatus::InProgress,
                        if script.in_progress_s > 1e5 { 1 } else { 2 },
                    ),
                    (86_400.0, BatchStatus::Finalizing, 2),
                    (86_460.0, BatchStatus::Expired, 2),
                ],
            );
        }
    }

    #[test]
    fn cancelled_batch_keeps_processed_rows() {
        let cancelled = |at: f64| BatchLifecycle {
            cancelled: Some(1000.0 + at),
            ..lifecycle()
        };
        let script = BatchScript::default();
        let early = [
            (30.0, BatchStatus::Cancelling, 0),
            (90.0, BatchStatus::Cancelled, 0),
            (9000.0, BatchStatus::Cancelled, 0),
        ];
        check(&cancelled(30.0), &script, &early);
        let late = [
            (2000.0, BatchStatus::InProgress, 2),
            (2800.0, BatchStatus::Cancelling, 3),
            (2860.0, BatchStatus::Cancelled, 3),
            (9000.0, BatchStatus::Cancelled, 3),
        ];
        check(&cancelled(2800.0), &script, &late);
        let scripted = BatchScript {
            outcome: ScriptedOutcome::Cancelled,
            ..BatchScript::default()
        };
        check(
            &lifecycle(),
            &scripted,
            &[
                (1860.0, BatchStatus::Cancelling, 2),
                (1920.0, BatchStatus::Cancelled, 2),
            ],
        );
    }
}
