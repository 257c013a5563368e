//! The script of a mock: a TOML file. `tests/mock/example.toml` documents every key.
//!
//! ```toml
//! seed = 1                  # latencies and faults depend on it, on the body, and on the number of attempts
//! model = "mock"
//! [answers]                 # the content of answers, and the request fields that are rejected
//! [limits]                  # limits per minute, per day and on concurrent requests, and rate-limit headers
//! [[faults]]                # faults and their conditions; the first entry whose conditions hold applies
//! [batch]                   # the batch API, on a virtual clock
//! ```

pub(crate) mod answers;
pub(crate) mod batch;
pub mod fault;
pub mod fault_kind;
pub(crate) mod limits;
pub(crate) mod values;

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::config::error::{describe, usage};
use crate::mock::script::answers::AnswerScript;
use crate::mock::script::batch::BatchScript;
use crate::mock::script::fault::ScriptedFault;
use crate::mock::script::limits::LimitScript;
use crate::mock::script::values::{KEYS_HINT, require};

/// The behaviour of a mock, as a script file sets it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Script {
    /// Seed of all random numbers. They also depend on the request body and on the number of attempts with that body,
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

impl Script {
    /// Reads the script at `path`.
    ///
    /// # Errors
    /// [`crate::exit::Exit::Usage`], which names the file. For invalid TOML, a wrong type or an unknown key, the error
    /// also has line and column. For an unknown key, it also suggests the most similar key.
    pub fn load(path: &Path) -> Result<Script> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            usage(format!(
                "cannot read the script {}: {error}; copy tests/mock/example.toml as a starting point",
                path.display()
            ))
        })?;
        Script::parse(path, &text)
    }

    /// Parses the text of a script; `path` is used only in error messages.
    ///
    /// # Errors
    /// The same as [`Script::load`].
    pub fn parse(path: &Path, text: &str) -> Result<Script> {
        let script: Script =
            toml::from_str(text).map_err(|error| describe(path, text, &error, KEYS_HINT))?;
        script
            .check()
            .map_err(|message| usage(format!("{}: {message}", path.display())))?;
        Ok(script)
    }

    /// Returns the model name that `/v1/models` lists.
    pub fn model_name(&self) -> &str {
        match self.model.as_str() {
            "*" => "mock",
            name => name,
        }
    }

    /// Checks the ranges of the values.
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
