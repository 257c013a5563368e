//! Line format of the cache: a record as JSON, with a checksum.
//!
//! A line is the record's JSON object with one more field at its end:
//!
//! ```text
//! {"v":2,"key":"…","cut_at":0, … ,"extra":"{}","crc":"1a2b3c4d"}⏎
//! └────── covered by the crc ───────┘
//! ```
//!
//! `crc` is the CRC-32C (Castagnoli), as 8 lower-case hex digits, of every byte before it: from the
//! opening brace to the comma in front of `"crc"`. The checksum is a field, so `jq`, pandas and `datasets` can read the
//! file.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::question;
use super::record::{Record, SCHEMA};

/// Length of `"crc":"1a2b3c4d"}` in bytes.
const CHECKSUM_BYTES: usize = 17;

/// Reason why a line is not a usable record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    #[error("it has no checksum at its end")]
    MissingChecksum,
    #[error("its checksum does not match its content")]
    Checksum,
    #[error("a newer distill wrote it (schema {0}, this one reads up to {SCHEMA}): update distill")]
    Newer(u32),
    #[error("its checksum is correct, but it is not a valid record: {0}")]
    InvalidRecord(String),
    #[error("the frame cannot be decompressed ({0})")]
    Frame(String),
    #[error("its key belongs to another request")]
    WrongKey,
}

/// Fields of a line that opening a cache needs.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct LineHead<'a> {
    pub v: u32,
    #[serde(borrow)]
    pub key: Cow<'a, str>,
    /// See [`Record::cut_at`].
    #[serde(default)]
    pub cut_at: u32,
}

/// Encodes `record` as a line, with its newline.
pub fn encode(record: &Record) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record).context("could not encode a record")?;
    line.pop();
    line.push(b',');
    let crc = hex(crc32c::crc32c(&line));
    line.extend_from_slice(b"\"crc\":\"");
    line.extend_from_slice(&crc);
    line.extend_from_slice(b"\"}\n");
    Ok(line)
}

/// Formats a checksum as 8 lower-case digits.
fn hex(crc: u32) -> [u8; 8] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    std::array::from_fn(|index| DIGITS[(crc >> (28 - 4 * index)) as usize & 15])
}

/// Range of a line's content in `raw`: without the newline and without the bytes that editors add. These are a
/// carriage return before the newline, and a byte order mark if the line `is_first` in its file.
pub(crate) fn content_range(raw: &[u8], is_first: bool) -> Range<usize> {
    let line = raw.strip_suffix(b"\n").unwrap_or(raw);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mark = is_first && line.starts_with(b"\xef\xbb\xbf");
    if mark { 3..line.len() } else { 0..line.len() }
}

/// Checks the checksum of `line` (without its line end) and returns it.
pub fn verify(line: &[u8]) -> Result<u32, LineError> {
    let (covered, crc_field) = line
        .split_at_checked(line.len().wrapping_sub(CHECKSUM_BYTES))
        .ok_or(LineError::MissingChecksum)?;
    if !covered.ends_with(b",")
        || !crc_field.starts_with(b"\"crc\":\"")
        || !crc_field.ends_with(b"\"}")
    {
        return Err(LineError::MissingChecksum);
    }
    // Compared as text, so that each checksum has exactly one valid spelling.
    let crc = crc32c::crc32c(covered);
    if crc_field[7..15] == hex(crc) {
        Ok(crc)
    } else {
        Err(LineError::Checksum)
    }
}

/// Parses the schema version, `key` and `cut_at` of a line that [`verify`] has accepted. If the line begins in the
/// form that distill writes, only its beginning is parsed.
pub fn head(line: &[u8]) -> Result<LineHead<'_>, LineError> {
    let head = match leading_head(line) {
        Some(head) => head,
        None => {
            serde_json::from_slice(line).map_err(|e| LineError::InvalidRecord(e.to_string()))?
        }
    };
    match head.v {
        1..=SCHEMA => Ok(head),
        0 => Err(LineError::InvalidRecord(
            "schema 0 does not exist".to_owned(),
        )),
        newer => Err(LineError::Newer(newer)),
    }
}

