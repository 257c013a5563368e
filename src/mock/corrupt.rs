//! Corrupts the body of a valid answer. Pure.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::mock::script::fault_kind::FaultKind;

/// Default length of [`FaultKind::HugeBody`] in bytes.
const HUGE_BODY_BYTES: usize = 64 << 20;

/// Default depth of [`FaultKind::DeepJson`].
const DEEP_JSON_DEPTH: usize = 100_000;

/// Default number of lines of [`FaultKind::BlankLines`].
const BLANK_LINES: usize = 3;

/// Placeholder for `NaN` and `-Infinity`, which a JSON library cannot write. It is replaced in the text. No logprob of
/// the mock has this value.
const LOGPROB_PLACEHOLDER: &str = "-4242.4242";

/// Corrupts a body as a fault of this kind does. `size` is the value of [`ScriptedFault::size`].
///
/// [`ScriptedFault::size`]: crate::mock::script::fault::ScriptedFault::size
pub(crate) fn corrupt_body(kind: FaultKind, body: Vec<u8>, size: Option<usize>) -> Bytes {
    let corrupted = match kind {
        FaultKind::Empty => Vec::new(),
        FaultKind::Truncated => body[..body.len() / 2].to_vec(),
        FaultKind::BadUtf8 => bad_utf8(body),
        FaultKind::HugeBody => huge(size.unwrap_or(HUGE_BODY_BYTES)),
        FaultKind::DeepJson => {
            let depth = size.unwrap_or(DEEP_JSON_DEPTH);
            [b"[".repeat(depth), b"]".repeat(depth)].concat()
        }
        FaultKind::BlankLines => [b"\n".repeat(blank_lines(size)), body].concat(),
        // These faults change only how the body is sent.
        FaultKind::ResetInBody
        | FaultKind::ShortBody
        | FaultKind::UnfinishedChunks
        | FaultKind::StallInBody
        | FaultKind::Drip => body,
        FaultKind::LogprobsNan => replace(edit_json(kind, &body), LOGPROB_PLACEHOLDER, "NaN"),
        FaultKind::LogprobsInf => replace(edit_json(kind, &body), LOGPROB_PLACEHOLDER, "-Infinity"),
        _ => edit_json(kind, &body).into_bytes(),
    };
    corrupted.into()
}

/// Returns the number of blank lines before the answer.
pub(crate) fn blank_lines(size: Option<usize>) -> usize {
    size.unwrap_or(BLANK_LINES)
}

/// Inserts invalid UTF-8 at the start of the content.
fn bad_utf8(mut body: Vec<u8>) -> Vec<u8> {
    let content = b"\"content\":\"";
    let offset = body
        .windows(content.len())
        .position(|window| window == content);
    let offset = offset.map_or(0, |start| start + content.len());
    body.splice(offset..offset, [0xc3, 0x28, 0xff]);
    body
}

/// Creates a valid answer of `size` bytes, or the shortest valid answer if that is longer.
fn huge(size: usize) -> Vec<u8> {
    let head = br#"{"choices":[{"index":0,"message":{"role":"assistant","content":""#;
    let tail = br#""},"finish_reason":"stop"}]}"#;
    let mut body = head.to_vec();
    body.resize(size.saturating_sub(tail.len()).max(head.len()), b'x');
    body.extend_from_slice(tail);
    body
}

fn replace(text: String, from: &str, to: &str) -> Vec<u8> {
    text.replace(from, to).into_bytes()
}

/// Changes the fields of an answer.
fn edit_json(kind: FaultKind, body: &[u8]) -> String {
    let mut body: Value = serde_json::from_slice(body).unwrap_or_default();
    match kind {
        FaultKind::FloatCreated => {
            let created = body["created"].as_f64().unwrap_or_default();
            body["created"] = json!(created + 0.25);
        }
        FaultKind::OtherModel => body["model"] = "another-model-2026-11-01".into(),
        FaultKind::NoUsage => {
            if let Some(fields) = body.as_object_mut() {
                fields.remove("usage");
            }
        }
        FaultKind::NoChoices => body["choices"] = json!([]),
        _ => {
            let choices = body["choices"].as_array_mut();
            for choice in choices.into_iter().flatten() {
                edit_choice(kind, choice);
            }
        }
    }
    body.to_string()
}

fn edit_choice(kind: FaultKind, choice: &mut Value) {
    match kind {
        FaultKind::NullContent => choice["message"]["content"] = Value::Null,
        FaultKind::UnknownFinishReason => choice["finish_reason"] = "model_length".into(),
        FaultKind::Length => choice["finish_reason"] = "length".into(),
        FaultKind::ContentFilter => {
            choice["finish_reason"] = "content_filter".into();
            choice["message"]["content"] = "".into();
            choice["logprobs"] = Value::Null;
        }
        FaultKind::Refusal => {
            choice["message"]["content"] = Value::Null;
            choice["message"]["refusal"] = "I'm sorry, I can't help with that.".into();
            choice["logprobs"] = Value::Null;
        }
        FaultKind::LogprobsNull => choice["logprobs"] = Value::Null,
        _ => {
            if let Some(positions) = choice["logprobs"]["content"].as_array_mut() {
                edit_logprobs(kind, positions);
            }
        }
    }
}

