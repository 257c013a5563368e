//! One `{"messages": [...]}` per line, for OpenAI's fine-tuning API.
//!
//! The API rejects a whole file for one invalid message. Rows with roles other than system, user and assistant, or with
//! an empty answer, are therefore left out.

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
    let accepted_roles = ["system", "user", "assistant"];
    let other = messages
        .iter()
        .find(|message| !accepted_roles.contains(&message.role.as_str()));
    if let Some(message) = other {
        return Err(format!(
            "the fine-tuning API does not accept the role `{}`",
            message.role
        ));
    }
    if messages
        .last()
        .is_none_or(|answer| answer.content.is_empty())
    {
        return Err("the answer is empty".into());
    }
    Ok(OpenAiRow { messages })
}
