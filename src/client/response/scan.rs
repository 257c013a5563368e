//! Fast parser of the top-k logprobs of a reply. Pure.
//!
//! Logprobs are most of a body: those of 500 tokens with k = 20 take 740 kB. This parser is four times as fast as serde,
//! but accepts only the usual format; [`crate::client::response::logprobs`] parses every format. Both parsers return the
//! same result for the usual format.

use std::borrow::Cow;

use memchr::memmem;
use serde::Deserialize;
use serde::de::{Deserializer, Error};

use crate::client::response::logprobs::{Logprob, LogprobColumns, TokenByteList, WireToken};

/// A body whose logprobs were parsed and removed.
pub(crate) struct BodyWithoutLogprobs {
    /// The body with a [`Placeholder`] instead of the list of logprobs.
    pub body: Vec<u8>,
    pub columns: LogprobColumns,
}

/// Deserialized logprobs whose list was removed.
pub(crate) struct Placeholder;

/// Text in place of the removed list. Servers never send it.
const PLACEHOLDER: &str = "\u{1}distill: logprobs were here";

impl<'de> Deserialize<'de> for Placeholder {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Wire {
            content: String,
        }
        if Wire::deserialize(deserializer)?.content == PLACEHOLDER {
            Ok(Placeholder)
        } else {
            Err(D::Error::custom("the list of logprobs was not removed"))
        }
    }
}

/// Parses and removes the first list of logprobs in a body. None if the body contains no list, or its format is unusual.
pub(crate) fn remove_logprobs(body: &[u8]) -> Option<BodyWithoutLogprobs> {
    // Inside a JSON string the quotes would be escaped.
    let field = memmem::find(body, b"\"logprobs\"")?;
    let mut scanner = Scanner {
        text: std::str::from_utf8(body).ok()?,
        pos: field + "\"logprobs\"".len(),
    };
    scanner.require(b':')?;
    scanner.require(b'{')?;
    if scanner.string()? != "content" {
        return None;
    }
    scanner.require(b':')?;
    scanner.skip_space();
    let start = scanner.pos;
    let mut columns = LogprobColumns::default();
    let mut top = Vec::new();
    scanner.list(|scanner| {
        let position = scanner.token(Some(&mut top))?;
        columns.push(position, &mut top);
        Some(())
    })?;
    let mut remaining = body[..start].to_vec();
    remaining.extend(serde_json::to_vec(PLACEHOLDER).ok()?);
    remaining.extend_from_slice(&body[scanner.pos..]);
    Some(BodyWithoutLogprobs {
        body: remaining,
        columns,
    })
}

/// Position in a JSON text. Methods return None if the text does not have the expected form.
struct Scanner<'a> {
    text: &'a str,
    pos: usize,
}

