//! The life of a batch as a function of time. Pure. Times are virtual seconds since the start.

use crate::mock::script::batch::{BatchOutcome, BatchScript};

/// What decides about a batch's life.
#[derive(Debug, Clone)]
pub(crate) struct BatchLifecycle {
    pub created: f64,
    /// When it expires, after its creation.
    pub window: f64,
    pub rows: usize,
    /// Whether validation finds something.
    pub is_invalid: bool,
    /// When its client asked for its end.
    pub cancelled: Option<f64>,
}

/// A batch at one moment. Stamps are those of what has happened by then.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct BatchSnapshot {
    pub status: BatchStatus,
    /// Rows that have been worked on.
    pub done: usize,
    pub in_progress_at: Option<f64>,
    pub finalizing_at: Option<f64>,
    pub cancelling_at: Option<f64>,
    /// When it came to the end that `status` tells, if it did.
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

    /// Whether nothing more can become of it.
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
        self.created + self.window
    }

    /// How the batch stands at `now`.
    pub(crate) fn at(&self, script: &BatchScript, now: f64) -> BatchSnapshot {
        let validated = self.created + script.validating_s;
        let (stopped, end) = self.stop(script, validated);
        let is_cancel = end == BatchStatus::Cancelled;
        let tidying = match is_cancel {
            true => script.cancelling_s,
            false => script.finalizing_s,
        };
        // A batch that is cancelled early is never validated.
        let works = validated <= now.min(stopped) && !self.is_invalid;
        let mut snapshot = BatchSnapshot {
            status: match works {
                true => BatchStatus::InProgress,
                false => BatchStatus::Validating,
            },
            done: if works {
                self.done(script, now.min(stopped))
            } else {
                0
            },
            in_progress_at: works.then_some(validated),
            ..BatchSnapshot::default()
        };
        if now < stopped {
            return snapshot;
        }
        if end == BatchStatus::Failed {
            snapshot.status = end;
            snapshot.ended_at = Some(stopped);
            return snapshot;
        }
        match is_cancel {
            true => snapshot.cancelling_at = Some(stopped),
            false => snapshot.finalizing_at = Some(stopped),
        }
        let ended = stopped + tidying;
        snapshot.status = match (now < ended, is_cancel) {
            (true, true) => BatchStatus::Cancelling,
            (true, false) => BatchStatus::Finalizing,
            (false, _) => end,
        };
        snapshot.ended_at = (now >= ended).then_some(ended);
        snapshot
    }

    /// When work stops, and what that leads to.
    fn stop(&self, script: &BatchScript, validated: f64) -> (f64, BatchStatus) {
        let scripted = match script.outcome {
            _ if self.is_invalid => (validated, BatchStatus::Failed),
            BatchOutcome::Failed => (validated, BatchStatus::Failed),
            BatchOutcome::Completed => (validated + script.in_progress_s, BatchStatus::Completed),
            BatchOutcome::Expired => (f64::INFINITY, BatchStatus::Expired),
            BatchOutcome::Cancelled => (
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
            .fold(
                scripted,
                |first, other| if other.0 < first.0 { other } else { first },
            )
    }

    /// Rows that are done after work until `until`. One that shall expire gets stuck halfway.
    fn done(&self, script: &BatchScript, until: f64) -> usize {
        let worked = until - self.created - script.validating_s;
        let share = match script.in_progress_s > 0.0 {
            true => (worked / script.in_progress_s).clamp(0.0, 1.0),
            false => 1.0,
        };
        let share = match script.outcome {
            BatchOutcome::Expired => share.min(0.5),
            _ => share,
        };
        // Against 2.9999999 of a sum of times.
        (share * self.rows as f64 + 1e-6).floor() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifecycle() -> BatchLifecycle {
        BatchLifecycle {
            created: 1000.0,
            window: 86_400.0,
            rows: 4,
            is_invalid: false,
            cancelled: None,
        }
    }

    /// The status and the rows done at each of these seconds after the creation.
    #[track_caller]
    fn check(
        lifecycle: &BatchLifecycle,
        script: &BatchScript,
        expected: &[(f64, BatchStatus, usize)],
    ) {
        for &(second, status, done) in expected {
            let snapshot = lifecycle.at(script, lifecycle.created + second);
            assert_eq!(
                (snapshot.status, snapshot.done),
                (status, done),
                "at {second} s"
            );
            assert_eq!(snapshot.status.is_final(), snapshot.ended_at.is_some());
        }
    }

    #[test]
    fn a_good_batch_goes_its_way() {
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
    fn a_bad_one_fails_once_it_is_validated() {
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
            outcome: BatchOutcome::Failed,
            ..BatchScript::default()
        };
        check(&lifecycle(), &script, &expected);
    }

    #[test]
    fn the_window_closes_on_what_is_done() {
        let stuck = BatchScript {
            outcome: BatchOutcome::Expired,
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
    fn a_cancelled_one_keeps_what_is_done() {
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
            outcome: BatchOutcome::Cancelled,
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
