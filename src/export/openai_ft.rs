//! One `{"messages": [...]}` per line, for OpenAI's fine-tuning API.
//!
//! Its `/v1/files` rejects a whole file for one invalid message. So rows with roles other than system, user and
//! assistant, or with an empty answer, are left out.

use serde::Serialize;

use crate::export::rows::ExportRow;
use crate::prompt::message::Message;

/// A conversation that ends with the answer.
#[derive(Debug, Serialize)]
pub(crate) struct OpenAiRow {
    pub messages: Vec<Message>,
}

/// Converts a row to a line, or returns the reason to leave it out.
pub(crate) fn line(row: ExportRow) -> Result<OpenAiRow, String> {
    let messages = row.conversation();
    let known = ["system", "user", "assistant"];
    if let Some(other) = messages.iter().find(|m| !known.contains(&m.role.as_str())) {
        return Err(format!("the fine-tuning API has no role `{}`", other.role));
    }
    if messages
        .last()
        .is_none_or(|answer| answer.content.is_empty())
    {
        return Err("the answer is empty".into());
    }
    Ok(OpenAiRow { messages })
}
