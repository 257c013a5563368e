//! Parsing of replies of every shape.

use crate::cache::record::Answer;
use crate::client::response::*;
use serde_json::{Value, json};

/// Parses a body, and checks that the answer is `hi` with the finish reason `stop`.
#[track_caller]
fn parse_hi(body: &str) -> Completion {
    let completion = parse(body.as_bytes()).unwrap_or_else(|e| panic!("{body}: {e:?}"));
    let answer = &completion.answer;
    assert_eq!(
        (answer.text.as_str(), answer.finish_reason.as_str()),
        ("hi", "stop"),
        "{body}"
    );
    completion
}

fn answer(body: Value) -> Completion {
    parse(body.to_string().as_bytes()).unwrap()
}

#[test]
fn all_fields_of_an_answer_are_kept() {
    let completion = answer(json!({
        "id": "x", "created": 1.5, "model": "m-1", "system_fingerprint": "f",
        "service_tier": "on_demand",
        "choices": [{"index": 0, "finish_reason": "eos", "stop_reason": 7,
            "message": {"role": "assistant", "content": "hi", "reasoning": "hm", "tool_calls": []}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2.0, "total_tokens": 7, "cost": 0.1,
            "prompt_tokens_details": {"cached_tokens": 4}},
    }));
    assert_eq!(
        completion.answer,
        Answer {
            text: "hi".into(),
            finish_reason: "eos".into(),
            refusal: String::new(),
            reasoning: "hm".into(),
        }
    );
    let usage = completion.usage.unwrap();
    assert_eq!(
        (
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens
        ),
        (5, 2, 4)
    );
    assert_eq!(
        (completion.model.as_str(), completion.fingerprint.as_str()),
        ("m-1", "f")
    );
    let extra = json!({
        "id": "x", "created": 1.5, "service_tier": "on_demand",
        "choice": {"stop_reason": 7}, "message": {"tool_calls": []},
        "usage": {"cost": 0.1, "prompt_tokens_details": {"cached_tokens": 4}},
    });
    assert_eq!(Value::Object(completion.extra), extra);
}

#[test]
fn reasoning_tokens_are_counted_once() {
    let usage = |completion_tokens: u64, total_tokens: u64| {
        let details = json!({"reasoning_tokens": 30});
        let completion = answer(json!({
            "choices": [{"message": {"content": "x"}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": completion_tokens,
                "total_tokens": total_tokens, "completion_tokens_details": details},
        }));
        completion.usage.unwrap().completion_tokens
    };
    assert_eq!(usage(35, 45), 35, "included in completion_tokens");
    assert_eq!(usage(5, 45), 35, "not included in completion_tokens");
}

#[test]
fn unusual_messages_are_answers() {
    let choice = |message: Value| json!({"choices": [{"message": message}]});
    let cases = [
        (choice(json!({"content": null})), ""),
        (choice(json!({})), ""),
        (
            choice(json!({"content": [{"type": "text", "text": "a"}, {"text": "b"}]})),
            "ab",
        ),
        (choice(json!({"content": "x", "refusal": 3})), "x"),
        (
            json!({"choices": [{"message": {"content": "x"}, "logprobs": "none"}], "usage": []}),
            "x",
        ),
        (
            json!({"choices": [{"message": {"content": "x"}}], "error": {}}),
            "x",
        ),
    ];
    for (body, expected) in cases {
        assert_eq!(answer(body).answer.text, expected);
    }
    let spaced = b"\n\n\n {\"choices\":[{\"message\":{\"content\":\"x\"}}]}";
    assert_eq!(parse(spaced).unwrap().answer.text, "x");
}

#[test]
fn answer_is_found_in_every_wrapper() {
    let choice =
        json!({"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"});
    let body = json!({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}});
    let with = |name: &str, value: Value| {
        let mut body = body.clone();
        body[name] = value;
        body.to_string()
    };
    let bodies = [
        // Error fields that report a success, and an error with a complete answer.
        with("error", json!({"message": "", "type": "", "code": null})),
        with("error", json!({"code": 0, "message": "success"})),
        with("error", json!({"message": "billing record delayed"})),
        with("choices", json!([{}, choice])),
        with("choices", json!([null, choice])),
        with("choices", choice.clone()),
        with("choices", json!({"0": choice})),
        with(
            "choices",
            json!([{"messages": [{"role": "assistant", "content": "hi"}], "finish_reason": "stop"}]),
        ),
        with("choices", json!([[choice]])),
        with("choices", json!(json!([choice]).to_string())),
        with("choices", json!([false, choice])),
        with("choices", json!({"items": [choice]})),
        with(
            "choices",
            json!([{"content": "hi", "finish_reason": {"type": "stop"}}]),
        ),
        format!("{{\"choices\":[]}}\n{body}"),
        format!("{{\"choices\":null}}{{\"choices\":[]}}{body}"),
        json!([{}, body]).to_string(),
        format!(": wait\n\n: wait\n\n{body}"),
        format!("data: ping\n\n{body}\n"),
        String::from(
            "data: {\"data\":{\"choices\":[{\"delta\":{\"content\":\"h\"}}]}}\n\ndata: {\"data\":{\"choices\":[{\"delta\":{\"content\":\"i\"},\"finish_reason\":\"stop\"}]}}\n\n",
        ),
        format!("data: {{\"oops\n\ndata: {body}\n\ndata: [DONE]\n\ndata: {{\"late\n\n"),
        with(
            "choices",
            json!([{"message": "hi", "finish_reason": "stop"}]),
        ),
        with(
            "choices",
            json!([{"text": "", "delta": {"content": "hi"}, "finish_reason": "stop"}]),
        ),
        with(
            "choices",
            json!([{"message": {"content": ""}, "text": "hi", "finish_reason": "stop"}]),
        ),
        json!({"code": 0, "msg": "ok", "data": {"result": body}}).to_string(),
        json!({"success": true, "completion": body.to_string()}).to_string(),
        format!("{{\"status\":\"processing\"}}\n{body}"),
        format!("{{}}{body}"),
        json!({"data": [
            {"choices": [{"delta": {"content": "h"}}]},
            {"choices": [{"delta": {"content": "i"}, "finish_reason": "stop"}]},
        ]})
        .to_string(),
        String::from(
            "data: {\"choices\":[{\"index\":1,\"delta\":{\"content\":\"hi\"},\"finish_reason\":\"stop\"}]}\n\ndata: {\"error\":{\"message\":\"late\"}}\n\n",
        ),
    ];
    for body in bodies {
        parse_hi(&body);
    }
    let errors = [
        with("choices", json!([{"message": {"content": "h"}, "finish_reason": "error"}])),
        json!({"error": {"message": "overloaded"}, "choices": [{"message": {"content": ""}}]})
            .to_string(),
        // A truncated text in a stream.
        format!("data: {}\n\ndata: {}\n\n",
            json!({"choices": [{"delta": {"content": "h"}}]}), json!({"error": {"message": "overloaded"}})),
        json!({"code": 429, "message": "slow down", "choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}}).to_string(),
    ];
    for body in errors {
        assert!(
            matches!(parse(body.as_bytes()), Err(NoAnswer::Error(_))),
            "{body}"
        );
    }
}

#[test]
fn text_with_an_error_is_kept_and_marked() {
    for finish_reason in [json!(null), json!({"type": "error_late"})] {
        let choice = json!({"message": {"content": "h"}, "finish_reason": finish_reason});
        let kept = answer(json!({"choices": [choice], "error": {"message": "late"}}));
        assert_eq!(kept.answer.text, "h");
        assert!(kept.answer.finish_reason.starts_with("error"));
        assert_eq!(kept.extra["error"]["message"], "late");
    }
}

#[test]
fn usage_is_found_in_every_place() {
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 2});
    let choice = json!({"message": {"content": "hi"}, "finish_reason": "stop"});
    let mut measured = choice.clone();
    measured["usage"] = usage.clone();
    let bodies = [
        json!({"choices": [measured]}),
        json!({"choices": [choice], "meta": {"usage": usage}}),
        json!({"choices": [choice], "usage": {}, "usageMetadata": usage}),
        json!({"output": {"choices": [choice]}, "usage": usage}),
        json!({"choices": [], "usage": usage, "result": {"choices": [choice]}}),
    ];
    for body in bodies {
        let completion = parse_hi(&body.to_string());
        assert_eq!(completion.usage.unwrap().prompt_tokens, 7, "{body}");
    }
}

#[test]
fn usage_in_the_text_of_an_answer_is_ignored() {
    let example = r#"{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}"#;
    let choice = json!({"message": {"content": example}, "finish_reason": "stop"});
    assert_eq!(answer(json!({"choices": [choice]})).usage, None);
}

#[test]
fn truncated_stream_is_not_an_answer() {
    let with = |delta: Value, finish: Value| {
        let chunk = json!({"choices": [{"delta": delta, "finish_reason": finish}], "error": null});
        parse(format!("data: {chunk}\n\n").as_bytes())
    };
    for finish in [json!(null), json!("")] {
        let found = with(json!({"content": "h"}), finish);
        assert!(matches!(found, Err(NoAnswer::Malformed(_))), "{found:?}");
    }
    let piece = |text: &str| json!({"choices": [{"message": {"content": text}}]});
    let pieces = format!("data: {}\n\ndata: {}\n\n", piece("h"), piece("i"));
    assert!(matches!(
        parse(pieces.as_bytes()),
        Err(NoAnswer::Malformed(_))
    ));
    parse_hi(&format!(
        "{pieces}data: {{\"choices\":[{{\"finish_reason\":\"stop\"}}]}}\n\n"
    ));
}

#[test]
fn invalid_logprobs_do_not_discard_the_answer() {
    let body = br#"{"choices":[{"message":{"content":"a \" NaN"},"logprobs":{"content":[
        {"token":"a \" NaN","logprob":-Infinity,"top_logprobs":[{"token":"b","logprob":NaN}]}]}}]}"#;
    let completion = parse(body).unwrap();
    assert_eq!(completion.answer.text, "a \" NaN");
    let logprobs = completion.logprobs.unwrap();
    assert_eq!(
        (logprobs.logprob, logprobs.top_logprob),
        (vec![None], vec![vec![None]])
    );

    let completion = answer(json!({"choices": [{"message": {"content": "x"},
        "logprobs": {"content": [{"token": 1}]}}]}));
    assert!(completion.logprobs.is_none() && completion.logprobs_fault.is_some());
}

