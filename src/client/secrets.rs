//! Removes API keys from replies before they are parsed, shown or stored.
//!
//! Endpoints repeat keys in many forms: plain, escaped for JSON, URLs or HTML, in hexadecimal and in base64. All
//! these forms are searched.

use aho_corasick::{AhoCorasick, AhoCorasickKind};
use anyhow::{Context as _, Result};
use base64::Engine;
use base64::prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use memchr::memchr3_iter;
use reqwest::header::{HeaderMap, HeaderValue};
use serde_json::Value;

use crate::cache::record::Answer;

/// Minimum length of a key in bytes. Shorter ones are placeholders (`none`, `EMPTY`) that may occur in an answer.
const MIN_LENGTH: usize = 8;

/// Length in bytes below which a key is searched as a whole word only, and not in hexadecimal or base64.
const MIN_ENCODED_LENGTH: usize = 20;

/// Maximum length of an HTML entity in bytes, as of `&#x0073;`.
const MAX_ENTITY_LENGTH: usize = 8;

/// Replacement text for a removed key.
const REPLACEMENT: &str = "[key]";

/// The keys of one endpoint, compiled for searching.
#[derive(Debug, Clone, Default)]
pub struct Secrets {
    keys: Vec<String>,
    forms: Option<AhoCorasick>,
    /// For each form, true if it counts as a key only where it is a whole word.
    whole_words_only: Vec<bool>,
}

impl Secrets {
    /// Compiles the forms of all keys.
    ///
    /// # Errors
    /// If a key is too long.
    pub fn new(secrets: impl IntoIterator<Item = String>) -> Result<Secrets> {
        let keys: Vec<String> = secrets
            .into_iter()
            .filter(|secret| secret.len() >= MIN_LENGTH)
            .collect();
        let mut all_forms = Vec::new();
        let mut whole_words_only = Vec::new();
        for secret in &keys {
            let forms = forms(secret);
            whole_words_only.extend(forms.iter().map(|_| secret.len() < MIN_ENCODED_LENGTH));
            all_forms.extend(forms);
        }
        // Other kinds of automata take minutes to build for a long, repetitive key.
        let finder = AhoCorasick::builder()
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(all_forms)
            .context("the key is too long")?;
        Ok(Secrets {
            forms: (!whole_words_only.is_empty()).then_some(finder),
            whole_words_only,
            keys,
        })
    }

    /// Returns a copy with additional keys.
    ///
    /// # Errors
    /// As [`Secrets::new`].
    pub fn with(&self, secrets: impl IntoIterator<Item = String>) -> Result<Secrets> {
        Secrets::new(self.keys.iter().cloned().chain(secrets))
    }

    /// Replaces keys in a text, in each of their forms.
    pub fn clean(&self, text: Bytes) -> Bytes {
        self.cleaned(&text).map_or(text, Bytes::from)
    }

    /// As [`Secrets::clean`], but returns None if the text contains no key.
    fn cleaned(&self, text: &[u8]) -> Option<Vec<u8>> {
        let forms = self.forms.as_ref().filter(|_| text.len() >= MIN_LENGTH)?;
        let mut ranges = self.key_ranges(forms, text);
        if has_escaped_letters(text) {
            let (decoded, offsets) = decode(text);
            let escaped = self.key_ranges(forms, &decoded).into_iter();
            ranges.extend(escaped.map(|(start, end)| (offsets[start], offsets[end])));
        }
        if ranges.is_empty() {
            return None;
        }
        ranges.sort_unstable();
        let mut clean = Vec::with_capacity(text.len());
        let mut end_of_last = 0;
        for (start, end) in ranges {
            if start >= end_of_last {
                clean.extend_from_slice(&text[end_of_last..start]);
                clean.extend_from_slice(REPLACEMENT.as_bytes());
            }
            end_of_last = end_of_last.max(end);
        }
        clean.extend_from_slice(&text[end_of_last..]);
        Some(clean)
    }

    /// Returns the byte ranges of keys in a text. They may overlap.
    fn key_ranges(&self, forms: &AhoCorasick, text: &[u8]) -> Vec<(usize, usize)> {
        let is_alphanumeric = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        // Overlapping matches are needed: a long key may contain a short one that is not a whole word there.
        let matches = forms.find_overlapping_iter(text).filter(|key_match| {
            let before = key_match.start().checked_sub(1).map(|index| &text[index]);
            let after = text.get(key_match.end());
            let touches_word = is_alphanumeric(before) || is_alphanumeric(after);
            !(self.whole_words_only[key_match.pattern().as_usize()] && touches_word)
        });
        let ranges = matches.map(|key_match| (key_match.start(), key_match.end()));
        ranges.collect()
    }

    /// Returns true if the text contains a key. Does not decode escapes.
    pub fn is_in(&self, text: &str) -> bool {
        let forms = self.forms.as_ref().filter(|_| text.len() >= MIN_LENGTH);
        forms.is_some_and(|forms| !self.key_ranges(forms, text.as_bytes()).is_empty())
    }

