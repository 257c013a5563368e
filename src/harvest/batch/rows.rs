//! Splits a results file into rows. A row is a line, or a JSON object that spans several lines.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use memchr::memmem::find;

use super::braces::{Braces, is_closed};
use super::results::CUSTOM_ID;
use crate::client::batch_object::{FileLines, MAX_LINE_LENGTH};
use crate::client::transport::TransportError;

/// Reader of the rows of a results file.
pub(crate) struct ResultRows {
    lines: FileLines,
    /// Text read so far of an object that spans several lines.
    open: BytesMut,
    braces: Braces,
    /// Rows that `next` returns before it reads more lines.
    ready: VecDeque<Bytes>,
}

impl ResultRows {
    pub(crate) fn new(lines: FileLines) -> ResultRows {
        ResultRows {
            lines,
            open: BytesMut::new(),
            braces: Braces::default(),
            ready: VecDeque::new(),
        }
    }

    /// Returns the next row; None after the last row.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, TransportError> {
        loop {
            if let Some(row) = self.ready.pop_front() {
                return Ok(Some(row));
            }
            match self.lines.next().await? {
                Some(line) => self.push_line(line),
                None if self.open.is_empty() => return Ok(None),
                None => self.flush_object(),
            }
        }
    }

    /// Number of lines that were skipped because they are too long.
    pub(crate) fn skipped(&self) -> u64 {
        self.lines.skipped
    }

    /// Adds a line: to the open object if there is one or the line begins one, otherwise to `ready`.
    fn push_line(&mut self, line: Bytes) {
        let text = line.trim_ascii();
        let is_row = text.starts_with(b"{") && find(text, CUSTOM_ID).is_some();
        let is_open = !self.open.is_empty();
        if is_open && (is_row || self.open.len() + line.len() > MAX_LINE_LENGTH) {
            self.flush_object();
        }
        let is_complete = text.ends_with(b"}") && is_closed(text);
        let starts_object = text.ends_with(b"{") || text.starts_with(b"{");
        if !self.open.is_empty() || starts_object && !is_complete {
            self.join(line);
        } else if !matches!(text, b"" | b"[" | b"]" | b",") {
            self.ready.push_back(line);
        }
    }

    /// Adds a line to the open object. Moves each object that the line completes to `ready`.
    fn join(&mut self, line: Bytes) {
        let mut start = 0;
        for (index, byte) in line.iter().enumerate() {
            let before = self.braces.depth;
            if !self.braces.push(*byte) {
                continue;
            }
            if before == 0 {
                start = index;
            } else if self.braces.depth == 0 {
                self.open.extend_from_slice(&line[start..=index]);
                self.flush_object();
                start = index + 1;
            }
        }
        self.braces.end_line();
        if self.braces.depth > 0 {
            self.open.extend_from_slice(&line[start..]);
            self.open.extend_from_slice(b"\n");
        }
    }

    /// Moves the open object to `ready`, even if it is incomplete.
    fn flush_object(&mut self) {
        self.braces = Braces::default();
        self.ready.push_back(self.open.split().freeze());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{StreamExt, stream};
    use serde_json::{Value, json};

    fn rows(text: &str) -> Vec<String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let piece = Ok(Bytes::copy_from_slice(text.as_bytes()));
            let mut rows = ResultRows::new(FileLines::new(stream::iter([piece]).boxed()));
            let mut all = Vec::new();
            while let Some(row) = rows.next().await.unwrap() {
                all.push(String::from_utf8(row.to_vec()).unwrap());
            }
            all
        })
    }

    fn row(id: &str) -> Value {
        json!({"custom_id": id, "response": {"body": {"choices": [{"text": "a } \" { b"}]}}})
    }

    #[test]
    fn object_may_span_several_lines() {
        let a = row("a");
        let b = row("b");
        let pretty = |value: &Value| serde_json::to_string_pretty(value).unwrap();
        for text in [
            format!("{a}\n{b}\n"),
            format!("{}\n{}", pretty(&a), pretty(&b)),
            pretty(&json!([a, b])),
            format!("[{}, {}]", pretty(&a), pretty(&b)),
            format!("[\n{a}\n,\n{b}\n]"),
            pretty(&a).replacen("{\n  \"custom", "{\"custom", 1) + "\n" + &b.to_string(),
        ] {
            let found: Vec<Value> = rows(&text)
                .iter()
                .map(|row| serde_json::from_str(row).unwrap())
                .collect();
            assert_eq!(found, [a.clone(), b.clone()], "{text}");
        }
    }

    #[test]
    fn string_may_contain_unescaped_line_breaks() {
        let raw = "{\"custom_id\":\"a\",\"text\":\"one {\ntwo\n}\"}";
        let b = row("b").to_string();
        assert_eq!(rows(&format!("{raw}\n{b}\n{raw}")), [raw, &b, raw]);
        let code = "{\"custom_id\":\"a\",\"text\":\"fn f() {}\nend\"}";
        assert_eq!(rows(&format!("{code}\n{b}")), [code, &b]);
    }

    #[test]
    fn truncated_object_loses_no_other_row() {
        let a = row("a");
        let b = row("b");
        let pretty = serde_json::to_string_pretty(&a).unwrap();
        let broken = &pretty[..pretty.len() - 20];
        let found = rows(&format!("{broken}\n{b}\n{pretty}"));
        assert_eq!(found.len(), 3);
        assert_eq!(found[1], b.to_string());
        assert_eq!(serde_json::from_str::<Value>(&found[2]).unwrap(), a);
        assert_eq!(rows(broken).len(), 1);
        assert_eq!(rows("x\n{\"a\": {"), ["x", "{\"a\": {\n"]);
    }
}