#[test]
fn invalid_json_does_not_discard_the_answer() {
    let good = r#"{"choices":[{"message":{"content":"hi","role":"assistant"},"finish_reason":"stop","logprobs":{"content":[{"token":"hi","logprob":-0.5,"top_logprobs":[]}]}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}"#;
    let with = |field: &str| format!("{},{field}}}", &good[..good.len() - 1]);
    let deep = format!("\"trace\":{}{}", "[".repeat(5_000), "]".repeat(5_000));
    let bodies = [
        good.to_owned(),
        format!("\u{feff}{good}"),
        format!("{good}\n\ndata: [DONE]\n\n"),
        format!("data: {good}\n\n"),
        format!("[{good}]"),
        serde_json::to_string(good).unwrap(),
        format!("{{\"data\":{good},\"code\":0,\"message\":\"success\"}}"),
        with("\"t\":[nan, inf, -inf, -NaN, 1e400]"),
        with(&deep),
        with("\"choices\":null"),
        with("\"error\":\"\",\"note\":\"a\nb\u{1}\""),
    ];
    for body in bodies {
        let completion = parse_hi(&body);
        assert_eq!(completion.usage.unwrap().prompt_tokens, 3, "{body}");
        assert!(completion.logprobs.unwrap().matches_text, "{body}");
    }
    let kept = parse(with(&deep).as_bytes()).unwrap().extra;
    assert!(kept["trace"].to_string().len() > 5_000);
    let broken = good.replace("\"hi\",\"role\"", "\"a \\ud83d b\",\"role\"");
    assert_eq!(
        parse(broken.as_bytes()).unwrap().answer.text,
        "a \u{fffd} b"
    );
    let bytes = good
        .replace("\"hi\",\"role\"", "\"a XY b\",\"role\"")
        .into_bytes();
    let bytes: Vec<u8> = bytes
        .into_iter()
        .map(|byte| if byte == b'X' { 0xff } else { byte })
        .collect();
    assert_eq!(parse(&bytes).unwrap().answer.text, "a \u{fffd}Y b");
}

