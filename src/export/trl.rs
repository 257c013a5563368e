//! TRL's conversational prompt-completion rows: `SFTTrainer` computes the loss only on the completion by default.

use serde::Serialize;

use crate::export::rows::ExportRow;
use crate::prompt::message::Message;

/// Messages of the request, and the answer as the only message of the completion.
#[derive(Debug, Serialize)]
pub(crate) struct TrlRow {
    pub prompt: Vec<Message>,
    pub completion: [Message; 1],
}

/// Converts a row to a line.
pub(crate) fn line(row: ExportRow) -> TrlRow {
    TrlRow {
        prompt: row.prompt,
        completion: [Message::new("assistant", row.record.answer.text)],
    }
}
