//! TODO

use crate::mock::script::Script;
use std::time::Duration;

/// What the desk needs to know of the moment.
pub(crate) struct BatchContext<'a> {
    pub script: &'a Script,
    /// Since the start.
    pub at: Duration,
    /// Unix time of the start, in seconds.
    pub started: i64,
}

impl BatchContext<'_> {
    /// Virtual seconds since the start.
    pub(crate) fn now(&self) -> f64 {
        self.at.as_secs_f64() * self.script.batch.clock
    }

    /// Unix time as it is at so many virtual seconds.
    pub(crate) fn stamp(&self, at: f64) -> i64 {
        self.started + at as i64
    }
}
