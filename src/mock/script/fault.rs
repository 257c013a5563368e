//! `[[faults]]`: the faults and their conditions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::mock::script::fault_kind::FaultKind;
use crate::mock::script::limits::RetryAfter;
use crate::mock::script::values::{is_valid_time, require};

/// A fault. It applies if all its conditions hold; without conditions it always applies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptedFault {
    pub kind: FaultKind,
    /// Number of first attempts with the same body to which the fault applies. Requests that a limit
    /// rejects do not count.
    pub first: Option<u32>,
    /// Probability that the fault applies to a request.
    pub share: Option<f64>,
    /// Start of the fault, in seconds since the start of the mock.
    pub from_s: Option<f64>,
    /// End of the fault (exclusive), in seconds since the start of the mock.
    pub to_s: Option<f64>,
    /// Substring of the path. Without it, the fault applies only to chat requests and batch rows.
    pub path: Option<String>,
    /// Substring of the last message.
    pub matching: Option<String>,
    /// Delay of the response; by default none for errors, the answer's latency for corrupt answers.
    pub after_s: Option<f64>,
    /// Seconds between the bytes of `drip` and `blank lines`.
    pub interval_s: Option<f64>,
    /// Bytes of `huge body`, depth of `deep json`, number of `blank lines`.
    pub size: Option<usize>,
    /// Headers to send; they replace the kind's own headers of the same name.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Body that replaces the kind's own.
    pub body: Option<String>,
    /// Format of the wait that an error tells.
    pub retry_after: Option<RetryAfter>,
    /// Seconds of that wait.
    pub retry_after_s: Option<f64>,
    /// Whether the request is billed; by default if it had an answer.
    pub billed: Option<bool>,
}

impl ScriptedFault {
    /// Makes a fault of this kind without conditions.
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
            "must be between 0 and 1",
        )?;
        let times = [
            ("from_s", self.from_s),
            ("to_s", self.to_s),
            ("after_s", self.after_s),
            ("interval_s", self.interval_s),
            ("retry_after_s", self.retry_after_s),
        ];
        for (key, seconds) in times {
            let fits = seconds.is_none_or(is_valid_time);
            require(fits, key, "must be finite and at least 0")?;
        }
        // A control character could end the header and start another.
        let is_plain = |text: &String| text.bytes().all(|byte| byte >= b' ');
        require(
            self.headers
                .iter()
                .all(|(name, value)| is_plain(name) && is_plain(value)),
            "headers",
            "must not contain control characters",
        )
    }
}
