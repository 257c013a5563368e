//! Values of the script and their checks.

use serde::{Deserialize, Serialize};

/// Hint of error messages.
pub(crate) const KEYS_HINT: &str = "tests/mock/example.toml documents every key";

/// A number, or a range from which each request draws a number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number, or [low, high]")]
pub enum NumberRange {
    Exactly(f64),
    Between([f64; 2]),
}

impl NumberRange {
    /// Maps `random`, uniform in [0, 1), to the range.
    pub fn at(self, random: f64) -> f64 {
        match self {
            NumberRange::Exactly(value) => value,
            NumberRange::Between([low, high]) => low + (high - low) * random,
        }
    }

    pub(crate) fn is_valid(self) -> bool {
        let [low, high] = match self {
            NumberRange::Exactly(value) => [value; 2],
            NumberRange::Between(ends) => ends,
        };
        is_valid_time(low) && is_valid_time(high) && low <= high
    }
}

/// Whether a number of seconds is not negative and small enough for a clock.
pub(crate) fn is_valid_time(seconds: f64) -> bool {
    (0.0..=1e9).contains(&seconds)
}

/// Returns an error that names `key`, unless `holds`.
pub(crate) fn require(holds: bool, key: &str, rule: &str) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(format!("{key} {rule}"))
    }
}