/// Parses the start of `{"v":1,"key":"<no escapes>",…` and of
/// `{"v":2,"key":"<no escapes>","cut_at":<number>,…`; `None` for any other form.
fn leading_head(line: &[u8]) -> Option<LineHead<'_>> {
    let (v, rest) = match line.strip_prefix(b"{\"v\":1,\"key\":\"") {
        Some(rest) => (1, rest),
        None => (2, line.strip_prefix(b"{\"v\":2,\"key\":\"")?),
    };
    let (key, rest) = rest.split_at(rest.iter().position(|&byte| byte == b'"')?);
    if key.contains(&b'\\') {
        return None;
    }
    let mut cut_at = 0;
    if v == 2 {
        let rest = rest.strip_prefix(b"\",\"cut_at\":")?;
        let digits = &rest[..rest.iter().position(|&byte| byte == b',')?];
        cut_at = std::str::from_utf8(digits).ok()?.parse().ok()?;
    }
    Some(LineHead {
        v,
        key: Cow::Borrowed(std::str::from_utf8(key).ok()?),
        cut_at,
    })
}

/// Maximum plausible cost of a record in US dollars.
const MAX_COST_USD: f64 = 1e6;

/// Returns the cost in US dollars of a line that [`verify`] and [`head`] have accepted; 0 if it has none.
///
/// # Errors
/// If the cost is negative, which would raise the remaining budget, or above 1,000,000.
pub fn cost_usd(line: &[u8]) -> Result<f64, LineError> {
    let usd = parse_cost(line)?;
    if (0.0..=MAX_COST_USD).contains(&usd) {
        Ok(usd)
    } else {
        Err(LineError::InvalidRecord(format!(
            "it has an impossible cost of ${usd}"
        )))
    }
}

fn parse_cost(line: &[u8]) -> Result<f64, LineError> {
    #[derive(Deserialize)]
    struct CostField {
        #[serde(default)]
        cost_usd: f64,
    }
    if let Some(cost) = trailing_cost(line) {
        return Ok(cost);
    }
    let cost: CostField = serde_json::from_slice(line)
        .map_err(|error| LineError::InvalidRecord(error.to_string()))?;
    Ok(cost.cost_usd)
}

/// Parses the cost from the end of a line as this version writes it:
/// `…,"cost_usd":<number>,"extra":"<string>","crc":"…"}`.
fn trailing_cost(line: &[u8]) -> Option<f64> {
    const NAME: &[u8] = b",\"cost_usd\":";
    const NEXT: &[u8] = b",\"extra\":\"";
    // A string cannot contain either name: a quotation mark inside a string is escaped.
    let next = memchr::memmem::rfind(line, NEXT)?;
    let start = memchr::memmem::rfind(&line[..next], NAME)? + NAME.len();
    let after_extra = line.get(next + NEXT.len()..line.len().checked_sub(CHECKSUM_BYTES + 2)?)?;
    // A further field means that the line has another form.
    let ends_string = |position: usize| position == 0 || after_extra[position - 1] != b'\\';
    if line[start..next].contains(&b',') || memchr::memchr_iter(b'"', after_extra).any(ends_string)
    {
        return None;
    }
    std::str::from_utf8(&line[start..next]).ok()?.parse().ok()
}

/// Decodes the record in a line that [`verify`] and [`head`] have accepted. Unknown fields are ignored.
pub fn decode(line: &[u8]) -> Result<Record, LineError> {
    serde_json::from_slice(line).map_err(|e| LineError::InvalidRecord(e.to_string()))
}

/// Decodes a record like [`decode`]; also checks that the cost is plausible and that the key belongs to the request.
pub(crate) fn decode_checked(line: &[u8]) -> Result<Record, LineError> {
    cost_usd(line)?;
    let record = decode(line)?;
    if question::is_key_of(&record) {
        Ok(record)
    } else {
        Err(LineError::WrongKey)
    }
}
