//! Fast parser of the top-k logprobs of a reply. Pure.
//!
//! Logprobs are most of a body: 500 tokens at k = 20 are 740 kB. This parser is four times as fast as serde, but
//! accepts the usual format only. All others are left to [`crate::client::response::logprobs`]. Both return the same
//! result for what both accept.

use std::borrow::Cow;

use memchr::memmem;
use serde::Deserialize;
use serde::de::{Deserializer, Error};

use crate::client::response::logprobs::{Logprob, LogprobColumns, TokenByteList, WireToken};

/// A body whose logprobs were parsed and removed.
pub(crate) struct BodyWithoutLogprobs {
    /// The body with a [`Mark`] instead of the list of logprobs.
    pub rest: Vec<u8>,
    pub columns: LogprobColumns,
}

/// Placeholder of removed logprobs.
pub(crate) struct Mark;

/// Text of the placeholder, which no server sends.
const MARK: &str = "\u{1}distill: logprobs were here";

impl<'de> Deserialize<'de> for Mark {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Wire {
            content: String,
        }
        if Wire::deserialize(deserializer)?.content == MARK {
            Ok(Mark)
        } else {
            Err(D::Error::custom("logprobs that were not parsed"))
        }
    }
}

/// Parses and removes the first list of logprobs in a body. None if there is none, or its format is unusual.
pub(crate) fn cut(body: &[u8]) -> Option<BodyWithoutLogprobs> {
    // Inside a JSON string the quotes would be escaped.
    let field = memmem::find(body, b"\"logprobs\"")?;
    let mut scanner = Scanner {
        text: std::str::from_utf8(body).ok()?,
        at: field + "\"logprobs\"".len(),
    };
    scanner.need(b':')?;
    scanner.need(b'{')?;
    if scanner.string()? != "content" {
        return None;
    }
    scanner.need(b':')?;
    scanner.space();
    let start = scanner.at;
    let mut columns = LogprobColumns::default();
    let mut top = Vec::new();
    scanner.list(|scanner| {
        let position = scanner.token(Some(&mut top))?;
        columns.push(position, &mut top);
        Some(())
    })?;
    let mut rest = body[..start].to_vec();
    rest.extend(serde_json::to_vec(MARK).ok()?);
    rest.extend_from_slice(&body[scanner.at..]);
    Some(BodyWithoutLogprobs { rest, columns })
}

/// Position in a JSON text. Methods return None if the text does not have the expected form.
struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.text.as_bytes().get(self.at) {
            self.at += 1;
        }
    }

    /// Returns the next byte after white space, without consuming it.
    fn peek(&mut self) -> Option<u8> {
        self.space();
        self.text.as_bytes().get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let is_next = self.peek() == Some(byte);
        self.at += usize::from(is_next);
        is_next
    }

    fn need(&mut self, byte: u8) -> Option<()> {
        self.take(byte).then_some(())
    }

    fn take_null(&mut self) -> bool {
        self.space();
        let is_next = self.text.as_bytes()[self.at..].starts_with(b"null");
        self.at += if is_next { 4 } else { 0 };
        is_next
    }

    fn string(&mut self) -> Option<Cow<'a, str>> {
        self.need(b'"')?;
        let start = self.at;
        let mut is_plain = true;
        loop {
            match self.text.as_bytes().get(self.at)? {
                b'"' => break,
                b'\\' => {
                    is_plain = false;
                    self.at += 2;
                }
                // JSON requires control characters to be escaped.
                0..0x20 => return None,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        if is_plain {
            Some(Cow::Borrowed(&self.text[start..self.at - 1]))
        } else {
            serde_json::from_str(&self.text[start - 1..self.at]).ok()
        }
    }

    fn number(&mut self) -> Option<f64> {
        self.space();
        let start = self.at;
        while let Some(b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E') =
            self.text.as_bytes().get(self.at)
        {
            self.at += 1;
        }
        self.text[start..self.at].parse().ok()
    }

    /// Parses a list, each item by `item`.
    fn list(&mut self, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.need(b'[')?;
        if self.take(b']') {
            return Some(());
        }
        loop {
            item(self)?;
            if !self.take(b',') {
                return self.need(b']');
            }
        }
    }

    /// Parses a token with its logprob, and its alternatives into `top`. Alternatives have no `top` of their own.
    fn token(&mut self, mut top: Option<&mut Vec<WireToken<'a>>>) -> Option<WireToken<'a>> {
        let mut token = None;
        let mut logprob = Logprob::default();
        let mut bytes = None;
        self.need(b'{')?;
        loop {
            let name = self.string()?;
            self.need(b':')?;
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
        self.need(b'}')?;
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
            scanner.space();
            let digits = &scanner.text.as_bytes()[scanner.at..];
            let count = digits.iter().take(4).take_while(|b| b.is_ascii_digit());
            let count = count.count();
            let value = digits[..count]
                .iter()
                .fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
            if count == 0 {
                return None;
            }
            bytes.push(value.try_into().ok()?);
            scanner.at += count;
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

    /// Parses a body with these logprobs by [`cut`] and by serde.
    fn both(logprobs: &Value, pretty: bool) -> (Option<Option<Logprobs>>, Option<Logprobs>) {
        let body = json!({"id": "x", "choices": [{"logprobs": logprobs}], "usage": 1});
        let body = if pretty {
            serde_json::to_string_pretty(&body)
        } else {
            serde_json::to_string(&body)
        };
        let cut = cut(body.unwrap().as_bytes()).map(|cut| {
            let rest: Value = serde_json::from_slice(&cut.rest).unwrap();
            let place = rest["choices"][0]["logprobs"].clone();
            assert!(serde_json::from_value::<Mark>(place).is_ok());
            assert_eq!((&rest["id"], &rest["usage"]), (&json!("x"), &json!(1)));
            cut.columns.finish("text")
        });
        let other = logprobs::parse(&logprobs.to_string(), "text").unwrap();
        (cut, other)
    }

    fn token() -> impl Strategy<Value = Map<String, Value>> {
        let text = prop_oneof![
            "[ -~]{0,6}",
            any::<String>().prop_map(|text| text.chars().take(30).collect())
        ];
        let logprob = prop_oneof![
            any::<f64>()
                .prop_filter("JSON has no others", |value| value.is_finite())
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
            let (scanned, by_serde) = both(&logprobs, pretty);
            prop_assert_eq!(scanned, Some(by_serde), "{}", logprobs);
        }

        #[test]
        fn scanner_never_panics_on_random_bodies(body in proptest::collection::vec(any::<u8>(), 0..60), at in 0usize..200) {
            let mut whole = br#"{"choices":[{"logprobs":{"content":[{"token":"\u0041","logprob":-1.5,"bytes":[65],
                "top_logprobs":[{"token":"b","logprob":-2,"bytes":null}]}]}}]}"#.to_vec();
            let at = at.min(whole.len());
            whole.splice(at..at, body);
            cut(&whole);
            cut(&whole[..at]);
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
            assert!(cut(body.as_bytes()).is_none(), "{case}");
        }
        let good = format!(r#"{{"logprobs" : {{ "content":[{token}, {token} ] }} }}"#);
        assert_eq!(
            cut(good.as_bytes())
                .unwrap()
                .columns
                .finish("aa")
                .unwrap()
                .token,
            ["a", "a"]
        );
    }
}
