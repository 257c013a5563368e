//! `{"messages": [...]}` a line, as OpenAI's fine-tuning API takes it.
//!
//! Its `/v1/files` refuses a whole file for one message that it does not like, so such rows are
//! left out here: roles other than system, user and assistant, and empty answers.

use serde::Serialize;

use crate::export::rows::ExportRow;
use crate::prompt::message::Message;

/// A conversation that ends in the answer.
#[derive(Debug, Serialize)]
pub(crate) struct OpenAiRow {
    pub messages: Vec<Message>,
}

/// A row as a line, or the reason to leave it out.
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
