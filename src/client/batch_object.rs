//! Files and batches as an endpoint tells of them, read leniently, and the way to them.

use std::time::SystemTime;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use serde_json::Value;

use crate::client::attempt_error::{AttemptError, RefusalClaim, RefusalReason};
use crate::client::outcome;
use crate::client::response::error::ApiError;
use crate::client::response::json;
use crate::client::transport::{HttpReply, TransportError};

/// What each row of a batch asks for.
pub(crate) const ENDPOINT: &str = "/v1/chat/completions";

/// A longer line is no answer that anybody wants to keep.
pub(crate) const LONGEST_LINE: usize = 64 << 20;

/// As [`outcome::check`]: what is "not found" here is a file or a batch, and not the endpoint.
pub(crate) fn check(
    reply: Result<HttpReply, TransportError>,
    now: SystemTime,
) -> Result<HttpReply, AttemptError> {
    outcome::check(reply, now).map_err(|trouble| match trouble {
        AttemptError::Claim(RefusalClaim {
            reason: RefusalReason::Address | RefusalReason::Model,
            failure,
        })
        | AttemptError::Filtered(failure) => AttemptError::Refused(failure),
        other => other,
    })
}

/// A batch, as far as the endpoint tells.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct BatchObject {
    pub id: String,
    /// Known ones and others.
    pub status: String,
    pub nonce: String,
    /// Each may be missing.
    pub output_file: Option<String>,
    pub error_file: Option<String>,
    pub mistakes: Vec<BatchFileError>,
    /// Number of rows in its files, and of those with an answer, if the endpoint reports it.
    pub rows: Option<u64>,
    pub answered: Option<u64>,
    /// Unix time.
    pub created_at: Option<i64>,
    pub ended_at: Option<i64>,
}

/// Why a batch failed.
#[derive(Debug, PartialEq)]
pub(crate) struct BatchFileError {
    pub error: ApiError,
    /// Of the input file, from 1; None where it is the whole file.
    pub line: Option<u64>,
}

impl BatchFileError {
    /// A line of an error file that is not about one row.
    pub(crate) fn from_line(line: &[u8]) -> Option<BatchFileError> {
        let value = json::value(line).ok()?;
        let error = ApiError::from_value(if value["error"].is_null() {
            &value
        } else {
            &value["error"]
        });
        (!error.message.is_empty()).then(|| BatchFileError {
            error,
            line: value["line"].as_u64(),
        })
    }
}

impl BatchObject {
    /// None where there is no batch in the body.
    pub(crate) fn parse(body: &[u8]) -> Option<BatchObject> {
        BatchObject::from_value(&json::value(body).ok()?)
    }

    /// Returns true if rows were answered, or may have been. An error file alone shows no answer: it may
    /// say why the input file was refused.
    pub(crate) fn has_answers(&self) -> bool {
        let is_completed = self.status == "completed";
        self.output_file.is_some() || self.answered.map_or(is_completed, |answered| answered > 0)
    }

    fn from_value(value: &Value) -> Option<BatchObject> {
        let text = |name: &str| value[name].as_str().map(String::from);
        // Others than OpenAI have names of their own.
        let file = |names: [&str; 2]| {
            let found = names.iter().filter_map(|name| text(name));
            found.into_iter().find(|id| !id.is_empty())
        };
        let at = |name: &&str| value[*name].as_f64().map(|seconds| seconds as i64);
        let ends = ["completed_at", "expired_at", "cancelled_at", "failed_at"];
        let mistakes = value["errors"]["data"].as_array();
        let mistake = |value: &Value| BatchFileError {
            error: ApiError::from_value(value),
            line: value["line"].as_u64(),
        };
        Some(BatchObject {
            id: text("id").filter(|id| !id.is_empty())?,
            status: status(&text("status").unwrap_or_default()),
            nonce: value["metadata"]["nonce"]
                .as_str()
                .unwrap_or_default()
                .into(),
            output_file: file(["output_file_id", "output_file"]),
            error_file: file(["error_file_id", "error_file"]),
            mistakes: mistakes.into_iter().flatten().map(mistake).collect(),
            rows: rows(&value["request_counts"]),
            answered: count(&value["request_counts"]["completed"]),
            created_at: at(&"created_at"),
            ended_at: ends.iter().find_map(at),
        })
    }
}

/// Number of rows that have ended, with or without an answer.
fn rows(counts: &Value) -> Option<u64> {
    count(&counts["completed"])?.checked_add(count(&counts["failed"]).unwrap_or(0))
}

fn count(value: &Value) -> Option<u64> {
    let in_text = || value.as_str()?.trim().parse().ok();
    value.as_u64().or_else(in_text)
}

/// A status as OpenAI spells it; one that is unknown as it came.
fn status(told: &str) -> String {
    let known = match told.to_ascii_lowercase().as_str() {
        "completed" | "complete" | "succeeded" | "success" | "ended" | "done" => "completed",
        "expired" | "timeout_exceeded" => "expired",
        "cancelled" | "canceled" => "cancelled",
        "failed" | "error" => "failed",
        "cancelling" | "canceling" | "cancellation_requested" => "cancelling",
        "in_progress" | "running" | "processing" => "in_progress",
        "validating" => "validating",
        "finalizing" => "finalizing",
        _ => told,
    };
    known.into()
}

/// The batches of a page, and whether there are more.
pub(crate) fn parse_page(body: &[u8]) -> Option<(Vec<BatchObject>, bool)> {
    let page = json::value(body).ok()?;
    let cards = page["data"].as_array()?.iter();
    let cards = cards.filter_map(BatchObject::from_value).collect();
    Some((cards, page["has_more"].as_bool().unwrap_or(false)))
}

