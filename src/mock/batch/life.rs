//! The life of a batch as a function of time. Pure. Times are virtual seconds since the start.

use crate::mock::script::batch::{Batch, Outcome};

/// What decides about a batch's life.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    pub created: f64,
    /// When it expires, after its creation.
    pub window: f64,
    pub rows: usize,
    /// Whether validation finds something.
    pub is_bad: bool,
    /// When its client asked for its end.
    pub cancelled: Option<f64>,
}

/// A batch at one moment. Stamps are those of what has happened by then.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Moment {
    pub status: Status,
    /// Rows that have been worked on.
    pub done: usize,
    pub in_progress_at: Option<f64>,
    pub finalizing_at: Option<f64>,
    pub cancelling_at: Option<f64>,
    /// When it came to the end that `status` tells, if it did.
    pub ended_at: Option<f64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Status {
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

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Status::Validating => "validating",
            Status::Failed => "failed",
            Status::InProgress => "in_progress",
            Status::Finalizing => "finalizing",
            Status::Completed => "completed",
            Status::Expired => "expired",
            Status::Cancelling => "cancelling",
            Status::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more can become of it.
    pub(crate) fn is_end(self) -> bool {
        matches!(
            self,
            Status::Failed | Status::Completed | Status::Expired | Status::Cancelled
        )
    }
}

impl Life {
    pub(crate) fn expires(&self) -> f64 {
        self.created + self.window
    }

    /// How the batch stands at `now`.
    pub(crate) fn at(&self, script: &Batch, now: f64) -> Moment {
        let validated = self.created + script.validating_s;
        let (stopped, end) = self.stop(script, validated);
        let is_cancel = end == Status::Cancelled;
        let tidying = match is_cancel {
            true => script.cancelling_s,
            false => script.finalizing_s,
        };
        // A batch that is cancelled early is never validated.
        let works = validated <= now.min(stopped) && !self.is_bad;
        let mut moment = Moment {
            status: match works {
                true => Status::InProgress,
                false => Status::Validating,
            },
            done: if works {
                self.done(script, now.min(stopped))
            } else {
                0
            },
            in_progress_at: works.then_some(validated),
            ..Moment::default()
        };
        if now < stopped {
            return moment;
        }
        if end == Status::Failed {
            moment.status = end;
            moment.ended_at = Some(stopped);
            return moment;
        }
        match is_cancel {
            true => moment.cancelling_at = Some(stopped),
            false => moment.finalizing_at = Some(stopped),
        }
        let ended = stopped + tidying;
        moment.status = match (now < ended, is_cancel) {
            (true, true) => Status::Cancelling,
            (true, false) => Status::Finalizing,
            (false, _) => end,
        };
        moment.ended_at = (now >= ended).then_some(ended);
        moment
    }

    /// When work stops, and what that leads to.
    fn stop(&self, script: &Batch, validated: f64) -> (f64, Status) {
        let scripted = match script.outcome {
            _ if self.is_bad => (validated, Status::Failed),
            Outcome::Failed => (validated, Status::Failed),
            Outcome::Completed => (validated + script.in_progress_s, Status::Completed),
            Outcome::Expired => (f64::INFINITY, Status::Expired),
            Outcome::Cancelled => (validated + script.in_progress_s / 2.0, Status::Cancelled),
        };
        let expired = (self.expires(), Status::Expired);
        let cancelled = (self.cancelled.unwrap_or(f64::INFINITY), Status::Cancelled);
        [expired, cancelled]
            .into_iter()
            .fold(
                scripted,
                |first, other| if other.0 < first.0 { other } else { first },
            )
    }

    /// Rows that are done after work until `until`. One that shall expire gets stuck halfway.
    fn done(&self, script: &Batch, until: f64) -> usize {
        let worked = until - self.created - script.validating_s;
        let share = match script.in_progress_s > 0.0 {
            true => (worked / script.in_progress_s).clamp(0.0, 1.0),
            false => 1.0,
        };
        let share = match script.outcome {
            Outcome::Expired => share.min(0.5),
            _ => share,
        };
        // Against 2.9999999 of a sum of times.
        (share * self.rows as f64 + 1e-6).floor() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life() -> Life {
        Life {
            created: 1000.0,
            window: 86_400.0,
            rows: 4,
            is_bad: false,
            cancelled: None,
        }
    }

    /// The status and the rows done at each of these seconds after the creation.
    #[track_caller]
    fn check(life: &Life, script: &Batch, expected: &[(f64, Status, usize)]) {
        for &(second, status, done) in expected {
            let moment = life.at(script, life.created + second);
            assert_eq!(
                (moment.status, moment.done),
                (status, done),
                "at {second} s"
            );
            assert_eq!(moment.status.is_end(), moment.ended_at.is_some());
        }
    }

    #[test]
    fn a_good_batch_goes_its_way() {
        check(
            &life(),
            &Batch::default(),
            &[
                (0.0, Status::Validating, 0),
                (60.0, Status::InProgress, 0),
                (960.0, Status::InProgress, 1),
                (3659.0, Status::InProgress, 3),
                (3660.0, Status::Finalizing, 4),
                (3720.0, Status::Completed, 4),
                (1e9, Status::Completed, 4),
            ],
        );
    }

    #[test]
    fn a_bad_one_fails_once_it_is_validated() {
        let expected = [(59.0, Status::Validating, 0), (60.0, Status::Failed, 0)];
        let bad = Life {
            is_bad: true,
            ..life()
        };
        check(&bad, &Batch::default(), &expected);
        let script = Batch {
            outcome: Outcome::Failed,
            ..Batch::default()
        };
        check(&life(), &script, &expected);
    }

    #[test]
    fn the_window_closes_on_what_is_done() {
        let stuck = Batch {
            outcome: Outcome::Expired,
            ..Batch::default()
        };
        let slow = Batch {
            in_progress_s: 2.0 * (86_400.0 - 60.0),
            ..Batch::default()
        };
        for script in [stuck, slow] {
            check(
                &life(),
                &script,
                &[
                    (
                        86_399.0,
                        Status::InProgress,
                        if script.in_progress_s > 1e5 { 1 } else { 2 },
                    ),
                    (86_400.0, Status::Finalizing, 2),
                    (86_460.0, Status::Expired, 2),
                ],
            );
        }
    }

    #[test]
    fn a_cancelled_one_keeps_what_is_done() {
        let cancelled = |at: f64| Life {
            cancelled: Some(1000.0 + at),
            ..life()
        };
        let script = Batch::default();
        let early = [
            (30.0, Status::Cancelling, 0),
            (90.0, Status::Cancelled, 0),
            (9000.0, Status::Cancelled, 0),
        ];
        check(&cancelled(30.0), &script, &early);
        let late = [
            (2000.0, Status::InProgress, 2),
            (2800.0, Status::Cancelling, 3),
            (2860.0, Status::Cancelled, 3),
            (9000.0, Status::Cancelled, 3),
        ];
        check(&cancelled(2800.0), &script, &late);
        let scripted = Batch {
            outcome: Outcome::Cancelled,
            ..Batch::default()
        };
        check(
            &life(),
            &scripted,
            &[
                (1860.0, Status::Cancelling, 2),
                (1920.0, Status::Cancelled, 2),
            ],
        );
    }
}