    /// Removes keys from a text. Returns true if it contained a key.
    pub fn clean_text(&self, text: &mut String) -> bool {
        let clean = self.cleaned(text.as_bytes());
        if let Some(clean) = &clean {
            *text = String::from_utf8_lossy(clean).into_owned();
        }
        clean.is_some()
    }

    /// Removes keys from the strings and field names of a JSON value.
    pub fn clean_value(&self, value: &mut Value) {
        if self.forms.is_none() {
            return;
        }
        match value {
            Value::String(text) => {
                self.clean_text(text);
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.clean_value(item)),
            Value::Object(fields) => {
                let names = fields.keys().filter(|name| self.is_in(name));
                for name in names.cloned().collect::<Vec<_>>() {
                    let mut clean = name.clone();
                    self.clean_text(&mut clean);
                    let value = fields.remove(&name).unwrap_or_default();
                    fields.insert(clean, value);
                }
                fields
                    .values_mut()
                    .for_each(|value| self.clean_value(value));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// Removes keys from header values.
    pub fn clean_headers(&self, headers: &mut HeaderMap) {
        for value in headers.values_mut() {
            if let Some(clean) = self.cleaned(value.as_bytes()) {
                *value = HeaderValue::from_bytes(&clean)
                    .unwrap_or_else(|_| HeaderValue::from_static(REPLACEMENT));
            }
        }
    }

    /// Removes keys from an answer that was joined from several parts of a reply. Returns true if it contained a key.
    pub fn clean_answer(&self, answer: &mut Answer) -> bool {
        let texts = [&mut answer.text, &mut answer.reasoning, &mut answer.refusal];
        texts
            .into_iter()
            .fold(false, |had_key, text| self.clean_text(text) | had_key)
    }
}

/// Returns the forms of a key: plain, in hexadecimal with and without separators, and in base64.
///
/// In base64 a key has three alignments in each of two alphabets. Characters at its ends that also encode
/// neighbouring bytes are left out.
fn forms(secret: &str) -> Vec<Vec<u8>> {
    let mut forms = vec![secret.as_bytes().to_vec()];
    if secret.len() < MIN_ENCODED_LENGTH {
        return forms;
    }
    for separator in ["", ":", " "] {
        let digits: Vec<String> = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
        let digits = digits.join(separator);
        forms.extend([digits.to_ascii_uppercase(), digits].map(String::into_bytes));
    }
    for before in 0..3 {
        let mut bytes = vec![0; before];
        bytes.extend_from_slice(secret.as_bytes());
        let first = (before * 8).div_ceil(6);
        let last = bytes.len() * 8 / 6;
        for engine in [&BASE64_STANDARD_NO_PAD, &BASE64_URL_SAFE_NO_PAD] {
            forms.push(engine.encode(&bytes).as_bytes()[first..last].to_vec());
        }
    }
    forms
}

/// Returns true if the text escapes a character that a key may contain. Escaped line breaks, quotes and non-ASCII
/// letters are common, but keys do not contain them.
fn has_escaped_letters(text: &[u8]) -> bool {
    memchr3_iter(b'\\', b'%', b'&', text).any(|position| {
        // Each run of backslashes is parsed once, at its start.
        let is_within_run = text[..position].ends_with(b"\\") && text[position] == b'\\';
        !is_within_run
            && escape(&text[position..]).is_some_and(|(letter, _)| {
                letter.is_ascii_alphanumeric() || b"+/-_=.".contains(&letter)
            })
    })
}

/// Decodes an escape of one byte at the start of `text`. Returns the byte and the length of the escape. Backslashes may
/// be doubled, as in JSON within JSON.
fn escape(text: &[u8]) -> Option<(u8, usize)> {
    let hex = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).ok()?;
        u8::from_str_radix(digits, 16).ok()
    };
    match text.first()? {
        b'%' => return Some((hex(text.get(1..3)?)?, 3)),
        b'&' => return entity(text),
        _ => {}
    }
    let slashes = text.iter().take_while(|byte| **byte == b'\\').count();
    if slashes == 0 {
        return None;
    }
    match text.get(slashes)? {
        b'u' | b'U' if text.get(slashes + 1..slashes + 3)? == b"00" => {
            Some((hex(text.get(slashes + 3..slashes + 5)?)?, slashes + 5))
        }
        b'x' => Some((hex(text.get(slashes + 1..slashes + 3)?)?, slashes + 3)),
        b'/' => Some((b'/', slashes + 1)),
        _ => None,
    }
}

/// As [`escape`], for an HTML entity: `&#115;` or `&#x73;`.
fn entity(text: &[u8]) -> Option<(u8, usize)> {
    let end = text
        .iter()
        .take(MAX_ENTITY_LENGTH)
        .position(|byte| *byte == b';')?;
    let digits = std::str::from_utf8(text.get(2..end)?).ok()?;
    let value = match digits.strip_prefix(['x', 'X']) {
        Some(digits) => u8::from_str_radix(digits, 16),
        None => digits.parse(),
    };
    (text[1] == b'#').then_some((value.ok()?, end + 1))
}

/// Decodes all escapes. Returns the decoded text and the offset of each of its bytes, and of its end, in `text`.
fn decode(text: &[u8]) -> (Vec<u8>, Vec<usize>) {
    let mut decoded = Vec::new();
    let mut offsets = Vec::new();
    let mut position = 0;
    while position < text.len() {
        if let Some((byte, length)) = escape(&text[position..]) {
            decoded.push(byte);
            offsets.push(position);
            position += length;
            continue;
        }
        // If a run of backslashes does not begin an escape, no part of the run does.
        let run = text[position..]
            .iter()
            .take_while(|byte| **byte == b'\\')
            .count();
        let end = position + run.max(1);
        decoded.extend_from_slice(&text[position..end]);
        offsets.extend(position..end);
        position = end;
    }
    offsets.push(text.len());
    (decoded, offsets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: &str = "sk-0123456789abcdefghijXYZ";

    fn clean(text: &str) -> String {
        let secrets = Secrets::new([KEY.to_string()]).unwrap();
        let clean = secrets.clean(Bytes::copy_from_slice(text.as_bytes()));
        String::from_utf8(clean.to_vec()).unwrap()
    }

    #[test]
    fn keys_are_removed_in_every_encoding() {
        let escape_each_nth = |n: usize, with: &dyn Fn(u8) -> String| -> String {
            let letter = |(index, byte): (usize, u8)| match index % n {
                0 => with(byte),
                _ => char::from(byte).to_string(),
            };
            KEY.bytes().enumerate().map(letter).collect()
        };
        let json = |b: u8| format!("\\u{b:04x}");
        let twice = |b: u8| format!("\\\\u{b:04X}");
        let url = |b: u8| format!("%{b:02x}");
        let bytes = |encode: &dyn Fn(u8) -> String, separator: &str| -> String {
            let bytes: Vec<String> = KEY.bytes().map(encode).collect();
            bytes.join(separator)
        };
        let mut forms = vec![KEY.to_string()];
        for separator in ["", ":", " "] {
            forms.push(bytes(&|b| format!("{b:02x}"), separator));
            forms.push(bytes(&|b| format!("{b:02X}"), separator));
        }
        forms.push(bytes(&|b| format!("&#{b};"), ""));
        forms.push(bytes(&|b| format!("&#x{b:x};"), ""));
        forms.push(bytes(&|b| format!("\\x{b:02x}"), ""));
        for n in [1, 2, 7, 100] {
            forms.extend(
                [&json as &dyn Fn(u8) -> String, &twice, &url].map(|with| escape_each_nth(n, with)),
            );
        }
        for form in forms {
            assert_eq!(clean(&format!("a {form}\\n{form} b")), "a [key]\\n[key] b");
        }
    }

    #[test]
    fn text_without_a_key_is_unchanged() {
        for text in [
            "a text with \\u00e9, \\n, 100 % and \\/slashes\\/",
            "sk-0123456789abcdefghijXY",
            "",
        ] {
            assert_eq!(clean(text), text);
        }
        let short = Secrets::new(["my-vllm-token".to_string()]).unwrap();
        let text = Bytes::from_static(b"Bearer my-vllm-token, my-vllm-tokens");
        assert_eq!(short.clean(text), "Bearer [key], my-vllm-tokens");
        let none = Secrets::new(["none".to_string()]).unwrap();
        assert_eq!(
            none.clean(Bytes::from_static(b"none is left")),
            "none is left"
        );
    }

    #[test]
    fn overlapping_keys_are_both_removed() {
        let both = ["sk-abcdef", "xxsk-abcdef0123456789abcdef"].map(str::to_owned);
        let secrets = Secrets::new(both).unwrap();
        let text = Bytes::from_static(b"sk-abcdef, xxsk-abcdef0123456789abcdef");
        assert_eq!(secrets.clean(text), "[key], [key]");
    }

    #[test]
    fn long_backslash_runs_take_linear_time() {
        let text = "\\".repeat(4 << 20) + &KEY.replace('a', "\\u0061");
        assert!(clean(&text).ends_with("[key]"));
    }

    proptest! {
        #[test]
        fn base64_of_a_text_that_contains_the_key_is_removed(
            before in "[ -~]{0,9}",
            after in "[ -~]{0,9}",
            is_url_safe: bool,
        ) {
            let text = format!("{before}{KEY}{after}");
            let encoded = if is_url_safe { BASE64_URL_SAFE_NO_PAD.encode(&text) } else { BASE64_STANDARD_NO_PAD.encode(&text).replace('/', "\\/") };
            let cleaned = clean(&format!("x {encoded} y"));
            prop_assert_eq!(cleaned.split("[key]").count(), 2, "{}", cleaned);
        }
    }
}
