use super::*;
use serde_json::json;

/// Returns the id of the row and a label of its result.
fn classify_line(line: &str) -> Option<(String, String)> {
    let mut row_results = parse_line(&Bytes::copy_from_slice(line.as_bytes()));
    assert!(row_results.len() <= 1, "{line}");
    label_of(row_results.pop()??)
}

fn label_of(row_result: RowResult) -> Option<(String, String)> {
    let RowResult { custom_id, result } = row_result;
    let label = match result {
        Ok(completion) => format!("answer {}", completion.answer.text),
        Err(AttemptError::EndpointRefused(refusal)) => {
            format!("endpoint refused {:?}", refusal.reason)
        }
        Err(AttemptError::Filtered(failure)) => format!("filtered {}", failure.class),
        Err(AttemptError::Unreadable { .. }) => "unreadable".into(),
        Err(AttemptError::KeyRenewed) => "key renewed".into(),
        Err(AttemptError::Refused(failure)) => format!("refused {}", failure.class),
        Err(AttemptError::Throttled { .. }) => "throttled".into(),
        Err(AttemptError::Transient { failure, .. }) => format!("retry {}", failure.class),
    };
    Some((custom_id, label))
}

#[test]
fn rows_in_lists_and_objects_are_read_even_if_a_body_contains_custom_id() {
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
        let row_results = parse_line(&Bytes::copy_from_slice(line.as_bytes()));
        let labels: Vec<_> = row_results
            .into_iter()
            .map(|row_result| label_of(row_result.unwrap()).unwrap())
            .collect();
        let expected = ["a", "b"].map(|id| (id.to_owned(), "answer x".to_owned()));
        assert_eq!(labels, expected, "{line}");
    }
    assert_eq!(
        classify_line(&format!("{},", first("a"))).unwrap().1,
        "answer x"
    );
}

