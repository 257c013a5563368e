//! A line of an output or an error file: whose it is, and what it means. Pure.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use reqwest::header::HeaderMap;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::api::Mistake;
use super::braces::object_end;
use crate::harvest::reply::error::{ApiError, is_error};
use crate::harvest::reply::{Completion, json, names_choices};
use crate::harvest::retry::{self, Claim, Failure, Reason, Trouble};
use crate::harvest::teacher::Reply;

/// What a line brings.
pub struct Outcome {
    pub custom_id: String,
    pub result: Result<Box<Completion>, Trouble>,
}

#[derive(Deserialize)]
struct Line<'a> {
    custom_id: String,
    #[serde(borrow, default)]
    response: Option<&'a RawValue>,
    #[serde(borrow, default)]
    result: Option<&'a RawValue>,
    #[serde(default)]
    error: Value,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Response<'a> {
    status_code: Value,
    status: Value,
    /// Left as it is, and read as the body of any reply is.
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// Reads a line: one outcome, or several where the file does not keep them on lines of their own. None for
/// what names no row.
pub fn read(line: &Bytes) -> Vec<Option<Outcome>> {
    match read_json(line) {
        Some(outcome) => vec![Some(outcome)],
        None => values(line).iter().map(read_one).collect(),
    }
}

/// Field that names the row of an object.
pub(super) const ID: &[u8] = b"\"custom_id\"";

/// The rows of a line, each as an object: those of a list, one after the other, or inside of an object.
fn values(line: &Bytes) -> Vec<Bytes> {
    strict_values(line).unwrap_or_else(|| values_by_braces(line))
}

/// Levels of nesting down to a row.
const DEEPEST: usize = 5;

/// The rows of a line that is JSON, but for a comma behind it.
fn strict_values(line: &Bytes) -> Option<Vec<Bytes>> {
    let text = line.trim_ascii();
    let text = text.strip_suffix(b",").unwrap_or(text);
    let values = serde_json::Deserializer::from_slice(text).into_iter::<&RawValue>();
    let values = values.collect::<Result<Vec<_>, _>>().ok()?;
    let mut rows = Vec::new();
    for value in values {
        add_rows(value, DEEPEST, &mut rows);
    }
    let rows = rows
        .into_iter()
        .map(|row| line.slice_ref(row.get().as_bytes()));
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then_some(rows)
}

fn add_rows<'a>(value: &'a RawValue, depth: usize, rows: &mut Vec<&'a RawValue>) {
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    if let Ok(items) = serde_json::from_str::<Vec<&RawValue>>(value.get()) {
        items
            .into_iter()
            .for_each(|item| add_rows(item, depth, rows));
    } else if let Ok(fields) =
        serde_json::from_str::<BTreeMap<Cow<'_, str>, &RawValue>>(value.get())
    {
        if fields.contains_key("custom_id") {
            rows.push(value);
        } else {
            fields
                .into_values()
                .for_each(|field| add_rows(field, depth, rows));
        }
    }
}

/// The rows of a line of which one may be flawed.
fn values_by_braces(line: &Bytes) -> Vec<Bytes> {
    let (mut values, mut at) = (Vec::new(), 0);
    while let Some(start) = memchr::memchr(b'{', &line[at..]).map(|start| at + start) {
        let rest = &line[start..];
        let ids: Vec<usize> = memchr::memmem::find_iter(rest, ID).take(2).collect();
        let end = object_end(rest).unwrap_or(rest.len());
        match ids[..] {
            // It holds several rows, or the end of its first one is lost.
            [first, second] if second < end => {
                let inner = brace_before(rest, first);
                if inner > 0 {
                    at = start + inner;
                    continue;
                }
                let next = brace_before(rest, second);
                values.push(line.slice(start..start + next.max(1)));
                at = start + next.max(1);
            }
            _ => {
                values.push(line.slice(start..start + end));
                at = start + end;
            }
        }
    }
    if values.is_empty() {
        values.push(line.clone());
    }
    values
}