fn edit_logprobs(kind: FaultKind, positions: &mut Vec<Value>) {
    if kind == FaultKind::LogprobsFewer {
        positions.truncate(positions.len() / 2);
    }
    let logprob = match kind {
        FaultKind::LogprobsSentinel => Some(json!(-9999.0)),
        FaultKind::LogprobsNan | FaultKind::LogprobsInf => {
            serde_json::from_str(LOGPROB_PLACEHOLDER).ok()
        }
        _ => None,
    };
    for position in positions {
        if let Some(top) = position["top_logprobs"].as_array_mut() {
            match kind {
                FaultKind::LogprobsFewer => top.truncate(top.len() / 2),
                FaultKind::LogprobsDuplicates => top.extend(top.first().cloned()),
                FaultKind::LogprobsWithoutChosen if !top.is_empty() => drop(top.remove(0)),
                _ => {}
            }
            // Only the least likely alternative has an invalid logprob.
            if let (Some(last), Some(logprob)) = (top.last_mut(), &logprob) {
                last["logprob"] = logprob.clone();
            }
        }
        // Without alternatives, the token itself has the invalid logprob.
        if let Some(logprob) = &logprob
            && position["top_logprobs"]
                .as_array()
                .is_none_or(Vec::is_empty)
        {
            position["logprob"] = logprob.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Vec<u8> {
        let token = |text: &str, logprob: f64| json!({"token": text, "logprob": logprob});
        let position = |text: &str| {
            let mut position = token(text, -0.5);
            position["top_logprobs"] = json!([token(text, -0.5), token("z", -2.0)]);
            position
        };
        let choice = json!({
            "message": {"content": "a b"}, "finish_reason": "stop",
            "logprobs": {"content": [position("a"), position(" b")]},
        });
        json!({"created": 5, "model": "m", "choices": [choice], "usage": {}})
            .to_string()
            .into_bytes()
    }

    /// For each kind, a part that the corrupted body contains and a part that it lacks.
    #[test]
    fn each_kind_changes_the_body() {
        let cases = [
            (FaultKind::NoChoices, "\"choices\":[]", "stop"),
            (FaultKind::NullContent, "\"content\":null", "a b"),
            (FaultKind::UnknownFinishReason, "model_length", "stop"),
            (FaultKind::Length, "\"length\"", "stop"),
            (FaultKind::ContentFilter, "content_filter", "a b"),
            (FaultKind::Refusal, "I can't", "a b"),
            (FaultKind::FloatCreated, "5.25", "\"created\":5,"),
            (FaultKind::OtherModel, "another-model", "\"m\""),
            (FaultKind::NoUsage, "stop", "usage"),
            (FaultKind::LogprobsNull, "\"logprobs\":null", "top_logprobs"),
            (FaultKind::LogprobsFewer, "\"token\":\"a\"", "\" b\""),
            (FaultKind::LogprobsNan, ":NaN}", "-2.0"),
            (FaultKind::LogprobsInf, ":-Infinity}", "-2.0"),
            (FaultKind::LogprobsSentinel, ":-9999.0}", "-2.0"),
            (
                FaultKind::LogprobsDuplicates,
                r#"-2.0},{"token":"a","logprob":-0.5}]"#,
                "-2.0}]",
            ),
            (
                FaultKind::LogprobsWithoutChosen,
                r#""top_logprobs":[{"token":"z""#,
                r#""top_logprobs":[{"token":"a""#,
            ),
            (FaultKind::BlankLines, "\n\n\n{", "\n\n\n\n"),
        ];
        for (kind, present, absent) in cases {
            let body = corrupt_body(kind, answer(), None);
            let body = std::str::from_utf8(&body).unwrap();
            assert!(body.contains(present), "{kind}: {body} lacks {present}");
            assert!(!body.contains(absent), "{kind}: {body} still has {absent}");
        }
    }

    #[test]
    fn bodies_that_are_not_json_match_their_kind() {
        assert!(corrupt_body(FaultKind::Empty, answer(), None).is_empty());
        assert!(
            serde_json::from_slice::<Value>(&corrupt_body(FaultKind::Truncated, answer(), None))
                .is_err()
        );
        assert!(std::str::from_utf8(&corrupt_body(FaultKind::BadUtf8, answer(), None)).is_err());
        assert_eq!(
            &corrupt_body(FaultKind::DeepJson, answer(), Some(3))[..],
            b"[[[]]]"
        );
        assert_eq!(
            corrupt_body(FaultKind::DeepJson, answer(), None).len(),
            200_000
        );
        assert_eq!(
            corrupt_body(FaultKind::HugeBody, answer(), None).len(),
            64 << 20
        );
        let body = corrupt_body(FaultKind::HugeBody, answer(), Some(1000));
        assert_eq!(body.len(), 1000);
        serde_json::from_slice::<Value>(&body).unwrap();
    }
}
