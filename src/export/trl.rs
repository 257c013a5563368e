//! TRL's conversational prompt-completion rows, on which `SFTTrainer` puts the loss on the answer
//! alone without being told to.

use serde::Serialize;

use crate::export::rows::ExportRow;
use crate::prompt::message::Message;

/// What was asked, and the answer as the only message of the completion.
#[derive(Debug, Serialize)]
pub(crate) struct TrlRow {
    pub prompt: Vec<Message>,
    pub completion: [Message; 1],
}

/// A row as a line.
pub(crate) fn line(row: ExportRow) -> TrlRow {
    let answer = Message {
        role: "assistant".into(),
        content: row.record.answer.text,
    };
    TrlRow {
        prompt: row.prompt,
        completion: [answer],
    }
}
