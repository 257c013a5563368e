//! Converts the logprobs of a reply to the columns of a record. Pure.
//!
//! Two formats are parsed. Chat completions have a list of positions in `content`. Text completions have the parallel
//! lists `tokens`, `token_logprobs` and `top_logprobs`.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::cache::hex;
use crate::cache::raw_token::RawToken;
use crate::cache::record::{Logprobs, MISSING_LOGPROB};
use crate::prompt::control_tokens::is_end_of_turn_name;

/// The field `logprobs` in its usual formats.
#[derive(Deserialize)]
pub(crate) struct WireLogprobs<'a> {
    #[serde(borrow)]
    content: Option<Vec<Position<'a>>>,
    tokens: Option<Vec<String>>,
    token_logprobs: Option<Vec<Logprob>>,
    top_logprobs: Option<Vec<Option<Map<String, Value>>>>,
}

/// A token of the answer with its logprob and the most likely alternatives.
#[derive(Deserialize)]
struct Position<'a> {
    #[serde(borrow)]
    token: Cow<'a, str>,
    #[serde(default)]
    logprob: Logprob,
    bytes: Option<TokenByteList>,
    #[serde(borrow, alias = "top_probs")]
    top_logprobs: Option<Vec<WireToken<'a>>>,
    /// Probability instead of a logprob, as llama.cpp sends it for probabilities after sampling.
    prob: Option<f64>,
}

/// A token with its logprob.
#[derive(Deserialize)]
pub(crate) struct WireToken<'a> {
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    #[serde(default)]
    pub logprob: Logprob,
    pub bytes: Option<TokenByteList>,
    #[serde(default)]
    pub prob: Option<f64>,
}

impl WireToken<'_> {
    /// Returns the token's bytes, or the bytes of its text if they are missing or empty, as for control tokens.
    pub(crate) fn spelled(&self) -> &[u8] {
        match &self.bytes {
            Some(bytes) if !bytes.as_slice().is_empty() => bytes.as_slice(),
            _ => self.token.as_bytes(),
        }
    }
}

/// A logprob; None if it is missing.
#[derive(Clone, Copy, Default)]
pub(crate) struct Logprob(Option<f32>);

impl Logprob {
    /// Returns the logprob, or the logarithm of the probability if the logprob is missing.
    fn or_ln(self, probability: Option<f64>) -> Logprob {
        match (self.0, probability) {
            (None, Some(probability)) => probability.ln().into(),
            _ => self,
        }
    }
}

impl From<f64> for Logprob {
    fn from(value: f64) -> Self {
        Logprob((value.is_finite() && value > f64::from(MISSING_LOGPROB)).then_some(value as f32))
    }
}

impl<'de> Deserialize<'de> for Logprob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Lenient;
        impl Visitor<'_> for Lenient {
            type Value = Logprob;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a logprob")
            }

            fn visit_f64<E>(self, value: f64) -> Result<Logprob, E> {
                Ok(value.into())
            }

            fn visit_i64<E>(self, value: i64) -> Result<Logprob, E> {
                Ok((value as f64).into())
            }

            fn visit_u64<E>(self, value: u64) -> Result<Logprob, E> {
                Ok((value as f64).into())
            }

            /// Parses a number in a string; `"-Infinity"` and other texts are missing logprobs.
            fn visit_str<E>(self, text: &str) -> Result<Logprob, E> {
                let value: Result<f64, _> = text.trim().parse();
                Ok(value.map(Logprob::from).unwrap_or_default())
            }

            fn visit_unit<E>(self) -> Result<Logprob, E> {
                Ok(Logprob(None))
            }
        }
        deserializer.deserialize_any(Lenient)
    }
}

/// Bytes of a token. A reply has thousands of tokens, so up to [`MAX_INLINE`] bytes are stored without an allocation.
pub(crate) enum TokenByteList {
    /// The bytes and their number.
    Inline([u8; MAX_INLINE], usize),
    Allocated(Vec<u8>),
}

/// Maximum number of bytes that are stored inline.
const MAX_INLINE: usize = 24;

impl Default for TokenByteList {
    fn default() -> Self {
        TokenByteList::Inline([0; MAX_INLINE], 0)
    }
}