/// The id of a file that was uploaded.
pub(crate) fn parse_file(body: &[u8]) -> Option<String> {
    let file = json::value(body).ok()?;
    Some(file["id"].as_str()?.to_owned()).filter(|id| !id.is_empty())
}

/// A file that comes in pieces, as lines. They end at the byte `\n` alone: JSON may hold U+2028 and
/// its like.
pub(crate) struct FileLines {
    pieces: BoxStream<'static, Result<Bytes, TransportError>>,
    buffer: BytesMut,
    /// Bytes of the buffer that are known to hold no line's end.
    searched: usize,
    is_over: bool,
    /// The line is too long, and the rest of it is not kept.
    skips: bool,
    /// Number of lines that were too long.
    pub skipped: u64,
}

impl FileLines {
    pub(crate) fn new(pieces: BoxStream<'static, Result<Bytes, TransportError>>) -> FileLines {
        FileLines {
            pieces,
            buffer: BytesMut::new(),
            searched: 0,
            is_over: false,
            skips: false,
            skipped: 0,
        }
    }

    /// The next line, without its end; one that is too long is empty. None after the last one.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, TransportError> {
        loop {
            let rest = &self.buffer[self.searched..];
            if let Some(length) = rest.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.searched + length);
                self.buffer.advance(1);
                self.searched = 0;
                return Ok(Some(self.whole(line)));
            }
            self.searched = self.buffer.len();
            if self.searched > LONGEST_LINE {
                self.buffer.clear();
                self.searched = 0;
                self.skips = true;
            }
            if self.is_over {
                let line = std::mem::take(&mut self.buffer);
                self.searched = 0;
                return Ok((!line.is_empty()).then(|| self.whole(line)));
            }
            match self.pieces.next().await {
                Some(piece) => self.buffer.extend_from_slice(&piece?),
                None => self.is_over = true,
            }
        }
    }

    fn whole(&mut self, line: BytesMut) -> Bytes {
        if std::mem::take(&mut self.skips) {
            self.skipped += 1;
            Bytes::new()
        } else {
            line.freeze()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;
    use proptest::prelude::*;

    fn lines(pieces: Vec<Result<Bytes, TransportError>>) -> Vec<Result<Bytes, String>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut lines = FileLines::new(stream::iter(pieces).boxed());
            let mut all = Vec::new();
            loop {
                match lines.next().await {
                    Ok(Some(line)) => all.push(Ok(line)),
                    Ok(None) => return all,
                    Err(fault) => {
                        all.push(Err(fault.to_string()));
                        return all;
                    }
                }
            }
        })
    }

    proptest! {
        #[test]
        fn lines_come_out_as_they_went_in_however_they_were_cut(
            text in proptest::collection::vec("[a-c\u{2028}\r]{0,6}", 0..20),
            cuts in proptest::collection::vec(1usize..9, 1..40),
            ends in any::<bool>(),
        ) {
            let mut content = text.join("\n");
            if ends {
                content.push('\n');
            }
            let mut expected: Vec<&str> = content.split('\n').collect();
            if expected.last() == Some(&"") {
                expected.pop();
            }
            let (mut pieces, mut rest) = (Vec::new(), content.as_bytes());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                pieces.push(Ok(Bytes::copy_from_slice(piece)));
                rest = after;
            }
            let found: Vec<_> = lines(pieces).into_iter().map(Result::unwrap).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_line_that_is_too_long_costs_itself_alone_and_a_break_is_told() {
        let long = Bytes::from(vec![b'x'; LONGEST_LINE / 2 + 1]);
        let piece = |text: &'static str| Ok(Bytes::from(text));
        let found = lines(vec![
            piece("a\nb"),
            Ok(long.clone()),
            Ok(long),
            piece("c\nd\ne"),
            Err(TransportError::Timeout),
        ]);
        assert_eq!(
            found,
            [
                Ok("a".into()),
                Ok("".into()),
                Ok("d".into()),
                Err("timed out".into())
            ]
        );
    }

    #[test]
    fn a_card_needs_an_id_and_nothing_else() {
        assert_eq!(BatchObject::parse(b"{}"), None);
        let card = BatchObject::parse(br#"{"id": "b", "status": "new", "errors": null}"#).unwrap();
        assert_eq!((card.status.as_str(), card.mistakes.len()), ("new", 0));
        for (told, expected) in [
            ("SUCCEEDED", "completed"),
            ("Canceled", "cancelled"),
            ("odd", "odd"),
        ] {
            let card = format!("{{\"id\": \"b\", \"status\": \"{told}\"}}");
            assert_eq!(
                BatchObject::parse(card.as_bytes()).unwrap().status,
                expected
            );
        }
        let card = BatchObject::parse(
            br#"{"id": "b", "metadata": {"nonce": "n"}, "output_file_id": null, "expired_at": 9,
                "errors": {"data": [{"code": "x", "line": 3, "message": "m"}]}}"#,
        );
        let card = card.unwrap();
        assert_eq!((card.nonce.as_str(), card.ended_at), ("n", Some(9)));
        assert_eq!((card.output_file, card.mistakes[0].line), (None, Some(3)));
    }

    #[test]
    fn an_error_file_alone_is_no_answer() {
        let card = |text: &str| BatchObject::parse(text.as_bytes()).unwrap();
        let failed = r#"{"id":"b","status":"failed","error_file_id":"f","request_counts":{"completed":0,"failed":0}}"#;
        assert!(!card(failed).has_answers());
        assert!(card(r#"{"id":"b","status":"failed","output_file_id":"f"}"#).has_answers());
        assert!(
            card(r#"{"id":"b","status":"failed","request_counts":{"completed":2}}"#).has_answers()
        );
        assert!(card(r#"{"id":"b","status":"completed"}"#).has_answers());
    }
}
