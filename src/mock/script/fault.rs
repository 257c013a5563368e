//! `[[faults]]`: what goes wrong, and when.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::mock::script::fault_kind::FaultKind;
use crate::mock::script::limits::RetryAfter;
use crate::mock::script::{is_time, require};

/// Something that goes wrong. Of its conditions all must hold; without any, it always does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptedFault {
    pub kind: FaultKind,
    /// The first so many requests with the same body that the limits let in.
    pub first: Option<u32>,
    /// Of all requests, drawn for each.
    pub share: Option<f64>,
    /// Since the start.
    pub from_s: Option<f64>,
    /// Since the start, and not included.
    pub to_s: Option<f64>,
    /// A part of the request's path. None: requests for answers, rows of batches among them.
    pub path: Option<String>,
    /// A part of the last message.
    pub matching: Option<String>,
    /// The wait before it shows. None: none for an error, an answer's latency for a bad answer.
    pub after_s: Option<f64>,
    /// Between the bytes of `drip` and `blank lines`.
    pub interval_s: Option<f64>,
    /// The length of `huge body`, the depth of `deep json`, the lines of `blank lines`.
    pub size: Option<usize>,
    /// Headers to send, besides those that the kind has or instead of them.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// The body to send in place of the kind's own.
    pub body: Option<String>,
    /// The form in which an error says when to come back.
    pub retry_after: Option<RetryAfter>,
    /// The time that it says.
    pub retry_after_s: Option<f64>,
    /// Whether the request is billed. None: where it had an answer.
    pub billed: Option<bool>,
}

impl ScriptedFault {
    /// One of this kind that always happens.
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
            "must lie between 0 and 1",
        )?;
        let times = [
            ("from_s", self.from_s),
            ("to_s", self.to_s),
            ("after_s", self.after_s),
            ("interval_s", self.interval_s),
            ("retry_after_s", self.retry_after_s),
        ];
        for (key, seconds) in times {
            let fits = seconds.is_none_or(is_time);
            require(fits, key, "must be finite and not negative")?;
        }
        // A byte of this could end the header, and begin another.
        let is_plain = |text: &String| text.bytes().all(|byte| byte >= b' ');
        require(
            self.headers
                .iter()
                .all(|(name, value)| is_plain(name) && is_plain(value)),
            "headers",
            "must not hold control characters",
        )
    }
}