impl<'a> Scanner<'a> {
    fn skip_space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.text.as_bytes().get(self.pos) {
            self.pos += 1;
        }
    }

    /// Returns the next byte after white space, without consuming it.
    fn peek(&mut self) -> Option<u8> {
        self.skip_space();
        self.text.as_bytes().get(self.pos).copied()
    }

    /// Consumes the byte if it is next.
    fn take(&mut self, byte: u8) -> bool {
        let is_next = self.peek() == Some(byte);
        self.pos += usize::from(is_next);
        is_next
    }

    fn require(&mut self, byte: u8) -> Option<()> {
        self.take(byte).then_some(())
    }

    fn take_null(&mut self) -> bool {
        self.skip_space();
        let is_next = self.text.as_bytes()[self.pos..].starts_with(b"null");
        self.pos += if is_next { 4 } else { 0 };
        is_next
    }

    fn string(&mut self) -> Option<Cow<'a, str>> {
        self.require(b'"')?;
        let start = self.pos;
        let mut is_plain = true;
        loop {
            match self.text.as_bytes().get(self.pos)? {
                b'"' => break,
                b'\\' => {
                    is_plain = false;
                    self.pos += 2;
                }
                // JSON requires control characters to be escaped.
                0..0x20 => return None,
                _ => self.pos += 1,
            }
        }
        self.pos += 1;
        if is_plain {
            Some(Cow::Borrowed(&self.text[start..self.pos - 1]))
        } else {
            serde_json::from_str(&self.text[start - 1..self.pos]).ok()
        }
    }

    fn number(&mut self) -> Option<f64> {
        self.skip_space();
        let start = self.pos;
        while let Some(b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E') =
            self.text.as_bytes().get(self.pos)
        {
            self.pos += 1;
        }
        self.text[start..self.pos].parse().ok()
    }

    /// Parses a list, each item by `item`.
    fn list(&mut self, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.require(b'[')?;
        if self.take(b']') {
            return Some(());
        }
        loop {
            item(self)?;
            if !self.take(b',') {
                return self.require(b']');
            }
        }
    }

    /// Parses a token with its logprob, and appends its alternatives to `top`. An alternative is parsed with `top` =
    /// None, because it has no alternatives.
    fn token(&mut self, mut top: Option<&mut Vec<WireToken<'a>>>) -> Option<WireToken<'a>> {
        let mut token = None;
        let mut logprob = Logprob::default();
        let mut bytes = None;
        self.require(b'{')?;
        loop {
            let name = self.string()?;
            self.require(b':')?;
            match (&*name, &mut top) {
                ("token", _) => token = Some(self.string()?),
                ("logprob" | "bytes", _) | ("top_logprobs", Some(_)) if self.take_null() => {}
                ("logprob", _) => logprob = self.number()?.into(),
                ("bytes", _) => bytes = Some(self.bytes()?),
                ("top_logprobs", Some(top)) => self.list(|scanner| {
                    top.push(scanner.token(None)?);
                    Some(())
                })?,
                _ => return None,
            }
            if !self.take(b',') {
                break;
            }
        }
        self.require(b'}')?;
        Some(WireToken {
            token: token?,
            logprob,
            bytes,
            prob: None,
        })
    }

    fn bytes(&mut self) -> Option<TokenByteList> {
        let mut bytes = TokenByteList::default();
        self.list(|scanner| {
            scanner.skip_space();
            let digits = &scanner.text.as_bytes()[scanner.pos..];
            // A byte has at most three digits, so four are enough to detect a larger value.
            let leading_digits = digits.iter().take(4).take_while(|b| b.is_ascii_digit());
            let digit_count = leading_digits.count();
            let value = digits[..digit_count]
                .iter()
                .fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
            if digit_count == 0 {
                return None;
            }
            bytes.push(value.try_into().ok()?);
            scanner.pos += digit_count;
            Some(())
        })?;
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::cache::record::Logprobs;
    use crate::client::response::logprobs;

    /// Parses a body with these logprobs by [`remove_logprobs`] and by serde.
    fn parse_both_ways(
        logprobs: &Value,
        pretty: bool,
    ) -> (Option<Option<Logprobs>>, Option<Logprobs>) {
        let body = json!({"id": "x", "choices": [{"logprobs": logprobs}], "usage": 1});
        let body = if pretty {
            serde_json::to_string_pretty(&body)
        } else {
            serde_json::to_string(&body)
        };
        let scanned = remove_logprobs(body.unwrap().as_bytes()).map(|removed| {
            let body: Value = serde_json::from_slice(&removed.body).unwrap();
            let logprobs = body["choices"][0]["logprobs"].clone();
            assert!(serde_json::from_value::<Placeholder>(logprobs).is_ok());
            assert_eq!((&body["id"], &body["usage"]), (&json!("x"), &json!(1)));
            removed.columns.finish("text")
        });
        let by_serde = logprobs::parse(&logprobs.to_string(), "text").unwrap();
        (scanned, by_serde)
    }

    fn token() -> impl Strategy<Value = Map<String, Value>> {
        let text = prop_oneof![
            "[ -~]{0,6}",
            any::<String>().prop_map(|text| text.chars().take(30).collect())
        ];
        let logprob = prop_oneof![
            any::<f64>()
                .prop_filter("JSON numbers are finite", |value| value.is_finite())
                .prop_map(Value::from),
            (-20.0..0.0).prop_map(|value: f64| json!((value * 1e6).round() / 1e6)),
            (-9999i64..0).prop_map(Value::from),
            Just(Value::Null),
        ];
        let bytes = prop_oneof![
            Just(None),
            Just(Some(Value::Null)),
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Some(json!(bytes))),
        ];
        (text, logprob, bytes, any::<bool>(), any::<bool>()).prop_map(
            |(text, logprob, bytes, own_bytes, reverse)| {
                let bytes = if own_bytes {
                    Some(json!(text.as_bytes()))
                } else {
                    bytes
                };
                let mut fields = vec![
                    ("token".to_string(), json!(text)),
                    ("logprob".into(), logprob),
                ];
                fields.extend(bytes.map(|bytes| ("bytes".into(), bytes)));
                if reverse {
                    fields.reverse();
                }
                fields.into_iter().collect()
            },
        )
    }

    fn list() -> impl Strategy<Value = Value> {
        let top = proptest::collection::vec(token(), 0..5);
        let position = (token(), proptest::option::of(top)).prop_map(|(mut token, top)| {
            token.insert("top_logprobs".into(), json!(top));
            token
        });
        proptest::collection::vec(position, 0..6).prop_map(|list| json!({"content": list}))
    }

    proptest! {
        #[test]
        fn scanner_returns_what_serde_returns(logprobs in list(), pretty in any::<bool>()) {
            let (scanned, by_serde) = parse_both_ways(&logprobs, pretty);
            prop_assert_eq!(scanned, Some(by_serde), "{}", logprobs);
        }

        #[test]
        fn scanner_never_panics_on_random_bodies(body in proptest::collection::vec(any::<u8>(), 0..60), at in 0usize..200) {
            let mut valid = br#"{"choices":[{"logprobs":{"content":[{"token":"\u0041","logprob":-1.5,"bytes":[65],
                "top_logprobs":[{"token":"b","logprob":-2,"bytes":null}]}]}}]}"#.to_vec();
            let at = at.min(valid.len());
            valid.splice(at..at, body);
            remove_logprobs(&valid);
            remove_logprobs(&valid[..at]);
        }
    }

    #[test]
    fn unusual_logprobs_are_not_removed() {
        let token = r#"{"token":"a","logprob":-1}"#;
        let cases = [
            "null".into(),
            r#"{"content":null}"#.into(),
            r#"{"tokens":["a"]}"#.into(),
            r#"{"content":[{"token":"a","logprob":NaN}]}"#.into(),
            r#"{"content":[{"token":"a","logprob":-1,"id":7}]}"#.into(),
            r#"{"content":[{"token":"a","bytes":[256]}]}"#.into(),
            r#"{"content":[{"logprob":-1}]}"#.into(),
            format!(r#"{{"content":[{token}"#),
            format!(r#"{{"content":[{token},]}}"#),
        ];
        for case in cases {
            let body = format!(r#"{{"choices":[{{"logprobs":{case}}}]}}"#);
            assert!(remove_logprobs(body.as_bytes()).is_none(), "{case}");
        }
        let good = format!(r#"{{"logprobs" : {{ "content":[{token}, {token} ] }} }}"#);
        assert_eq!(
            remove_logprobs(good.as_bytes())
                .unwrap()
                .columns
                .finish("aa")
                .unwrap()
                .token,
            ["a", "a"]
        );
    }
}
