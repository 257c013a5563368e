//! The script of a mock: a TOML file. `tests/mock/example.toml` documents every key.
//!
//! ```toml
//! seed = 1                  # the same seed, bodies and attempts: the same latencies and faults
//! model = "mock"
//! [answers]                 # valid answers, and which requests are rejected
//! [limits]                  # limits per minute, per day and of concurrency, and their headers
//! [[faults]]                # faults and their conditions; the first that matches applies
//! [batch]                   # the batch API, on a virtual clock
//! ```

pub(crate) mod answers;
pub(crate) mod batch;
pub mod fault;
pub mod fault_kind;
pub(crate) mod limits;

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use crate::mock::script::answers::{AcceptedMaxTokens, AnswerScript, AnswerText, TokenUnit};
pub use crate::mock::script::batch::{BatchOutcome, BatchScript, RequestCountsMode};
pub use crate::mock::script::fault::ScriptedFault;
pub use crate::mock::script::fault_kind::FaultKind;
pub use crate::mock::script::limits::{
    HeaderDialect, LimitChange, LimitScript, LimitWindow, RetryAfter, TokenCounting,
};

use crate::config::error::{describe, usage};

/// Hint of error messages.
const WHERE_KEYS_ARE: &str = "tests/mock/example.toml documents every key";

/// The behaviour of a mock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Script {
    /// Seed of all random numbers. They also depend on the request body and its number of attempts,
    /// but not on the order in which requests arrive.
    pub seed: u64,
    /// Model name that requests must use; `*` accepts every name.
    pub model: String,
    /// Bearer key that requests must send.
    pub key: Option<String>,
    /// Number of server threads.
    pub threads: usize,
    pub answers: AnswerScript,
    pub limits: LimitScript,
    pub faults: Vec<ScriptedFault>,
    pub batch: BatchScript,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            seed: 1,
            model: "mock".into(),
            key: None,
            threads: 1,
            answers: AnswerScript::default(),
            limits: LimitScript::default(),
            faults: Vec::new(),
            batch: BatchScript::default(),
        }
    }
}

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

    fn is_valid(self) -> bool {
        let [low, high] = match self {
            NumberRange::Exactly(value) => [value; 2],
            NumberRange::Between(ends) => ends,
        };
        is_valid_time(low) && is_valid_time(high) && low <= high
    }
}

impl Script {
    /// Reads the script at `path`.
    ///
    /// # Errors
    /// [`crate::exit::Exit::MockUsage`], with file, line, column and the nearest key, where something
    /// does not fit.
    pub fn load(path: &Path) -> Result<Script> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            usage(format!(
                "cannot read the script {}: {error}; copy tests/mock/example.toml to start one",
                path.display()
            ))
        })?;
        Script::parse(path, &text)
    }

    /// Parses the text of a script; `path` is used only in error messages.
    ///
    /// # Errors
    /// As [`Script::load`].
    pub fn parse(path: &Path, text: &str) -> Result<Script> {
        let script: Script =
            toml::from_str(text).map_err(|error| describe(path, text, &error, WHERE_KEYS_ARE))?;
        script
            .check()
            .map_err(|message| usage(format!("{}: {message}", path.display())))?;
        Ok(script)
    }

    /// Returns the name in the list of models.
    pub fn model_name(&self) -> &str {
        match self.model.as_str() {
            "*" => "mock",
            name => name,
        }
    }

    /// Checks what the types cannot express.
    fn check(&self) -> Result<(), String> {
        require(self.threads > 0, "threads", "must be at least 1")?;
        self.answers.check()?;
        self.limits.check()?;
        self.batch.check()?;
        for (index, fault) in self.faults.iter().enumerate() {
            fault
                .check()
                .map_err(|message| format!("faults[{index}].{message}"))?;
        }
        Ok(())
    }
}

/// Whether a number of seconds is not negative and small enough for a clock.
fn is_valid_time(seconds: f64) -> bool {
    (0.0..=1e9).contains(&seconds)
}

/// Returns an error that names `key`, unless `holds`.
fn require(holds: bool, key: &str, rule: &str) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(format!("{key} {rule}"))
    }
}
