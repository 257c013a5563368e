//! Batch objects, pages of batches and lines of result files, parsed leniently.

use std::time::SystemTime;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use serde_json::Value;

use crate::client::attempt_error::{AttemptError, EndpointRefusal, RefusalReason};
use crate::client::outcome;
use crate::client::response::error::ApiError;
use crate::client::response::json;
use crate::client::transport::{HttpReply, TransportError};

/// API path of each row of a batch.
pub(crate) const ENDPOINT: &str = "/v1/chat/completions";

/// Maximum length of a line in bytes; no useful answer is longer.
pub(crate) const MAX_LINE_LENGTH: usize = 64 << 20;

/// As [`outcome::check`], for a call of the files and batches API. "Not found" means the file or batch, so it refuses
/// only this call; so does a content filter.
pub(crate) fn check(
    reply: Result<HttpReply, TransportError>,
    now: SystemTime,
) -> Result<HttpReply, AttemptError> {
    outcome::check(reply, now).map_err(|attempt_error| match attempt_error {
        AttemptError::EndpointRefused(EndpointRefusal {
            reason: RefusalReason::Address | RefusalReason::Model,
            failure,
        })
        | AttemptError::Filtered(failure) => AttemptError::Refused(failure),
        other => other,
    })
}

/// A batch, as the endpoint reports it.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct BatchObject {
    pub id: String,
    /// Status in OpenAI's spelling; an unknown status is kept as reported.
    pub status: String,
    /// Random text of `metadata.nonce`, by which a batch is found if the reply to its creation was lost.
    pub nonce: String,
    pub output_file: Option<String>,
    pub error_file: Option<String>,
    pub errors: Vec<BatchFileError>,
    /// Number of rows that have ended, with or without an answer, if reported.
    pub rows: Option<u64>,
    /// Number of rows with an answer, if reported.
    pub answered: Option<u64>,
    /// Unix time in seconds.
    pub created_at: Option<i64>,
    /// Unix time in seconds.
    pub ended_at: Option<i64>,
}

/// An error of a batch or of one line of its input file.
#[derive(Debug, PartialEq)]
pub(crate) struct BatchFileError {
    pub error: ApiError,
    /// Line of the input file, from 1; None if the error concerns the whole file.
    pub line: Option<u64>,
}

impl BatchFileError {
    /// Parses a line of an error file that reports an error of the whole input file or of one of its lines. Returns
    /// None if the line contains no message.
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
    /// Parses a batch object. Returns None if the body contains none.
    pub(crate) fn parse(body: &[u8]) -> Option<BatchObject> {
        BatchObject::from_value(&json::value(body).ok()?)
    }

    /// Returns true if rows may have been answered. An error file does not count: it may only report why the input file
    /// was rejected.
    pub(crate) fn has_answers(&self) -> bool {
        let is_completed = self.status == "completed";
        self.output_file.is_some() || self.answered.map_or(is_completed, |answered| answered > 0)
    }

    fn from_value(value: &Value) -> Option<BatchObject> {
        let text = |name: &str| value[name].as_str().map(String::from);
        // OpenAI's name of the field, and the one of other providers.
        let file = |names: [&str; 2]| {
            let mut ids = names.iter().filter_map(|name| text(name));
            ids.find(|id| !id.is_empty())
        };
        let unix_time = |name: &&str| value[*name].as_f64().map(|seconds| seconds as i64);
        let end_times = ["completed_at", "expired_at", "cancelled_at", "failed_at"];
        let errors = value["errors"]["data"].as_array();
        let file_error = |value: &Value| BatchFileError {
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
            errors: errors.into_iter().flatten().map(file_error).collect(),
            rows: rows(&value["request_counts"]),
            answered: count(&value["request_counts"]["completed"]),
            created_at: unix_time(&"created_at"),
            ended_at: end_times.iter().find_map(unix_time),
        })
    }
}

/// Returns the number of rows that have ended, with or without an answer.
fn rows(counts: &Value) -> Option<u64> {
    count(&counts["completed"])?.checked_add(count(&counts["failed"]).unwrap_or(0))
}

fn count(value: &Value) -> Option<u64> {
    let in_text = || value.as_str()?.trim().parse().ok();
    value.as_u64().or_else(in_text)
}

/// Converts a status to OpenAI's spelling; unknown ones are returned unchanged.
fn status(reported: &str) -> String {
    let openai_status = match reported.to_ascii_lowercase().as_str() {
        "completed" | "complete" | "succeeded" | "success" | "ended" | "done" => "completed",
        "expired" | "timeout_exceeded" => "expired",
        "cancelled" | "canceled" => "cancelled",
        "failed" | "error" => "failed",
        "cancelling" | "canceling" | "cancellation_requested" => "cancelling",
        "in_progress" | "running" | "processing" => "in_progress",
        "validating" => "validating",
        "finalizing" => "finalizing",
        _ => reported,
    };
    openai_status.into()
}

/// Parses a page of batches. Returns the batches, and true if more pages follow. None if the body is not a page.
pub(crate) fn parse_page(body: &[u8]) -> Option<(Vec<BatchObject>, bool)> {
    let page = json::value(body).ok()?;
    let batches = page["data"].as_array()?.iter();
    let batches = batches.filter_map(BatchObject::from_value).collect();
    Some((batches, page["has_more"].as_bool().unwrap_or(false)))
}

/// Parses a file object. Returns the id of the file.
pub(crate) fn parse_file_id(body: &[u8]) -> Option<String> {
    let file = json::value(body).ok()?;
    Some(file["id"].as_str()?.to_owned()).filter(|id| !id.is_empty())
}