impl TokenByteList {
    pub(crate) fn push(&mut self, byte: u8) {
        match self {
            TokenByteList::Inline(bytes, length) if *length < MAX_INLINE => {
                bytes[*length] = byte;
                *length += 1;
            }
            TokenByteList::Inline(bytes, _) => {
                let mut allocated = bytes.to_vec();
                allocated.push(byte);
                *self = TokenByteList::Allocated(allocated);
            }
            TokenByteList::Allocated(bytes) => bytes.push(byte),
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            TokenByteList::Inline(bytes, length) => &bytes[..*length],
            TokenByteList::Allocated(bytes) => bytes,
        }
    }
}

impl From<&[u8]> for TokenByteList {
    fn from(slice: &[u8]) -> Self {
        let mut bytes = TokenByteList::default();
        slice.iter().for_each(|byte| bytes.push(*byte));
        bytes
    }
}

impl<'de> Deserialize<'de> for TokenByteList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = TokenByteList;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a list of bytes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<TokenByteList, A::Error> {
                let mut bytes = TokenByteList::default();
                while let Some(byte) = list.next_element()? {
                    bytes.push(byte);
                }
                Ok(bytes)
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// Parses the `logprobs` of a choice whose content is `text`. Returns `Ok(None)` if the endpoint sent none.
///
/// # Errors
/// The reason why the logprobs are unusable.
pub(crate) fn parse(raw: &str, text: &str) -> Result<Option<Logprobs>, String> {
    let error = match serde_json::from_str(raw) {
        Ok(wire) => return columns(wire, text),
        Err(error) => error,
    };
    let Ok(value) = serde_json::from_str::<Value>(raw) else {
        return Err(error.to_string());
    };
    let normalized = normalize(value).to_string();
    // Errors of the normalized text would not refer to the received one, so the first error is returned.
    columns(
        serde_json::from_str(&normalized).map_err(|_| error.to_string())?,
        text,
    )
}

/// Converts unusual formats to the usual one: a list of positions without an object around it, tokens with bytes but
/// without text, and alternatives as a map.
fn normalize(value: Value) -> Value {
    let mut fields = match value {
        Value::Array(positions) => {
            Map::from_iter([("content".to_owned(), Value::Array(positions))])
        }
        Value::Object(fields) => fields,
        other => return other,
    };
    let content = fields.get_mut("content").and_then(Value::as_array_mut);
    for position in content.into_iter().flatten() {
        normalize_token(position);
    }
    Value::Object(fields)
}

fn normalize_token(token: &mut Value) {
    let Value::Object(fields) = token else {
        return;
    };
    if fields.get("token").is_none_or(Value::is_null)
        && let Some(Value::Array(bytes)) = fields.get("bytes")
    {
        let bytes = bytes.iter().map(|byte| u8::try_from(byte.as_u64()?).ok());
        if let Some(bytes) = bytes.collect::<Option<Vec<u8>>>() {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            fields.insert("token".into(), text.into());
        }
    }
    let list = match fields.remove("top_logprobs") {
        Some(Value::Object(map)) => map
            .into_iter()
            .map(|(token, logprob)| serde_json::json!({"token": token, "logprob": logprob}))
            .collect(),
        Some(Value::Array(mut list)) => {
            list.iter_mut().for_each(normalize_token);
            list
        }
        _ => return,
    };
    fields.insert("top_logprobs".into(), Value::Array(list));
}

/// Converts deserialized logprobs. See [`parse`].
pub(crate) fn columns(wire: WireLogprobs, text: &str) -> Result<Option<Logprobs>, String> {
    let mut columns = LogprobColumns::default();
    if let Some(tokens) = wire.tokens {
        let logprobs = wire.token_logprobs.unwrap_or_default();
        if logprobs.len() != tokens.len() {
            return Err(format!(
                "{} tokens, but {} logprobs",
                tokens.len(),
                logprobs.len()
            ));
        }
        let mut top = wire.top_logprobs.unwrap_or_default().into_iter();
        for (token, logprob) in tokens.into_iter().zip(logprobs) {
            let alternatives = top.next().flatten().unwrap_or_default();
            let alternatives = alternatives.into_iter().map(|(token, logprob)| WireToken {
                token: token.into(),
                logprob: logprob.as_f64().map(Logprob::from).unwrap_or_default(),
                bytes: None,
                prob: None,
            });
            let position = WireToken {
                token: token.into(),
                logprob,
                bytes: None,
                prob: None,
            };
            columns.push(position, &mut alternatives.collect());
        }
    } else {
        for position in wire.content.unwrap_or_default() {
            let emitted = WireToken {
                token: position.token,
                logprob: position.logprob.or_ln(position.prob),
                bytes: position.bytes,
                prob: None,
            };
            let mut alternatives = position.top_logprobs.unwrap_or_default();
            for other in &mut alternatives {
                other.logprob = other.logprob.or_ln(other.prob);
            }
            columns.push(emitted, &mut alternatives);
        }
    }
    Ok(columns.finish(text))
}

/// Builder of a record's logprob columns.
#[derive(Default)]
pub(crate) struct LogprobColumns {
    logprobs: Logprobs,
    /// Concatenated bytes of the emitted tokens.
    joined: Vec<u8>,
}

impl LogprobColumns {
    /// Adds a position: the emitted token and its alternatives, which are drained.
    pub(crate) fn push(&mut self, emitted: WireToken, alternatives: &mut Vec<WireToken>) {
        self.joined.extend_from_slice(emitted.spelled());
        let logprob = emitted.logprob.0;
        let token = self.text(emitted, -1);
        // Most likely first, missing logprobs last; a stable sort keeps the order of equal ones.
        let value = |other: &WireToken| other.logprob.0.unwrap_or(f32::NEG_INFINITY);
        if !alternatives.is_sorted_by(|a, b| value(a) >= value(b)) {
            alternatives.sort_by(|a, b| value(b).total_cmp(&value(a)));
        }
        let mut top = Vec::with_capacity(alternatives.len());
        let mut top_logprob = Vec::with_capacity(alternatives.len());
        for (rank, other) in alternatives.drain(..).enumerate() {
            top_logprob.push(other.logprob.0);
            top.push(self.text(other, rank as i32));
        }
        self.logprobs.token.push(token);
        self.logprobs.logprob.push(logprob);
        self.logprobs.top.push(top);
        self.logprobs.top_logprob.push(top_logprob);
    }

