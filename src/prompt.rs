//! Prompt sources and templates.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// A conversation to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// The row's `id`, or the hash of its messages where it has none.
    pub id: String,
    pub messages: Vec<Message>,
    /// The source row, for whoever needs more of it (the evaluation reads the truth here).
    pub row: Value,
}
