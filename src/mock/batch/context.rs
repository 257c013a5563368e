//! The script and the time of a request to the batch store.

use crate::mock::script::Script;
use std::time::Duration;

/// The script and the current time.
pub(crate) struct BatchContext<'a> {
    pub script: &'a Script,
    /// Time since the start.
    pub at: Duration,
    /// Unix time of the start, in seconds.
    pub started: i64,
}

impl BatchContext<'_> {
    /// Returns the virtual seconds since the start.
    pub(crate) fn now(&self) -> f64 {
        self.at.as_secs_f64() * self.script.batch.clock
    }

    /// Converts virtual seconds since the start to Unix time.
    pub(crate) fn stamp(&self, at: f64) -> i64 {
        self.started + at as i64
    }
}
