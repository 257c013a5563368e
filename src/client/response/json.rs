//! Converts the invalid JSON of endpoints to strict JSON. Pure.
//!
//! An answer is paid for, so invalid JSON is repaired instead of rejected:
//! - Invalid UTF-8 and unpaired surrogates become U+FFFD; raw control characters are escaped.
//! - Numbers that JSON cannot represent (`NaN`, `-inf`) become null.
//! - Values nested too deeply for a parser become strings of their own text.
//! - A byte order mark, and text before or after the first value, are removed.
//! - If a body is truncated after its choices, the rest is removed and the missing brackets are added.

use serde_json::Value;

use crate::client::response::json_error::{JsonProblem, beginning};
use crate::client::response::repair::JsonRepair;

/// Parses the first JSON value in `body`, repaired if it is not strict JSON.
pub(crate) fn value(body: &[u8]) -> Result<Value, JsonProblem> {
    match serde_json::from_slice(body) {
        Ok(value) => Ok(value),
        Err(_) => {
            let text = repaired(body)?;
            serde_json::from_slice(&text).map_err(|error| JsonProblem::NotJson(error.to_string()))
        }
    }
}

/// Returns the first JSON value in `body`, converted to strict JSON.
///
/// # Errors
/// If the body contains no JSON, or is truncated before its choices are complete.
pub(crate) fn repaired(body: &[u8]) -> Result<Vec<u8>, JsonProblem> {
    let decoded = utf16(body);
    let body = decoded.as_deref().unwrap_or(body);
    let mut body = body.trim_ascii();
    while let Some(after_mark) = body.strip_prefix(b"\xef\xbb\xbf") {
        body = after_mark.trim_ascii_start();
    }
    let first = *body.first().ok_or(JsonProblem::Empty)?;
    // Some servers send a log line, or a prefix against JSON hijacking, before the object.
    let begins_as_json = matches!(first, b'{' | b'[' | b'"');
    let start = match memchr::memchr(b'{', body) {
        Some(start) if !begins_as_json => start,
        _ => 0,
    };
    let repaired = match first {
        b'<' => Err(JsonProblem::NotJson("an HTML page".into())),
        _ => repair_first_value(&body[start..]),
    };
    let Err(JsonProblem::NotJson(problem)) = repaired else {
        return repaired;
    };
    let completion = completion_after_first_line(body).map(repair_first_value);
    completion.and_then(Result::ok).ok_or_else(|| {
        JsonProblem::NotJson(if begins_as_json || first == b'<' {
            problem
        } else {
            beginning(body)
        })
    })
}

/// Repairs the first JSON value in `text`. A value that is truncated after its choices is closed.
fn repair_first_value(text: &[u8]) -> Result<Vec<u8>, JsonProblem> {
    let mut repair = JsonRepair {
        text,
        pos: 0,
        out: Vec::with_capacity(text.len() + 16),
        open: Vec::new(),
        complete_length: 0,
    };
    match repair.run() {
        Err(JsonProblem::CutOff) if repair.close() => {}
        other => other?,
    }
    Ok(repair.out)
}

/// Returns the rest of the body from the first later line that begins with an object, if a completion follows.
fn completion_after_first_line(body: &[u8]) -> Option<&[u8]> {
    let later_lines = &body[memchr::memmem::find(body, b"\n{")?..];
    memchr::memmem::find(later_lines, b"\"choices\"")?;
    Some(later_lines.trim_ascii_start())
}

