//! What became of the batches of a run.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::terminal::{format_count, sanitise};

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct BatchCounts {
    /// Batches by their status, as the endpoint told it last.
    pub parts: BTreeMap<String, u64>,
    /// Batches whose creation had no reply, found by their nonce.
    pub adopted: u64,
    /// Rows that a batch gave back without an answer, and that went into another one.
    pub asked_again: u64,
    /// Rows that were in neither file of a completed batch.
    pub lost: u64,
    /// Lines that named no row of their batch, or one that had ended.
    pub ignored: u64,
    /// Answers to prompts that this run does not ask; recorded all the same.
    pub besides: u64,
}

impl BatchCounts {
    /// For the summary's table.
    pub fn rows(&self) -> Vec<[String; 2]> {
        let count = |name: &str, number| [name.to_string(), format_count(number)];
        let mut rows = vec![count("batches", self.parts.values().sum())];
        for (status, &number) in &self.parts {
            rows.push(count(&format!("  {}", sanitise(status)), number));
        }
        for (name, number) in [
            ("  found by their nonce", self.adopted),
            ("rows asked again", self.asked_again),
            ("  lost in batches", self.lost),
            ("lines ignored", self.ignored),
            ("answers to other prompts", self.besides),
        ] {
            if number > 0 {
                rows.push(count(name, number));
            }
        }
        rows
    }
}