#[test]
fn choice_is_parsed_in_every_shape() {
    let bodies = [
        json!({"choices": [{"text": "hi"}]}),
        json!({"choices": {"message": {"content": "hi"}}}),
        json!({"choices": [{"delta": {"content": "hi"}}]}),
        json!({"response": {"choices": [{"message": {"content": ["h", "i"]}}]}}),
    ];
    for body in bodies {
        assert_eq!(answer(body.clone()).answer.text, "hi", "{body}");
    }
    let parts = answer(json!({"choices": [{"message": {"content": {"answer": 4}}}]}));
    assert_eq!(parts.answer.text, "");
    assert_eq!(parts.extra["message"]["content"], json!([{"answer": 4}]));
}

#[test]
fn billed_reply_without_text_is_an_empty_answer() {
    let usage = json!({"prompt_tokens": 12, "completion_tokens": 0, "total_tokens": 12});
    let cases = [
        (
            json!({"choices": [], "usage": usage, "prompt_filter_results": [{}]}),
            "content_filter",
        ),
        (json!({"choices": null, "usage": usage}), ""),
        (json!({"usage": usage, "model": "gemini"}), ""),
        (
            json!({"usageMetadata": {"promptTokenCount": 12, "totalTokenCount": 12}, "promptFeedback": {"blockReason": "SAFETY"}}),
            "content_filter",
        ),
        (
            json!({"choices": [{"finish_reason": "length"}], "usage": usage}),
            "length",
        ),
        (
            json!({"choices": [{"message": null, "finish_reason": "content_filter"}], "usage": usage}),
            "content_filter",
        ),
    ];
    for (body, finish_reason) in cases {
        let completion = answer(body.clone());
        let answer = &completion.answer;
        assert_eq!(
            (answer.text.as_str(), answer.finish_reason.as_str()),
            ("", finish_reason),
            "{body}"
        );
        assert_eq!(completion.usage.unwrap().prompt_tokens, 12, "{body}");
    }
    // An incomplete usage is kept in `extra`, but does not count as a usage.
    let half = answer(json!({"choices": [], "usage": {"prompt_tokens": 12}}));
    assert_eq!(
        (half.usage, &half.extra["usage"]["prompt_tokens"]),
        (None, &json!(12))
    );
}