/// The brace of the object whose field is at `field`: the nearest one before it, unless that one is closed by
/// then or begins the value of another field.
fn brace_before(text: &[u8], field: usize) -> usize {
    let mut end = field;
    if let Some(brace) = memchr::memrchr(b'{', &text[..field])
        && !text[brace..field].contains(&b'}')
    {
        return brace;
    }
    while let Some(brace) = memchr::memrchr(b'{', &text[..end]) {
        let before = text[..brace].trim_ascii_end().last();
        // Of a list, of what came before, or of the outermost one.
        if matches!(before, None | Some(b'[' | b',' | b'}' | b']'))
            || !text[..brace].contains(&b':')
        {
            return brace;
        }
        end = brace;
    }
    0
}

/// Reads a value, repaired where it is not strict JSON.
fn read_one(line: &Bytes) -> Option<Outcome> {
    if let Some(outcome) = read_json(line) {
        return Some(outcome);
    }
    let repaired = json::repaired(line).ok().map(Bytes::from);
    repaired.and_then(|line| read_json(&line)).or_else(|| {
        let unreadable = Trouble::Unreadable {
            problem: "a line of a batch that is not JSON".into(),
            body: line.clone(),
        };
        Some(Outcome {
            custom_id: custom_id(line)?,
            result: Err(unreadable),
        })
    })
}

/// The row of a line that is otherwise not JSON.
fn custom_id(line: &[u8]) -> Option<String> {
    let rest = &line[memchr::memmem::find(line, ID)? + ID.len()..];
    let rest = rest
        .trim_ascii_start()
        .strip_prefix(b":")?
        .trim_ascii_start();
    match json::value(rest).ok()? {
        Value::String(id) => Some(id),
        _ => None,
    }
}

fn read_json(line: &Bytes) -> Option<Outcome> {
    let Line {
        custom_id,
        response,
        result,
        error,
    } = serde_json::from_slice(line).ok()?;
    let (status, body) = match response.or(result) {
        Some(response) => reply(response),
        None => (0, &line[..]),
    };
    let status = match status {
        0 if names_choices(body) => 200,
        status => status,
    };
    let result = if status > 0 {
        let body = line.slice_ref(body);
        // A batch line has no date header that the time would be compared with.
        let reply = Reply::whole(status, HeaderMap::new(), body);
        retry::classify(Ok(reply), SystemTime::UNIX_EPOCH)
    } else {
        Err(unanswered(&error))
    };
    Some(Outcome { custom_id, result })
}

/// Status of a response, 0 where it tells none, and its body: the response itself where that is left out.
fn reply(response: &RawValue) -> (u16, &[u8]) {
    let fields: Response = serde_json::from_str(response.get()).unwrap_or_default();
    let code = |value: &Value| -> Option<u16> {
        let code = value
            .as_f64()
            .or_else(|| value.as_str()?.trim().parse().ok())?;
        (100.0..600.0).contains(&code).then_some(code as u16)
    };
    let status = code(&fields.status_code).or_else(|| code(&fields.status));
    let body = fields.body.unwrap_or(response);
    (status.unwrap_or(0), body.get().as_bytes())
}

/// Classifies a row without a response by the code of its error.
fn unanswered(error: &Value) -> Trouble {
    if !is_error(error) {
        // Nothing says that it was not done.
        return retry::lost("no answer in the batch", "");
    }
    let error = &ApiError::from_value(error);
    let class = match error.code.as_str() {
        "" => "no answer in the batch",
        code => code,
    };
    let failure = Failure::new(class, &error.message);
    if let Some(reason) = retry::claims_the_end(error, false) {
        return Trouble::Claim(Claim { reason, failure });
    }
    if error.is_of_the_content() {
        return Trouble::Filtered(failure);
    }
    if is_of_the_row(error) {
        Trouble::Refused(failure)
    } else {
        Trouble::Transient {
            failure,
            wait: std::time::Duration::ZERO,
        }
    }
}

/// Words of codes for what a row can never get an answer to. Others may pass, as `server_error` and
/// `batch_expired` do.
fn is_of_the_row(error: &ApiError) -> bool {
    ["invalid", "content", "context", "unsupported", "policy"]
        .iter()
        .any(|word| error.code.contains(word) || error.kind.contains(word))
}

