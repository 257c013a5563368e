//! Types of values in a script, and checks of their range.

use serde::{Deserialize, Serialize};

/// Last part of the error messages about unknown keys and kinds.
pub(crate) const KEYS_HINT: &str = "tests/mock/example.toml documents every key";

/// A number, or a range from which each request draws a number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number, or [low, high]")]
pub enum NumberRange {
    Exactly(f64),
    Between([f64; 2]),
}

impl NumberRange {
    /// Returns the number in the range that corresponds to `random`, which is uniform in [0, 1).
    pub fn sample(self, random: f64) -> f64 {
        match self {
            NumberRange::Exactly(value) => value,
            NumberRange::Between([low, high]) => low + (high - low) * random,
        }
    }

    pub(crate) fn is_valid(self) -> bool {
        let [low, high] = match self {
            NumberRange::Exactly(value) => [value; 2],
            NumberRange::Between(bounds) => bounds,
        };
        is_valid_amount(low) && is_valid_amount(high) && low <= high
    }
}

/// Returns true if `amount` is from 0 to 1e9, so that a clock can represent that number of seconds.
pub(crate) fn is_valid_amount(amount: f64) -> bool {
    (0.0..=1e9).contains(&amount)
}

/// Returns the error "`key` `rule`" if `is_valid` is false.
pub(crate) fn require(is_valid: bool, key: &str, rule: &str) -> Result<(), String> {
    if is_valid {
        Ok(())
    } else {
        Err(format!("{key} {rule}"))
    }
}
