//! The script of a mock: a TOML file, of which `tests/mock/example.toml` documents every key.
//!
//! ```toml
//! seed = 1                  # the same seed, bodies and attempts: the same latencies and faults
//! model = "mock"
//! [answers]                 # what a good answer is, and which requests are refused
//! [limits]                  # what is allowed per minute, per day, at once, and how it is told
//! [[faults]]                # what goes wrong, and when; the first that applies
//! [batch]                   # the life of a batch, on a clock of its own
//! ```

pub(crate) mod answers;
pub(crate) mod batch;
pub mod fault;
pub mod fault_kind;
pub(crate) mod limits;

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use crate::mock::script::answers::{AnswerScript, AnswerText, MaxTokensField, TokenUnit};
pub use crate::mock::script::batch::{BatchOutcome, BatchScript, RequestCountsMode};
pub use crate::mock::script::fault::ScriptedFault;
pub use crate::mock::script::fault_kind::FaultKind;
pub use crate::mock::script::limits::{
    HeaderDialect, LimitChange, LimitScript, LimitWindow, RetryAfter, TokenCounting,
};

use crate::config::error::{describe, usage};

/// For who has lost the way.
const WHERE_KEYS_ARE: &str = "tests/mock/example.toml documents every key";

/// How a mock behaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Script {
    /// Everything that is drawn depends on this, on the body that asks, and on how often it came
    /// before: not on the order in which requests arrive.
    pub seed: u64,
    /// The name that requests must ask for; `*` answers to every name.
    pub model: String,
    /// The bearer key that requests must carry.
    pub key: Option<String>,
    /// Threads of the server.
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

/// A number, or a range from which each request draws one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number, or [low, high]")]
pub enum NumberRange {
    Exactly(f64),
    Between([f64; 2]),
}

impl NumberRange {
    /// `random` is uniform in [0, 1).
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
        is_time(low) && is_time(high) && low <= high
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

    /// Reads the text of a script; `path` is only told in errors.
    ///
    /// # Errors
    /// As of [`Script::load`].
    pub fn parse(path: &Path, text: &str) -> Result<Script> {
        let script: Script =
            toml::from_str(text).map_err(|error| describe(path, text, &error, WHERE_KEYS_ARE))?;
        script
            .check()
            .map_err(|mistake| usage(format!("{}: {mistake}", path.display())))?;
        Ok(script)
    }

    /// The name that the list of models has.
    pub fn model_name(&self) -> &str {
        match self.model.as_str() {
            "*" => "mock",
            name => name,
        }
    }

    /// What types cannot say.
    fn check(&self) -> Result<(), String> {
        require(self.threads > 0, "threads", "must be at least 1")?;
        self.answers.check()?;
        self.limits.check()?;
        self.batch.check()?;
        for (index, fault) in self.faults.iter().enumerate() {
            fault
                .check()
                .map_err(|mistake| format!("faults[{index}].{mistake}"))?;
        }
        Ok(())
    }
}

/// Not so long that a clock could not hold it.
fn is_time(seconds: f64) -> bool {
    (0.0..=1e9).contains(&seconds)
}

fn require(holds: bool, key: &str, rule: &str) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(format!("{key} {rule}"))
    }
}