/// Why a batch failed as a whole.
#[derive(Debug, Default)]
pub struct Verdict {
    /// More tokens are enqueued than the account may have; the limit, where it is told.
    pub over_tokens: Option<Option<u64>>,
    /// No batch can succeed.
    pub stop: Option<(Reason, String)>,
    /// Lines of the file that the endpoint does not take, from 0.
    pub lines: Vec<(usize, Failure)>,
    /// What it says first.
    pub message: String,
}

pub fn verdict(mistakes: &[Mistake]) -> Verdict {
    let mut verdict = Verdict {
        message: "it does not say why".into(),
        ..Verdict::default()
    };
    for (index, Mistake { error, line }) in mistakes.iter().enumerate() {
        let failure = Failure::new(error.code.as_str(), &error.message);
        if index == 0 {
            verdict.message = failure.message.clone();
        }
        if error.code == "token_limit_exceeded" {
            verdict.over_tokens = Some(told_limit(&error.message));
        } else if let Some(reason) = retry::claims_the_end(error, false) {
            verdict.stop.get_or_insert((reason, failure.message));
        } else if let Some(line) = line.and_then(|line| usize::try_from(line).ok()?.checked_sub(1))
        {
            verdict.lines.push((line, failure));
        }
    }
    verdict
}

/// The number of "Limit: 90,000 enqueued tokens".
fn told_limit(message: &str) -> Option<u64> {
    let (_, rest) = message.split_once("Limit: ")?;
    let digits = rest.chars().take_while(|char| !char.is_whitespace());
    let digits: String = digits.filter(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The row, and its outcome in a word.
    fn sort(line: &str) -> Option<(String, String)> {
        let mut read = read(&Bytes::copy_from_slice(line.as_bytes()));
        assert!(read.len() <= 1, "{line}");
        word(read.pop()??)
    }

    fn word(outcome: Outcome) -> Option<(String, String)> {
        let Outcome { custom_id, result } = outcome;
        let word = match result {
            Ok(completion) => format!("answer {}", completion.answer.text),
            Err(Trouble::Claim(claim)) => format!("claim {:?}", claim.reason),
            Err(Trouble::Filtered(failure)) => format!("filtered {}", failure.class),
            Err(Trouble::Unreadable { .. }) => "unreadable".into(),
            Err(Trouble::KeyRenewed) => "key renewed".into(),
            Err(Trouble::Refused(failure)) => format!("refused {}", failure.class),
            Err(Trouble::Throttled { .. }) => "throttled".into(),
            Err(Trouble::Transient { failure, .. }) => format!("again {}", failure.class),
        };
        Some((custom_id, word))
    }

    #[test]
    fn rows_of_a_list_or_an_object_are_read_whatever_their_bodies_repeat() {
        let body = r#"{"metadata":{"custom_id":"a"},"choices":[{"message":{"content":"x"}}]}"#;
        let first = |id: &str| {
            format!(r#"{{"custom_id":"{id}","response":{{"status_code":200,"body":{body}}}}}"#)
        };
        let last = |id: &str| {
            format!(r#"{{"response":{{"status_code":200,"body":{body}}},"custom_id":"{id}"}}"#)
        };
        for line in [
            format!("[{},{}]", first("a"), first("b")),
            format!("[{},{}]", last("a"), last("b")),
            format!(r#"{{"data":[{},{}]}}"#, last("a"), last("b")),
            format!(r#"{{"result":{{"rows":[{}]}}}} {}"#, first("a"), last("b")),
            format!("{}{},", first("a"), first("b")),
        ] {
            let read = read(&Bytes::copy_from_slice(line.as_bytes()));
            let words: Vec<_> = read
                .into_iter()
                .map(|one| word(one.unwrap()).unwrap())
                .collect();
            let expected = ["a", "b"].map(|id| (id.to_owned(), "answer x".to_owned()));
            assert_eq!(words, expected, "{line}");
        }
        assert_eq!(sort(&format!("{},", first("a"))).unwrap().1, "answer x");
    }

    #[test]
    fn lines_of_every_shape_are_sorted() {
        let body = r#"{"choices":[{"message":{"content":"x"}}]}"#;
        let cases = [
            (
                format!(r#"{{"custom_id":"r","response":{{"status_code":200,"body":{body}}},"error":null}}"#),
                "answer x",
            ),
            // Without a field that might have been there, and with a status as text.
            (
                format!(r#"{{"response":{{"body":{body},"status_code":"200"}},"custom_id":"r"}}"#),
                "answer x",
            ),
            (
                r#"{"custom_id":"r","response":{"status_code":200,"body":{"choices":[{"message":{"content":"x"},"logprobs":NaN}]}}}"#.into(),
                "answer x",
            ),
            (
                r#"{"custom_id":"r","response":{"status_code":200,"body":{}}}"#.into(),
                "again malformed",
            ),
            (
                r#"{"custom_id":"r","response":{"status_code":500,"body":{"error":{"message":"m"}}}}"#.into(),
                "again http 500",
            ),
            (
                r#"{"custom_id":"r","response":{"status_code":400,"body":{"error":{"message":"m"}}}}"#.into(),
                "refused http 400",
            ),
            (
                r#"{"custom_id":"r","response":{"status_code":429,"body":{"error":{"message":"m","code":"insufficient_quota"}}}}"#.into(),
                "claim Credit",
            ),
            (
                r#"{"custom_id":"r","response":{"status_code":429,"body":{}}}"#.into(),
                "throttled",
            ),
            (
                r#"{"custom_id":"r","response":null,"error":{"code":"batch_expired","message":"m"}}"#.into(),
                "again batch_expired",
            ),
            (
                r#"{"custom_id":"r","response":null,"error":{"code":"invalid_request","message":"m"}}"#.into(),
                "refused invalid_request",
            ),
            (
                r#"{"custom_id":"r","response":null,"error":{"code":"model_not_found","message":"m"}}"#.into(),
                "claim Model",
            ),
            (
                r#"{"custom_id":"r","response":{"status_code":0,"request_id":"","body":{}},"error":null}"#.into(),
                "again no answer in the batch",
            ),
            (r#"{"custom_id":"r"}"#.into(), "again no answer in the batch"),
            (
                format!(r#"{{"custom_id":"r","response":{{"body":{body}}},"error":{{"code":0,"message":""}}}}"#),
                "answer x",
            ),
            (
                format!(r#"{{"custom_id":"r","response":{{"status_code":200.0,"body":{body}}}}}"#),
                "answer x",
            ),
            (
                format!(r#"{{"custom_id":"r","response":{{"status_code":null,"status":"200","body":{body}}}}}"#),
                "answer x",
            ),
            (
                format!(r#"{{"custom_id":"r","response":{{"status_code":0,"body":{body}}}}}"#),
                "answer x",
            ),
            (format!(r#"{{"custom_id":"r","response":{body}}}"#), "answer x"),
            (format!(r#"{{"custom_id":"r","result":{body}}}"#), "answer x"),
            (format!(r#"{{"custom_id":"r","result":{{"body":{body}}}}}"#), "answer x"),
            (
                r#"{"custom_id":"r","choices":[{"message":{"content":"x"}}]}"#.into(),
                "answer x",
            ),
            (
                format!("\u{feff}{{\"custom_id\":\"r\",\"response\":{{\"status_code\":200,\"body\":{body}}}}}\r"),
                "answer x",
            ),
            (
                format!(r#"{{"custom_id":"r","response":{{"status_code":200,"body":{}}}}}"#, serde_json::to_string(body).unwrap()),
                "answer x",
            ),
            (
                r#"{"custom_id":"r","response":{"status_code":200,"body":{"choices":[{"message":{"content":"\ud83d"}}]}}}"#.into(),
                "answer \u{fffd}",
            ),
            (
                r#"{"custom_id":"r","response":null,"error":{"code":"content_filter","message":"m"}}"#.into(),
                "filtered content_filter",
            ),
            (r#"{"id":'x',"custom_id":"r","response":'broken"#.into(), "unreadable"),
        ];
        for (line, expected) in cases {
            assert_eq!(sort(&line), Some(("r".into(), expected.into())), "{line}");
        }
        for line in ["", "{", r#"{"id":"x"}"#, r#"{"custom_id":7}"#, "\u{2028}"] {
            assert_eq!(sort(line), None, "{line}");
        }
    }

    #[test]
    fn several_rows_on_a_line_are_several_rows() {
        let row = |id: &str| {
            let body = format!(r#"{{"choices":[{{"message":{{"content":"{id}"}}}}]}}"#);
            format!(r#"{{"custom_id":"{id}","response":{{"status_code":200,"body":{body}}}}}"#)
        };
        let (a, b) = (row("a"), row("b"));
        let broken = b.replace("\"content\"", "\"n\":NaN,\"content\"");
        for line in [
            format!("[{a},{b}]"),
            format!("\u{feff}[{a}, {b}]\r"),
            format!("{a}{b}"),
            format!("{a}\r{b}\r"),
            format!("{a} {broken}"),
            format!("{} {b}", a.replace("\"content\"", "\"n\":NaN,\"content\"")),
            format!("[{a},{broken},]"),
            format!(
                "[{}, {b}]",
                a.replace("\"content\"", "\"n\":NaN,\"content\"")
            ),
            format!("{{\"data\":[{a},{b}]}}"),
            format!("{a},{b}"),
            format!("{a} junk {b}"),
        ] {
            let outcomes = read(&Bytes::from(line.clone())).into_iter();
            let words: Vec<_> = outcomes
                .map(|outcome| word(outcome.unwrap()).unwrap())
                .collect();
            let expected = ["a", "b"].map(|id| (id.to_owned(), format!("answer {id}")));
            assert_eq!(words, expected, "{line}");
        }
    }

    #[test]
    fn a_truncated_line_fails_only_its_own_row() {
        let whole = r#"{"id":"x","custom_id":"b","response":{"status_code":200,"body":{"id":"y","choices":[{"message":{"content":"b"}}]}}}"#;
        for broken in [
            r#"{"id":"x","custom_id":"a","response":{"status_code":200,"body":{"choices":[{"mess"#,
            r#"{"custom_id":"a","response":{"status_code":200,"body":{"choices":[{"message":{"content":"q}}"#,
        ] {
            let line = Bytes::from(format!("{broken}{whole}"));
            let found = read(&line).into_iter().flatten();
            let words: Vec<_> = found.filter_map(word).collect();
            assert!(
                words.contains(&("b".into(), "answer b".into())),
                "{words:?}"
            );
            assert!(
                words
                    .iter()
                    .all(|(id, word)| id == "b" || !word.starts_with("answer"))
            );
        }
    }

    #[test]
    fn a_failed_batch_says_whose_fault_it_is() {
        let of = |mistakes: Value| {
            let card = json!({"id": "b", "errors": {"data": mistakes}}).to_string();
            let card = crate::harvest::batch::api::Card::parse(card.as_bytes());
            verdict(&card.unwrap().mistakes)
        };
        let told = "Enqueued token limit reached for m. Limit: 90,000 enqueued tokens. Try later.";
        let tokens = of(json!([{"code": "token_limit_exceeded", "line": null, "message": told}]));
        assert_eq!(tokens.over_tokens, Some(Some(90_000)));
        let tokens = of(json!([{"code": "token_limit_exceeded", "message": "no"}]));
        assert_eq!(tokens.over_tokens, Some(None));
        let lines = of(json!([
            {"code": "invalid_json_line", "line": 2, "message": "bad"},
            {"code": "empty_file", "line": null, "message": "odd"},
        ]));
        assert_eq!((lines.lines.len(), lines.lines[0].0), (1, 1));
        assert_eq!(lines.message, "bad");
        let model = of(json!([{"code": "model_not_found", "line": 1, "message": "m"}]));
        assert_eq!(model.stop.unwrap().0, Reason::Model);
        assert!(of(json!(null)).message.contains("not say"));
    }
}
