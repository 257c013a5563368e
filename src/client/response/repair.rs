//! Converts invalid JSON to strict JSON byte by byte. Pure.

use crate::client::response::json_error::{JsonProblem, beginning};

/// Maximum nesting depth; deeper values are kept as text. serde_json rejects more than 128 levels, and a record adds
/// levels around the reply.
const MAX_DEPTH: usize = 96;

/// Repair of one JSON value, with an explicit stack instead of recursion.
pub(crate) struct JsonRepair<'a> {
    pub(crate) text: &'a [u8],
    pub(crate) pos: usize,
    pub(crate) out: Vec<u8>,
    /// Stack of open brackets.
    pub(crate) open: Vec<u8>,
    /// Length of `out` after the last complete object or list inside a list of the outermost object.
    pub(crate) complete_length: usize,
}

impl JsonRepair<'_> {
    pub(crate) fn run(&mut self) -> Result<(), JsonProblem> {
        loop {
            self.value()?;
            // A value is followed by a closing bracket, or by a comma and another value.
            loop {
                let Some(&bracket) = self.open.last() else {
                    return Ok(());
                };
                let next = self.peek()?;
                if next == b',' {
                    self.pos += 1;
                    if self.closes(bracket)? {
                        // A trailing comma.
                        continue;
                    }
                    self.out.push(b',');
                } else if self.closes(bracket)? {
                    continue;
                } else {
                    return Err(self.unexpected());
                }
                if bracket == b'{' {
                    self.key()?;
                }
                break;
            }
        }
    }

    /// Closes a truncated body after the last complete element. Returns true if the body then contains a choice with a
    /// finish reason, since the answer is complete in this case.
    pub(crate) fn close(&mut self) -> bool {
        self.out.truncate(self.complete_length);
        let choices = memchr::memmem::find(&self.out, b"\"choices\":[");
        let has_finish_reason = |choices: usize| {
            let field = b"\"finish_reason\":\"";
            memchr::memmem::find(&self.out[choices..], field).is_some()
        };
        let is_complete = choices.is_some_and(has_finish_reason);
        self.out.extend_from_slice(b"]}");
        is_complete
    }

    /// Converts a scalar or an empty container, or opens nested containers up to their first scalar.
    fn value(&mut self) -> Result<(), JsonProblem> {
        loop {
            match self.peek()? {
                bracket @ (b'{' | b'[') => {
                    if self.open.len() == MAX_DEPTH {
                        return self.keep_as_text();
                    }
                    self.pos += 1;
                    self.out.push(bracket);
                    self.open.push(bracket);
                    if self.closes(bracket)? {
                        return Ok(());
                    }
                    if bracket == b'{' {
                        self.key()?;
                    }
                }
                b'"' => return self.string(),
                _ => return self.word(),
            }
        }
    }

    /// Consumes the bracket that closes `bracket`, if it is next.
    fn closes(&mut self, bracket: u8) -> Result<bool, JsonProblem> {
        let end = if bracket == b'{' { b'}' } else { b']' };
        let is_next = self.peek()? == end;
        if is_next {
            self.pos += 1;
            self.out.push(end);
            self.open.pop();
            if self.open == *b"{[" {
                self.complete_length = self.out.len();
            }
        }
        Ok(is_next)
    }

    /// Converts the name of a field and the colon after it.
    fn key(&mut self) -> Result<(), JsonProblem> {
        if self.peek()? != b'"' {
            return Err(self.unexpected());
        }
        self.string()?;
        if self.peek()? != b':' {
            return Err(self.unexpected());
        }
        self.pos += 1;
        self.out.push(b':');
        Ok(())
    }

    /// Returns the next byte that is not white space, without consuming it.
    fn peek(&mut self) -> Result<u8, JsonProblem> {
        while let Some(byte) = self.text.get(self.pos) {
            // Some proxies send NUL bytes as keep-alive.
            if byte.is_ascii_whitespace() || *byte == 0 {
                self.pos += 1;
            } else {
                return Ok(*byte);
            }
        }
        Err(JsonProblem::CutOff)
    }

    fn unexpected(&self) -> JsonProblem {
        JsonProblem::NotJson(format!(
            "at byte {}: {}",
            self.pos,
            beginning(&self.text[self.pos..])
        ))
    }

    fn string(&mut self) -> Result<(), JsonProblem> {
        self.out.push(b'"');
        self.pos += 1;
        loop {
            let remaining = &self.text[self.pos..];
            let plain = remaining
                .iter()
                .position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20))
                .ok_or(JsonProblem::CutOff)?;
            self.out
                .extend_from_slice(String::from_utf8_lossy(&remaining[..plain]).as_bytes());
            self.pos += plain;
            match self.text[self.pos] {
                b'"' => {
                    self.pos += 1;
                    self.out.push(b'"');
                    return Ok(());
                }
                b'\\' => self.escape()?,
                control => {
                    self.pos += 1;
                    self.out
                        .extend_from_slice(format!("\\u{control:04x}").as_bytes());
                }
            }
        }
    }

    fn escape(&mut self) -> Result<(), JsonProblem> {
        let kind = *self.text.get(self.pos + 1).ok_or(JsonProblem::CutOff)?;
        match kind {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {
                self.out.extend_from_slice(&[b'\\', kind]);
                self.pos += 2;
            }
            b'u' => match utf16_unit(&self.text[self.pos..]) {
                None => self.escape_backslash(),
                Some(high @ 0xd800..0xdc00) => {
                    let low = utf16_unit(&self.text[self.pos + 6..]);
                    if let Some(low @ 0xdc00..0xe000) = low {
                        self.out
                            .extend_from_slice(format!("\\u{high:04x}\\u{low:04x}").as_bytes());
                        self.pos += 12;
                    } else {
                        self.replace_surrogate();
                    }
                }
                Some(0xdc00..0xe000) => self.replace_surrogate(),
                Some(_) => {
                    self.out
                        .extend_from_slice(&self.text[self.pos..self.pos + 6]);
                    self.pos += 6;
                }
            },
            b'\'' => {
                self.out.push(b'\'');
                self.pos += 2;
            }
            _ => self.escape_backslash(),
        }
        Ok(())
    }

    /// Replaces an unpaired surrogate, which occurs if an answer was truncated within a character.
    fn replace_surrogate(&mut self) {
        self.out.extend_from_slice(b"\\ufffd");
        self.pos += 6;
    }

    /// Escapes a backslash that does not begin a valid escape.
    fn escape_backslash(&mut self) {
        self.out.extend_from_slice(b"\\\\");
        self.pos += 1;
    }

    /// Converts a number or literal; null if JSON has no such value.
    fn word(&mut self) -> Result<(), JsonProblem> {
        let remaining = &self.text[self.pos..];
        let is_part =
            |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
        let length = remaining.iter().take_while(|byte| is_part(byte)).count();
        let word = std::str::from_utf8(&remaining[..length]).unwrap_or_default();
        if word.is_empty() {
            return Err(self.unexpected());
        }
        // The number or literal may continue after the end of the text.
        if self.pos + length == self.text.len() && !self.open.is_empty() {
            return Err(JsonProblem::CutOff);
        }
        let bare = word.trim_start_matches(['+', '-']).to_ascii_lowercase();
        let strict = match bare.as_str() {
            "true" | "false" | "null" => bare,
            "none" | "undefined" | "nan" | "inf" | "infinity" => "null".into(),
            _ => number(word).ok_or_else(|| self.unexpected())?,
        };
        self.pos += length;
        self.out.extend_from_slice(strict.as_bytes());
        Ok(())
    }

    /// Converts a value that is nested too deeply to a string of its text.
    fn keep_as_text(&mut self) -> Result<(), JsonProblem> {
        let start = self.pos;
        let mut depth = 0usize;
        let mut is_in_string = false;
        loop {
            let byte = *self.text.get(self.pos).ok_or(JsonProblem::CutOff)?;
            self.pos += 1;
            match byte {
                b'\\' if is_in_string => self.pos += 1,
                b'"' => is_in_string = !is_in_string,
                b'{' | b'[' if !is_in_string => depth += 1,
                b'}' | b']' if !is_in_string => {
                    depth -= 1;
                    if depth == 0 {
                        break;
                    }
                }
                _ => {}
            }
        }
        let text = String::from_utf8_lossy(&self.text[start..self.pos.min(self.text.len())]);
        // Serializing a string never fails.
        self.out
            .extend_from_slice(&serde_json::to_vec(&text).unwrap_or_default());
        Ok(())
    }
}

/// Returns a number in JSON's spelling; null if it is not finite.
fn number(word: &str) -> Option<String> {
    let value: f64 = word.parse().ok()?;
    if !value.is_finite() {
        return Some("null".into());
    }
    match serde_json::from_str::<serde_json::Number>(word) {
        Ok(_) => Some(word.into()),
        // As in `+1`, `.5` or `007`.
        Err(_) => Some(value.to_string()),
    }
}

/// Parses the UTF-16 code unit of `\uXXXX` at the start of `text`.
fn utf16_unit(text: &[u8]) -> Option<u16> {
    let digits = text.strip_prefix(b"\\u")?.get(..4)?;
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}