    /// Returns a token's text. Bytes that are not valid UTF-8 become `""` and an entry in `raw`.
    fn text(&mut self, token: WireToken, rank: i32) -> String {
        let bytes = token.spelled();
        match std::str::from_utf8(bytes) {
            _ if bytes == token.token.as_bytes() => token.token.into_owned(),
            Ok(text) => text.to_owned(),
            Err(_) => {
                self.logprobs.raw.push(RawToken {
                    position: self.logprobs.token.len() as u32,
                    rank,
                    hex: hex::encode(bytes),
                });
                String::new()
            }
        }
    }

    /// Returns the columns of an answer whose content is `text`. None if no position was added.
    pub(crate) fn finish(mut self, text: &str) -> Option<Logprobs> {
        if self.logprobs.token.is_empty() {
            return None;
        }
        let last = self.logprobs.token.last().map_or("", String::as_str);
        let text = text.as_bytes();
        // The text does not include the end-of-turn token.
        let without_end = || self.joined.strip_suffix(last.as_bytes());
        self.logprobs.matches_text =
            self.joined == text || is_end_of_turn_name(last) && without_end() == Some(text);
        Some(self.logprobs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(raw: Value, text: &str) -> Logprobs {
        super::parse(&raw.to_string(), text).unwrap().unwrap()
    }

    #[test]
    fn split_characters_are_kept_as_bytes() {
        let raw = json!({"content": [
            {"token": "\\xc3", "logprob": -0.5, "bytes": [195], "top_logprobs": [
                {"token": "\\xc3", "logprob": -0.5, "bytes": [195]},
                {"token": "a", "logprob": -1, "bytes": [97]}]},
            {"token": "\\xa4", "logprob": 0, "bytes": [164], "top_logprobs": []},
        ]});
        let logprobs = parse(raw, "ä");
        assert!(logprobs.matches_text);
        assert_eq!(logprobs.token, ["", ""]);
        assert_eq!(logprobs.top, [vec!["".to_string(), "a".into()], vec![]]);
        assert_eq!(logprobs.logprob, [Some(-0.5), Some(0.0)]);
        let raw: Vec<_> = logprobs
            .raw
            .iter()
            .map(|raw| (raw.position, raw.rank, raw.hex.as_str()))
            .collect();
        assert_eq!(raw, [(0, -1, "c3"), (0, 0, "c3"), (1, -1, "a4")]);
    }

    #[test]
    fn missing_logprobs_stay_missing_and_sort_last() {
        let raw = json!({"content": [{"token": "a", "logprob": null, "bytes": null, "top_logprobs": [
            {"token": "s", "logprob": -9999.0}, {"token": "n", "logprob": null},
            {"token": "i", "logprob": "-Infinity"}, {"token": "m"},
            {"token": "b", "logprob": -2.0, "id": 5}, {"token": "a", "logprob": -0.25}]}]});
        let logprobs = parse(raw, "a");
        assert_eq!(logprobs.logprob, [None]);
        assert_eq!(logprobs.top[0], ["a", "b", "s", "n", "i", "m"]);
        assert_eq!(
            logprobs.top_logprob[0],
            [Some(-0.25), Some(-2.0), None, None, None, None]
        );
    }

    #[test]
    fn tokens_that_do_not_spell_the_text_are_marked() {
        let raw = json!({"content": [{"token": "a", "logprob": -1}, {"token": "b", "logprob": 0}]});
        assert!(!parse(raw, "a").matches_text);
    }

    #[test]
    fn end_of_turn_token_is_kept_by_name() {
        for bytes in [json!(null), json!([]), json!(b"<eos>")] {
            let end = json!({"token": "<eos>", "logprob": 0, "bytes": bytes});
            let raw =
                json!({"content": [{"token": "a", "logprob": -1, "top_logprobs": [end]}, end]});
            let logprobs = parse(raw, "a");
            assert!(logprobs.matches_text, "{bytes}");
            assert_eq!(logprobs.token, ["a", "<eos>"]);
            assert_eq!(logprobs.top[0], ["<eos>"]);
        }
    }

    #[test]
    fn text_completion_format_is_parsed() {
        let raw = json!({"tokens": ["a", " b"], "token_logprobs": [null, -1.5],
            "top_logprobs": [null, {" c": -2.0, " b": -1.5}], "text_offset": [0, 1]});
        let logprobs = parse(raw, "a b");
        assert!(logprobs.matches_text);
        assert_eq!(logprobs.logprob, [None, Some(-1.5)]);
        assert_eq!(logprobs.top, [vec![], vec![" b".to_string(), " c".into()]]);
        assert_eq!(logprobs.top_logprob, [vec![], vec![Some(-1.5), Some(-2.0)]]);
    }

    #[test]
    fn unusual_formats_are_normalized() {
        let usual = json!({"content": [{"token": "a", "logprob": -0.25, "top_logprobs": [
            {"token": "a", "logprob": -0.25}, {"token": "b", "logprob": -2.0}]}]});
        let expected = parse(usual, "a");
        let spellings = [
            json!([{"token": "a", "logprob": -0.25, "top_logprobs": {"a": -0.25, "b": -2}}]),
            json!({"content": [{"token": null, "bytes": [97], "logprob": "-0.25", "top_logprobs": [
                {"token": "a", "logprob": "-0.25"}, {"token": "b", "logprob": " -2 "}]}]}),
            json!({"content": [{"token": "a", "prob": (-0.25f64).exp(), "top_probs": [
                {"token": "a", "prob": (-0.25f64).exp()}, {"token": "b", "prob": (-2f64).exp()}]}]}),
        ];
        for spelled in spellings {
            assert_eq!(parse(spelled.clone(), "a"), expected, "{spelled}");
        }
    }

    #[test]
    fn missing_logprobs_differ_from_invalid_ones() {
        for raw in [json!({}), json!({"content": null}), json!({"content": []})] {
            assert_eq!(super::parse(&raw.to_string(), "a"), Ok(None));
        }
        let nonsense = [
            json!("x"),
            json!({"content": [{"logprob": 1}]}),
            json!({"content": [{"token": "a", "bytes": [300]}]}),
            json!({"tokens": ["a"], "token_logprobs": []}),
        ];
        for raw in nonsense {
            assert!(super::parse(&raw.to_string(), "a").is_err(), "{raw}");
        }
    }
}