#[test]
fn answer_cut_off_by_a_content_filter_is_kept() {
    let completion = answer(
        json!({"error": {"code": "content_filter", "message": "filtered"},
        "choices": [{"message": {"content": "The first half of"}}]}),
    );
    assert_eq!(completion.answer.text, "The first half of");
    assert_eq!(completion.answer.finish_reason, "content_filter");
    assert_eq!(completion.extra["error"]["code"], "content_filter");
}

#[test]
fn body_without_an_answer_returns_the_reason() {
    let nested = format!("{{\"usage\":{}", "[".repeat(100_000));
    let cases: [(&[u8], &str); 9] = [
        (b"", "malformed: the body is empty"),
        (b"{\"choices\":[{\"mess", "malformed: the JSON ends early"),
        (b"<html>", "malformed: not JSON: an HTML page"),
        (b"{}", "malformed: the body contains no choice: {}"),
        (
            b"{\"choices\":[],\"id\":7}",
            "malformed: the body contains no choice: {\"id\":7}",
        ),
        (
            b"\"hello\"",
            "malformed: the body is not a chat completion: \"hello\"",
        ),
        (nested.as_bytes(), "malformed: the JSON ends early"),
        (b"{\"choices\": 'x'}", "unreadable: not JSON: at byte 12"),
        (
            b"{\"choices\": [7], \"usage\": {}}",
            "unreadable: the body is not a chat completion",
        ),
    ];
    for (body, expected) in cases {
        let found = match parse(body).unwrap_err() {
            NoAnswer::Malformed(problem) => format!("malformed: {problem}"),
            NoAnswer::Unreadable(problem) => format!("unreadable: {problem}"),
            NoAnswer::Error(error) => panic!("{error:?}"),
        };
        assert!(found.starts_with(expected), "{found}");
    }
}

#[test]
fn error_with_a_success_status_is_an_error() {
    let body = br#"{"error":{"code":502,"message":"m"},"choices":[]}"#;
    assert!(matches!(parse(body), Err(NoAnswer::Error(error)) if error.status == Some(502)));
    let body = br#"{"choices":[{"message":{"content":"x"},"finish_reason":"error"}]}"#;
    assert!(matches!(parse(body), Err(NoAnswer::Error(_))));
    for (body, message) in [
        (
            r#"{"choices":null,"base_resp":{"status_code":1002,"status_msg":"rate limit exceeded"}}"#,
            "rate limit exceeded",
        ),
        (
            r#"{"object":"error","message":"The model is overloaded","code":50001}"#,
            "The model is overloaded",
        ),
        (
            r#"{"success":false,"errors":[{"code":7003,"message":"No route"}],"result":null}"#,
            "No route",
        ),
        ("data: {\"error\":{\"message\":\"gone\"}}\n\n", "gone"),
    ] {
        match parse(body.as_bytes()) {
            Err(NoAnswer::Error(error)) => assert_eq!(error.message, message),
            other => panic!("{body}: {other:?}"),
        }
    }
}