/// Invalid JSON as servers send it, and a body that repeats the id of its row.
#[test]
fn invalid_rows_are_repaired_one_by_one() {
    let flaws = [
        ("\"score\":1", "\"score\":NaN"),
        ("\"score\":1", "\"score\":-Infinity"),
        ("FLAW", "a\tb"),
        ("FLAW", "a\nb"),
        ("FLAW", r"\ud83d"),
        ("FLAW", r"C:\x"),
    ];
    let row = |id: &str, is_last: bool| {
        let body = format!(
            r#"{{"metadata":{{"custom_id":"{id}"}},"choices":[{{"message":{{"content":"{id} FLAW"}},"score":1}}]}}"#
        );
        let response = format!(r#""response":{{"status_code":200,"body":{body}}}"#);
        if is_last {
            format!(r#"{{{response},"custom_id":"{id}"}}"#)
        } else {
            format!(r#"{{"custom_id":"{id}",{response}}}"#)
        }
    };
    for (clean, flaw) in flaws {
        for is_last in [false, true] {
            let flawed = row("a", is_last).replace(clean, flaw);
            let good = row("b", is_last);
            for line in [
                format!("{flawed}{good}"),
                format!("[{flawed},{good}]"),
                format!(r#"{{"data":[{flawed},{good}]}}"#),
            ] {
                let row_results = parse_line(&Bytes::copy_from_slice(line.as_bytes()));
                let labels = row_results
                    .into_iter()
                    .map(|row_result| label_of(row_result.unwrap()).unwrap());
                let labels: Vec<_> = labels.collect();
                assert_eq!(labels.len(), 2, "{line}: {labels:?}");
                for ((id, label), expected) in labels.iter().zip(["a", "b"]) {
                    assert_eq!(id, expected, "{line}");
                    assert!(
                        label.starts_with(&format!("answer {id} ")),
                        "{line}: {label}"
                    );
                }
            }
        }
    }
}

#[test]
fn lines_of_every_shape_are_classified() {
    let body = r#"{"choices":[{"message":{"content":"x"}}]}"#;
    let cases = [
        (
            format!(r#"{{"custom_id":"r","response":{{"status_code":200,"body":{body}}},"error":null}}"#),
            "answer x",
        ),
        // Optional fields missing, and a status as text.
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
            "retry malformed",
        ),
        (
            r#"{"custom_id":"r","response":{"status_code":500,"body":{"error":{"message":"m"}}}}"#.into(),
            "retry http 500",
        ),
        (
            r#"{"custom_id":"r","response":{"status_code":400,"body":{"error":{"message":"m"}}}}"#.into(),
            "refused http 400",
        ),
        (
            r#"{"custom_id":"r","response":{"status_code":429,"body":{"error":{"message":"m","code":"insufficient_quota"}}}}"#.into(),
            "endpoint refused Credit",
        ),
        (
            r#"{"custom_id":"r","response":{"status_code":429,"body":{}}}"#.into(),
            "throttled",
        ),
        (
            r#"{"custom_id":"r","response":null,"error":{"code":"batch_expired","message":"m"}}"#.into(),
            "retry batch_expired",
        ),
        (
            r#"{"custom_id":"r","response":null,"error":{"code":"invalid_request","message":"m"}}"#.into(),
            "refused invalid_request",
        ),
        (
            r#"{"custom_id":"r","response":null,"error":{"code":"model_not_found","message":"m"}}"#.into(),
            "endpoint refused Model",
        ),
        (
            r#"{"custom_id":"r","response":{"status_code":0,"request_id":"","body":{}},"error":null}"#.into(),
            "retry no answer in the batch",
        ),
        (r#"{"custom_id":"r"}"#.into(), "retry no answer in the batch"),
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
        assert_eq!(
            classify_line(&line),
            Some(("r".into(), expected.into())),
            "{line}"
        );
    }
    for line in ["", "{", r#"{"id":"x"}"#, r#"{"custom_id":7}"#, "\u{2028}"] {
        assert_eq!(classify_line(line), None, "{line}");
    }
}

#[test]
fn several_rows_on_one_line_are_split() {
    let row = |id: &str| {
        let body = format!(r#"{{"choices":[{{"message":{{"content":"{id}"}}}}]}}"#);
        format!(r#"{{"custom_id":"{id}","response":{{"status_code":200,"body":{body}}}}}"#)
    };
    let a = row("a");
    let b = row("b");
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
        let row_results = parse_line(&Bytes::from(line.clone())).into_iter();
        let labels: Vec<_> = row_results
            .map(|row_result| label_of(row_result.unwrap()).unwrap())
            .collect();
        let expected = ["a", "b"].map(|id| (id.to_owned(), format!("answer {id}")));
        assert_eq!(labels, expected, "{line}");
    }
}

#[test]
fn truncated_row_does_not_affect_the_next_row_on_its_line() {
    let complete = r#"{"id":"x","custom_id":"b","response":{"status_code":200,"body":{"id":"y","choices":[{"message":{"content":"b"}}]}}}"#;
    for broken in [
        r#"{"id":"x","custom_id":"a","response":{"status_code":200,"body":{"choices":[{"mess"#,
        r#"{"custom_id":"a","response":{"status_code":200,"body":{"choices":[{"message":{"content":"q}}"#,
    ] {
        let line = Bytes::from(format!("{broken}{complete}"));
        let row_results = parse_line(&line).into_iter().flatten();
        let labels: Vec<_> = row_results.filter_map(label_of).collect();
        assert!(
            labels.contains(&("b".into(), "answer b".into())),
            "{labels:?}"
        );
        assert!(
            labels
                .iter()
                .all(|(id, label)| id == "b" || !label.starts_with("answer"))
        );
    }
}

#[test]
fn errors_of_failed_batch_are_classified() {
    let classify = |errors: Value| {
        let object = json!({"id": "b", "errors": {"data": errors}}).to_string();
        let object = crate::client::batch_object::BatchObject::parse(object.as_bytes());
        classify_batch_failure(&object.unwrap().errors)
    };
    let message = "Enqueued token limit reached for m. Limit: 90,000 enqueued tokens. Try later.";
    let tokens =
        classify(json!([{"code": "token_limit_exceeded", "line": null, "message": message}]));
    assert_eq!(tokens.over_tokens, Some(Some(90_000)));
    let tokens = classify(json!([{"code": "token_limit_exceeded", "message": "no"}]));
    assert_eq!(tokens.over_tokens, Some(None));
    let lines = classify(json!([
        {"code": "invalid_json_line", "line": 2, "message": "bad"},
        {"code": "empty_file", "line": null, "message": "odd"},
    ]));
    assert_eq!((lines.lines.len(), lines.lines[0].0), (1, 1));
    assert_eq!(lines.message, "bad");
    let model = classify(json!([{"code": "model_not_found", "line": 1, "message": "m"}]));
    assert_eq!(model.endpoint_refusal.unwrap().0, RefusalReason::Model);
    assert!(classify(json!(null)).message.contains("no reason"));
}