/// Converts UTF-16 to UTF-8. Returns None for other bytes. UTF-16 is recognised by its byte order mark, or by a zero
/// byte next to the first character.
pub(crate) fn utf16(body: &[u8]) -> Option<Vec<u8>> {
    let (is_little, units) = match body {
        [0xff, 0xfe, units @ ..] => (true, units),
        [0xfe, 0xff, units @ ..] => (false, units),
        [b'{' | b'[', 0, ..] => (true, body),
        [0, b'{' | b'[', ..] => (false, body),
        _ => return None,
    };
    let units = units.chunks_exact(2).map(|pair| {
        let pair = [pair[0], pair[1]];
        if is_little {
            u16::from_le_bytes(pair)
        } else {
            u16::from_be_bytes(pair)
        }
    });
    let text: String = char::decode_utf16(units)
        .map(|char| char.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect();
    Some(text.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn invalid_json_is_repaired() {
        let cases: [(&[u8], Value); 31] = [
            (b" {\"a\": 1} ", json!({"a": 1})),
            (b"\xef\xbb\xbf{\"a\":1}", json!({"a": 1})),
            (b"{\"a\":1}\n\ndata: [DONE]\n\n", json!({"a": 1})),
            (b"{\"a\":1}{\"b\":2}", json!({"a": 1})),
            (b")]}',\n{\"a\":1}", json!({"a": 1})),
            (b"OK {\"a\":1}", json!({"a": 1})),
            (
                b"{\"choices\": [{\"finish_reason\": \"stop\", \"a\": 1}], \"usage\": {\"pro",
                json!({"choices": [{"finish_reason": "stop", "a": 1}]}),
            ),
            (
                b"<br /><b>Warning</b>\n{\"choices\":[]}",
                json!({"choices": []}),
            ),
            (b"[a: b] {c d}\n{\"choices\":[]}", json!({"choices": []})),
            (br#"{"a":"x \ud83d"}"#, json!({"a": "x \u{fffd}"})),
            (br#"{"a":"\ude00\ud83d\ude00"}"#, json!({"a": "\u{fffd}😀"})),
            (br#"{"a":"\ud83d\n"}"#, json!({"a": "\u{fffd}\n"})),
            (b"{\"a\":\"x\xf0\x9f\x98\"}", json!({"a": "x\u{fffd}"})),
            (
                b"{\"a\":\"x\xff\xfey\"}",
                json!({"a": "x\u{fffd}\u{fffd}y"}),
            ),
            (b"{\"a\":\"l1\n\tl2\x00\"}", json!({"a": "l1\n\tl2\0"})),
            (br#"{"a":"\x41\'"}"#, json!({"a": "\\x41'"})),
            (br#"{"a":"\u12"}"#, json!({"a": "\\u12"})),
            (
                b"{\"a\":[nan, inf, -inf, -NaN, NaN, Infinity]}",
                json!({"a": [null, null, null, null, null, null]}),
            ),
            (b"{\"a\":1e400,\"b\":-1e999}", json!({"a": null, "b": null})),
            (
                b"{\"a\":+1,\"b\":.5,\"c\":007,\"d\":1.}",
                json!({"a": 1, "b": 0.5, "c": 7, "d": 1}),
            ),
            (
                b"{\"a\":True,\"b\":None,\"c\":False,\"d\":undefined}",
                json!({"a": true, "b": null, "c": false, "d": null}),
            ),
            (b"{\"a\":[1,2,],}", json!({"a": [1, 2]})),
            (b"{\"a\":{},\"b\":[]}", json!({"a": {}, "b": []})),
            (b"[[],[1]]", json!([[], [1]])),
            (b"\"text\"", json!("text")),
            (b"\0\0 {\"a\":\0 1}", json!({"a": 1})),
            (b"{\0\"\0a\0\"\0:\0\x31\0}\0", json!({"a": 1})),
            (b"\xff\xfe{\0}\0", json!({})),
            (b"\xfe\xff\0{\0}", json!({})),
            (
                b"{\"a\": 18446744073709551616}",
                json!({"a": 18446744073709551616.0}),
            ),
            (b"{\"a\": \"no \\\" end\"}", json!({"a": "no \" end"})),
        ];
        for (body, expected) in cases {
            let shown = String::from_utf8_lossy(body).into_owned();
            let text = repaired(body).unwrap_or_else(|problem| panic!("{shown}: {problem}"));
            let found: Value = serde_json::from_slice(&text).unwrap_or_else(|_| panic!("{shown}"));
            // The values 1 and 1.0 differ, although they are the same number.
            assert_eq!(
                found.to_string().replace(".0", ""),
                expected.to_string().replace(".0", ""),
                "{shown}"
            );
        }
    }

    #[test]
    fn deeply_nested_values_are_kept_as_text() {
        let deep = format!("{}1, \"]\"{}", "[".repeat(200_000), "]".repeat(200_000));
        let body = format!("{{\"a\":1,\"trace\":{deep},\"b\":2}}");
        let mut found = &value(body.as_bytes()).unwrap();
        assert_eq!((&found["a"], &found["b"]), (&json!(1), &json!(2)));
        found = &found["trace"];
        while found.is_array() {
            found = &found[0];
        }
        let text = found.as_str().unwrap();
        assert!(text.starts_with("[[") && text.ends_with("]]") && text.contains("1, \"]\""));
    }

    #[test]
    fn body_without_a_value_returns_the_problem() {
        let cases: [(&[u8], JsonProblem); 12] = [
            (b"", JsonProblem::Empty),
            (b" \n\n", JsonProblem::Empty),
            (b"{\"a\":", JsonProblem::CutOff),
            (b"{\"a\":\"x", JsonProblem::CutOff),
            (b"{\"a\":\"x\\", JsonProblem::CutOff),
            (b"{\"a\":12", JsonProblem::CutOff),
            (b"{\"a\":tru", JsonProblem::CutOff),
            (b"[[[[", JsonProblem::CutOff),
            (
                b"<!DOCTYPE html><style>a {b: c}</style>",
                JsonProblem::NotJson("an HTML page".into()),
            ),
            (
                b"upstream gone",
                JsonProblem::NotJson("upstream gone".into()),
            ),
            (
                b"{'a': 1}",
                JsonProblem::NotJson("at byte 1: 'a': 1}".into()),
            ),
            (b"{\"a\" 1}", JsonProblem::NotJson("at byte 5: 1}".into())),
        ];
        for (body, expected) in cases {
            assert_eq!(
                repaired(body),
                Err(expected),
                "{}",
                String::from_utf8_lossy(body)
            );
        }
        let deep = [&b"{\"a\":"[..], &[b'['; 300_000]].concat();
        assert_eq!(repaired(&deep), Err(JsonProblem::CutOff));
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>()
                .prop_filter("JSON numbers are finite", |value| value.is_finite())
                .prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 40, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::vec((any::<String>(), inner), 0..6)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Strict JSON keeps its value, whatever follows it.
        #[test]
        fn repair_keeps_the_value_of_strict_json(value in any_value(), pretty in any::<bool>(), behind in "[ -~\n]{0,20}") {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let mut text = text.unwrap();
            // A number could continue in the text after it.
            if value.is_object() || value.is_array() || value.is_string() {
                text.push_str(&behind);
                let repaired = repaired(text.as_bytes()).unwrap();
                prop_assert_eq!(serde_json::from_slice::<Value>(&repaired).unwrap(), value);
            }
        }

        /// Repaired bodies are strict JSON, and bodies cut off anywhere are reported as such.
        #[test]
        fn repair_of_random_bodies_gives_strict_json(value in any_value(), junk in proptest::collection::vec(any::<u8>(), 0..12), at in any::<prop::sample::Index>()) {
            let body = serde_json::to_vec(&json!({"a": value})).unwrap();
            let at = at.index(body.len());
            prop_assert!(at == 0 || repaired(&body[..at]) == Err(JsonProblem::CutOff));
            let mut broken = body.clone();
            broken.splice(at..at, junk);
            if let Ok(text) = repaired(&broken) {
                prop_assert!(serde_json::from_slice::<Value>(&text).is_ok());
            }
        }
    }
}
