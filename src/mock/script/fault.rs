//! `[[faults]]`: faults and their conditions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::mock::script::fault_kind::FaultKind;
use crate::mock::script::limits::RetryAfter;
use crate::mock::script::values::{is_valid_amount, require};

/// A fault and its conditions: `first`, `share`, `from_s`, `to_s`, `path` and `matching`. The fault applies to a
/// request if all conditions that are set hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptedFault {
    pub kind: FaultKind,
    /// Number of attempts with the same body, counted from the first one, to which the fault applies. Attempts that a
    /// rate limit rejects do not count.
    pub first: Option<u32>,
    /// Probability that the fault applies to a request.
    pub share: Option<f64>,
    /// Start of the fault, in seconds since the start of the mock.
    pub from_s: Option<f64>,
    /// End of the fault, in seconds since the start of the mock.
    pub to_s: Option<f64>,
    /// Text that the path must contain. If unset, the fault applies only to chat requests and batch rows.
    pub path: Option<String>,
    /// Text that the last message must contain.
    pub matching: Option<String>,
    /// Seconds before the response. By default 0 for errors, and the latency of the answer for corrupt answers.
    pub after_s: Option<f64>,
    /// Seconds between the bytes of `drip` (1 by default) and of `blank lines` (sent at once by default).
    pub interval_s: Option<f64>,
    /// Number of bytes of `huge body`, depth of `deep json`, or number of `blank lines`. Each kind has a default.
    pub size: Option<usize>,
    /// Headers to add to the reply. They replace headers of the same name.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Body of the reply, which replaces the body of the kind.
    pub body: Option<String>,
    /// Format in which an error states how long to wait. None by default.
    pub retry_after: Option<RetryAfter>,
    /// Number of seconds to wait that `retry_after` states; 1 by default.
    pub retry_after_s: Option<f64>,
    /// True if the request is billed. By default, corrupt answers are billed and errors are not.
    pub billed: Option<bool>,
}

impl ScriptedFault {
    /// Creates a fault of this kind that applies to all chat requests and batch rows.
    pub fn new(kind: FaultKind) -> Self {
        Self {
            kind,
            first: None,
            share: None,
            from_s: None,
            to_s: None,
            path: None,
            matching: None,
            after_s: None,
            interval_s: None,
            size: None,
            headers: BTreeMap::new(),
            body: None,
            retry_after: None,
            retry_after_s: None,
            billed: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        require(
            self.share.is_none_or(|share| (0.0..=1.0).contains(&share)),
            "share",
            "must be from 0 to 1",
        )?;
        let times = [
            ("from_s", self.from_s),
            ("to_s", self.to_s),
            ("after_s", self.after_s),
            ("interval_s", self.interval_s),
            ("retry_after_s", self.retry_after_s),
        ];
        for (key, seconds) in times {
            let is_valid = seconds.is_none_or(is_valid_amount);
            require(is_valid, key, "must be from 0 to 1e9 seconds")?;
        }
        // A control character could end the header and start another.
        let has_no_control_characters = |text: &String| text.bytes().all(|byte| byte >= b' ');
        require(
            self.headers.iter().all(|(name, value)| {
                has_no_control_characters(name) && has_no_control_characters(value)
            }),
            "headers",
            "must not contain control characters",
        )
    }
}