/// Splits a streamed file into lines. Only the byte `\n` ends a line, since JSON may contain U+2028 and other
/// Unicode line separators.
pub(crate) struct FileLines {
    chunks: BoxStream<'static, Result<Bytes, TransportError>>,
    buffer: BytesMut,
    /// Number of leading bytes of the buffer that contain no `\n`.
    searched: usize,
    is_at_end: bool,
    /// The current line is too long; the remaining bytes are discarded.
    is_skipping: bool,
    /// Number of lines longer than [`MAX_LINE_LENGTH`].
    pub skipped: u64,
}

impl FileLines {
    pub(crate) fn new(chunks: BoxStream<'static, Result<Bytes, TransportError>>) -> FileLines {
        FileLines {
            chunks,
            buffer: BytesMut::new(),
            searched: 0,
            is_at_end: false,
            is_skipping: false,
            skipped: 0,
        }
    }

    /// Returns the next line without its `\n`, or None after the last one. A line longer than [`MAX_LINE_LENGTH`] is
    /// returned as an empty line.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, TransportError> {
        loop {
            let unsearched = &self.buffer[self.searched..];
            if let Some(length) = unsearched.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.searched + length);
                self.buffer.advance(1);
                self.searched = 0;
                return Ok(Some(self.finish_line(line)));
            }
            self.searched = self.buffer.len();
            if self.searched > MAX_LINE_LENGTH {
                self.buffer.clear();
                self.searched = 0;
                self.is_skipping = true;
            }
            if self.is_at_end {
                let line = std::mem::take(&mut self.buffer);
                self.searched = 0;
                let is_line = self.is_skipping || !line.is_empty();
                return Ok(is_line.then(|| self.finish_line(line)));
            }
            match self.chunks.next().await {
                Some(chunk) => self.buffer.extend_from_slice(&chunk?),
                None => self.is_at_end = true,
            }
        }
    }

    fn finish_line(&mut self, line: BytesMut) -> Bytes {
        if std::mem::take(&mut self.is_skipping) {
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

    fn lines(chunks: Vec<Result<Bytes, TransportError>>) -> Vec<Result<Bytes, String>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut lines = FileLines::new(stream::iter(chunks).boxed());
            let mut all = Vec::new();
            loop {
                match lines.next().await {
                    Ok(Some(line)) => all.push(Ok(line)),
                    Ok(None) => return all,
                    Err(error) => {
                        all.push(Err(error.to_string()));
                        return all;
                    }
                }
            }
        })
    }

    proptest! {
        #[test]
        fn file_lines_do_not_depend_on_chunk_boundaries(
            text in proptest::collection::vec("[a-c\u{2028}\r]{0,6}", 0..20),
            cuts in proptest::collection::vec(1usize..9, 1..40),
            ends_with_newline in any::<bool>(),
        ) {
            let mut content = text.join("\n");
            if ends_with_newline {
                content.push('\n');
            }
            let mut expected: Vec<&str> = content.split('\n').collect();
            if expected.last() == Some(&"") {
                expected.pop();
            }
            let mut chunks = Vec::new();
            let mut remaining = content.as_bytes();
            for cut in cuts.iter().cycle() {
                if remaining.is_empty() {
                    break;
                }
                let (chunk, after) = remaining.split_at((*cut).min(remaining.len()));
                chunks.push(Ok(Bytes::copy_from_slice(chunk)));
                remaining = after;
            }
            let found: Vec<_> = lines(chunks).into_iter().map(Result::unwrap).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn overlong_line_is_skipped_and_transport_error_is_returned() {
        let long = Bytes::from(vec![b'x'; MAX_LINE_LENGTH / 2 + 1]);
        let chunk = |text: &'static str| Ok(Bytes::from(text));
        let found = lines(vec![
            chunk("a\nb"),
            Ok(long.clone()),
            Ok(long),
            chunk("c\nd\ne"),
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
    fn batch_object_requires_only_an_id() {
        assert_eq!(BatchObject::parse(b"{}"), None);
        let batch = BatchObject::parse(br#"{"id": "b", "status": "new", "errors": null}"#).unwrap();
        assert_eq!((batch.status.as_str(), batch.errors.len()), ("new", 0));
        for (reported, expected) in [
            ("SUCCEEDED", "completed"),
            ("Canceled", "cancelled"),
            ("odd", "odd"),
        ] {
            let batch = format!("{{\"id\": \"b\", \"status\": \"{reported}\"}}");
            assert_eq!(
                BatchObject::parse(batch.as_bytes()).unwrap().status,
                expected
            );
        }
        let batch = BatchObject::parse(
            br#"{"id": "b", "metadata": {"nonce": "n"}, "output_file_id": null, "expired_at": 9,
                "errors": {"data": [{"code": "x", "line": 3, "message": "m"}]}}"#,
        );
        let batch = batch.unwrap();
        assert_eq!((batch.nonce.as_str(), batch.ended_at), ("n", Some(9)));
        assert_eq!((batch.output_file, batch.errors[0].line), (None, Some(3)));
    }

    #[test]
    fn error_file_alone_does_not_count_as_answers() {
        let batch = |text: &str| BatchObject::parse(text.as_bytes()).unwrap();
        let failed = r#"{"id":"b","status":"failed","error_file_id":"f","request_counts":{"completed":0,"failed":0}}"#;
        assert!(!batch(failed).has_answers());
        assert!(batch(r#"{"id":"b","status":"failed","output_file_id":"f"}"#).has_answers());
        assert!(
            batch(r#"{"id":"b","status":"failed","request_counts":{"completed":2}}"#).has_answers()
        );
        assert!(batch(r#"{"id":"b","status":"completed"}"#).has_answers());
    }
}
