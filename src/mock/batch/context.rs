//! [`BatchContext`]: the script, and the current time in real and virtual seconds.

use std::time::Duration;

use crate::mock::script::Script;

/// The script and the time of a request to the batch API.
pub(crate) struct BatchContext<'a> {
    pub script: &'a Script,
    /// Real time since the start of the mock.
    pub elapsed: Duration,
    /// Unix time of the start of the mock, in seconds.
    pub start_unix_s: i64,
}

impl BatchContext<'_> {
    /// Returns the number of virtual seconds since the start of the mock.
    pub(crate) fn virtual_now(&self) -> f64 {
        self.elapsed.as_secs_f64() * self.script.batch.clock
    }

    /// Converts virtual seconds since the start of the mock to Unix time.
    pub(crate) fn unix_time(&self, virtual_s: f64) -> i64 {
        self.start_unix_s + virtual_s as i64
    }
}
