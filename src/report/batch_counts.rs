//! Counters of a run in batch mode.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::terminal::{format_count, sanitise};

/// Counters of the batches of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct BatchCounts {
    /// Number of batches, by the last status that the endpoint reported.
    pub parts: BTreeMap<String, u64>,
    /// Number of batches whose creation succeeded although the reply was lost. They were found by the nonce in their
    /// metadata.
    pub adopted: u64,
    /// Number of rows that a batch left unanswered, and that are requested again.
    #[serde(rename = "asked_again")]
    pub requeued_rows: u64,
    /// Number of rows of completed batches that are neither in the output file nor in the error file.
    pub lost: u64,
    /// Number of result lines that were ignored: their row is unknown, or it already has a result and the line is not
    /// its first answer.
    pub ignored: u64,
    /// Number of recorded answers to prompts outside this run's plan.
    #[serde(rename = "besides")]
    pub unplanned_answers: u64,
}

impl BatchCounts {
    /// Returns the rows of the summary's table: name and number.
    pub fn rows(&self) -> Vec<[String; 2]> {
        let count = |name: &str, number| [name.to_string(), format_count(number)];
        let mut rows = vec![count("batches", self.parts.values().sum())];
        for (status, &number) in &self.parts {
            rows.push(count(&format!("  {}", sanitise(status)), number));
        }
        for (name, number) in [
            ("  found by their nonce", self.adopted),
            ("rows requested again", self.requeued_rows),
            ("  lost in batches", self.lost),
            ("lines ignored", self.ignored),
            ("answers to other prompts", self.unplanned_answers),
        ] {
            if number > 0 {
                rows.push(count(name, number));
            }
        }
        rows
    }
}
