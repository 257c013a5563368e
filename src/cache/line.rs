//! One line of the cache: a record as JSON, sealed by a checksum.
//!
//! A line is the record's JSON object with one more field at its very end:
//!
//! ```text
//! {"v":1,"key":"…", … ,"extra":"{}","crc":"1a2b3c4d"}⏎
//! └───────────── sealed ────────────┘
//! ```
//!
//! `crc` is the CRC-32C (Castagnoli), as 8 lower-case hex digits, of every byte before it: from the
//! opening brace up to and including the comma in front of `"crc"`. Being a field, it does not keep
//! `jq`, pandas or `datasets` from reading the file as it is.

use std::borrow::Cow;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::record::{Record, SCHEMA};

/// Bytes of `"crc":"1a2b3c4d"}`.
const SEAL: usize = 17;

/// Why a line is no record that this version can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("it has no checksum at its end")]
    Unsealed,
    #[error("its checksum does not match its content")]
    Checksum,
    #[error("a newer distill wrote it (schema {0}, this one reads up to {SCHEMA}): update distill")]
    Newer(u32),
    #[error("its checksum is right, but it is no record: {0}")]
    NoRecord(String),
}

/// What opening a cache needs of a line.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Head<'a> {
    pub v: u32,
    #[serde(borrow)]
    pub key: Cow<'a, str>,
}

/// The line that stores `record`, with its newline.
pub fn encode(record: &Record) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record).context("could not encode a record")?;
    line.pop();
    line.push(b',');
    let seal = seal(&line);
    line.extend_from_slice(seal.as_bytes());
    line.push(b'\n');
    Ok(line)
}

fn seal(sealed: &[u8]) -> String {
    format!("\"crc\":\"{:08x}\"}}", crc32c::crc32c(sealed))
}

/// Does the checksum of `line` (without its line end) hold?
pub fn verify(line: &[u8]) -> Result<(), Fault> {
    let (sealed, found) = line
        .split_at_checked(line.len().wrapping_sub(SEAL))
        .ok_or(Fault::Unsealed)?;
    if !sealed.ends_with(b",") || !found.starts_with(b"\"crc\":\"") || !found.ends_with(b"\"}") {
        return Err(Fault::Unsealed);
    }
    // As text, so that there is exactly one valid spelling of a checksum.
    if found != seal(sealed).as_bytes() {
        return Err(Fault::Checksum);
    }
    Ok(())
}

/// Version and key of a line that [`verify`] has accepted, without reading the rest of it where
/// the line starts as this version writes it.
pub fn head(line: &[u8]) -> Result<Head<'_>, Fault> {
    let head = match leading_head(line) {
        Some(head) => head,
        None => serde_json::from_slice(line).map_err(|e| Fault::NoRecord(e.to_string()))?,
    };
    match head.v {
        1..=SCHEMA => Ok(head),
        0 => Err(Fault::NoRecord("schema 0 does not exist".to_owned())),
        newer => Err(Fault::Newer(newer)),
    }
}

/// The head of `{"v":1,"key":"<no escapes>",…`.
fn leading_head(line: &[u8]) -> Option<Head<'_>> {
    let rest = line.strip_prefix(b"{\"v\":1,\"key\":\"")?;
    let key = &rest[..rest.iter().position(|&byte| byte == b'"')?];
    if key.contains(&b'\\') {
        return None;
    }
    Some(Head {
        v: 1,
        key: Cow::Borrowed(std::str::from_utf8(key).ok()?),
    })
}

/// The record in a line that [`verify`] and [`head`] have accepted. Fields that this version does
/// not know are left out.
pub fn decode(line: &[u8]) -> Result<Record, Fault> {
    serde_json::from_slice(line).map_err(|e| Fault::NoRecord(e.to_string()))
}
