use crate::client::attempt_error::shorten;
use crate::client::outcome::*;

const NOW: Duration = Duration::from_secs(1_800_000_000);

fn reply(
    status: u16,
    headers: &[(&'static str, &str)],
    body: &str,
) -> Result<HttpReply, TransportError> {
    let headers = headers
        .iter()
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect();
    Ok(HttpReply::complete(
        status,
        headers,
        body.to_string().into(),
    ))
}

/// Formats the class of a reply, with its wait in milliseconds if there is one.
fn class_of(result: Result<HttpReply, TransportError>) -> String {
    let attempt_error = match classify(result, SystemTime::UNIX_EPOCH + NOW) {
        Ok(_) => return "answer".into(),
        Err(attempt_error) => attempt_error,
    };
    match attempt_error {
        AttemptError::EndpointRefused(refusal) => format!("endpoint refused: {:?}", refusal.reason),
        AttemptError::Refused(failure) => format!("refused: {}", failure.class),
        AttemptError::Filtered(failure) => format!("filtered: {}", failure.class),
        AttemptError::Unreadable { problem, .. } => format!("unreadable: {problem}"),
        AttemptError::KeyRenewed => "key renewed".into(),
        AttemptError::Throttled { wait, .. } => {
            format!("throttled: {:?}", wait.map(|w| w.as_millis()))
        }
        AttemptError::Transient { failure, wait } => {
            format!("transient: {} {}", failure.class, wait.as_millis())
        }
    }
}

#[test]
fn status_code_and_message_determine_the_class() {
    let quota = r#"{"error":{"message":"m","code":"insufficient_quota"}}"#;
    let cases = [
        (
            200,
            r#"{"choices":[{"message":{"content":"x"}}]}"#,
            "answer",
        ),
        (
            200,
            r#"{"error":{"code":429,"message":"slow"}}"#,
            "throttled: None",
        ),
        (
            200,
            r#"{"error":{"code":"x","message":"broke"}}"#,
            "transient: http 500 0",
        ),
        (200, r#"{"choices":["#, "transient: malformed 0"),
        (204, "", "transient: malformed 0"),
        (302, "", "endpoint refused: Redirect"),
        (400, "", "refused: http 400"),
        (
            400,
            r#"{"error":{"message":"Your credit balance is too low"}}"#,
            "endpoint refused: Credit",
        ),
        (401, "", "endpoint refused: Key"),
        (402, "", "endpoint refused: Credit"),
        (403, "", "endpoint refused: Forbidden"),
        (404, "", "endpoint refused: Address"),
        (
            405,
            r#"{"detail":"Method Not Allowed"}"#,
            "endpoint refused: Address",
        ),
        (
            404,
            r#"{"error":{"message":"x","code":"model_not_found"}}"#,
            "endpoint refused: Model",
        ),
        (
            404,
            r#"{"error":{"message":"The model `x` does not exist."}}"#,
            "endpoint refused: Model",
        ),
        (
            400,
            r#"{"error":{"message":"The model `x` has been decommissioned and is no longer supported.","code":"y"}}"#,
            "endpoint refused: Model",
        ),
        (
            400,
            r#"{"error":{"message":"x is not a valid model ID"}}"#,
            "endpoint refused: Model",
        ),
        (
            410,
            r#"{"error":{"message":"The model m was retired"}}"#,
            "endpoint refused: Model",
        ),
        (
            400,
            r#"{"error":{"message":"`logit_bias` is no longer supported with this model."}}"#,
            "refused: http 400",
        ),
        (
            400,
            r#"[{"error":{"code":400,"message":"API key expired.","status":"INVALID_ARGUMENT","details":[{"reason":"API_KEY_INVALID"}]}}]"#,
            "endpoint refused: Key",
        ),
        (
            400,
            r#"{"error":{"message":"The model called the tool `f`, which was not found in `tools`"}}"#,
            "refused: http 400",
        ),
        (
            400,
            r#"{"error":{"message":"Invalid model parameters: top_k"}}"#,
            "refused: http 400",
        ),
        (
            400,
            r#"{"error":{"message":"Invalid model parameters."}}"#,
            "refused: http 400",
        ),
        (
            400,
            r#"{"error":{"message":"Invalid model_config.temperature: too high"}}"#,
            "refused: http 400",
        ),
        (
            400,
            r#"{"error":{"message":"The model input image was not found"}}"#,
            "refused: http 400",
        ),
        (
            404,
            r#"{"error":{"message":"The file 'model.txt' was not found"}}"#,
            "endpoint refused: Address",
        ),
        (
            404,
            r#"{"error":{"message":"models/gemini-x is not found for API version v1beta, or is not supported"}}"#,
            "endpoint refused: Model",
        ),
        (
            404,
            r#"{"error":{"message":"Not found the model m or Permission denied"}}"#,
            "endpoint refused: Model",
        ),
        (
            400,
            r#"{"error":{"message":"The model you requested does not exist"}}"#,
            "endpoint refused: Model",
        ),
        (
            400,
            r#"{"error":{"message":"Invalid model name passed in model=m"}}"#,
            "endpoint refused: Model",
        ),
        (
            400,
            r#"{"error":{"message":"The provided model identifier is invalid."}}"#,
            "endpoint refused: Model",
        ),
        (
            404,
            r#"{"error":{"message":"No endpoints found for m."}}"#,
            "endpoint refused: Model",
        ),
        (
            404,
            r#"{"error":{"message":"The model\n  `m` has been deprecated"}}"#,
            "endpoint refused: Model",
        ),
        (
            400,
            r#"{"error":{"message":"The model's output is not available"}}"#,
            "refused: http 400",
        ),
        (
            400,
            r#"{"error":{"message":"submodel x was not found in the schema"}}"#,
            "refused: http 400",
        ),
        (
            400,
            r#"{"error":{"message":"The model parameter is deprecated"}}"#,
            "refused: http 400",
        ),
        (
            400,
            r#"{"error":{"message":"API key not valid. Please pass a valid API key."}}"#,
            "endpoint refused: Key",
        ),
        (
            400,
            r#"{"code":"Throttling.RateQuota","message":"Requests rate limit exceeded"}"#,
            "throttled: None",
        ),
        (
            420,
            r#"{"error":"calm down, try again in 2s"}"#,
            "throttled: Some(2000)",
        ),
        (424, "", "transient: http 424 0"),
        (498, "", "transient: http 498 0"),
        (
            400,
            r#"{"error":{"message":"m","code":"content_filter"}}"#,
            "filtered: content_filter",
        ),
        (
            403,
            r#"{"error":{"code":403,"message":"Input was flagged by moderation"}}"#,
            "filtered: content_filter",
        ),
        (
            403,
            "<html><title>Attention Required!</title>",
            "endpoint refused: Forbidden",
        ),
        (
            403,
            r#"{"error":{"message":"API rate limit exceeded"}}"#,
            "throttled: None",
        ),
        (
            400,
            r#"{"error":{"message":"Access denied","code":"Arrearage"}}"#,
            "endpoint refused: Credit",
        ),
        (
            429,
            r#"{"error":{"message":"You exceeded your current quota"}}"#,
            "endpoint refused: Credit",
        ),
        (
            429,
            r#"[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"You exceeded your current quota, please check your plan and billing details. Please retry in 1.5s."}}]"#,
            "throttled: Some(1500)",
        ),
        (
            200,
            r#"{"choices":null,"base_resp":{"status_code":1002,"status_msg":"rate limit"}}"#,
            "throttled: None",
        ),
        (
            200,
            r#"{"choices":null,"base_resp":{"status_code":1008,"status_msg":"no balance"}}"#,
            "endpoint refused: Credit",
        ),
        (
            200,
            r#"{"error":{"code":"content_filter","message":"m"}}"#,
            "filtered: content_filter",
        ),
        (
            200,
            r#"{"choices": 'x'}"#,
            "unreadable: not JSON: at byte 12: 'x'}",
        ),
        (
            400,
            r#"{"error":{"code":"content_filter","message":"m"},"choices":[{"message":{"content":"The first half of"}}]}"#,
            "answer",
        ),
        (408, "", "transient: http 408 0"),
        (409, "", "transient: http 409 0"),
        (413, "", "refused: http 413"),
        (422, "", "refused: http 422"),
        (425, "", "transient: http 425 0"),
        (429, "<html>", "throttled: None"),
        (429, quota, "endpoint refused: Credit"),
        (500, "", "transient: http 500 0"),
        (503, "", "transient: http 503 0"),
        (520, "<html>", "transient: http 520 0"),
        (529, "", "transient: http 529 0"),
    ];
    for (status, body, expected) in cases {
        assert_eq!(
            class_of(reply(status, &[], body)),
            expected,
            "{status} {body}"
        );
    }
}

#[test]
fn connection_errors_are_transient() {
    assert_eq!(
        class_of(Err(TransportError::Timeout)),
        "transient: timeout 0"
    );
    assert_eq!(
        class_of(Err(TransportError::Unreachable("x".into()))),
        "transient: unreachable 0"
    );
    assert_eq!(
        class_of(Err(TransportError::Broken("x".into()))),
        "transient: connection lost 0"
    );
}

#[test]
fn complete_answer_before_a_connection_loss_is_an_answer() {
    let class_if_cut_off = |body: &str| {
        let mut reply = reply(200, &[], body).unwrap();
        reply.end = BodyEnd::Truncated(TransportError::Broken("reset".into()));
        class_of(Ok(reply))
    };
    let complete_body = r#"{"choices":[{"message":{"content":"x"}}]}"#;
    assert_eq!(class_if_cut_off(complete_body), "answer");
    assert_eq!(
        class_if_cut_off(&complete_body[..complete_body.len() - 1]),
        "transient: connection lost 0"
    );
    for piece in [
        "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n",
        "{\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":null}]}\n",
    ] {
        assert_eq!(class_if_cut_off(piece), "transient: connection lost 0");
    }
    let mut reply = reply(200, &[], complete_body).unwrap();
    reply.end = BodyEnd::Unreadable {
        problem: "too large".into(),
        raw: bytes::Bytes::new(),
    };
    assert_eq!(class_of(Ok(reply)), "unreadable: too large");
}

#[test]
fn requested_wait_is_returned_with_the_class() {
    let in_ten_hours =
        httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + NOW + Duration::from_secs(36_000));
    type Headers<'a> = &'a [(&'static str, &'a str)];
    let used_up: Headers = &[
        ("x-ratelimit-limit", "50"),
        ("x-ratelimit-remaining", "0"),
        ("x-ratelimit-reset", "1800036000000"),
    ];
    let cases: [(u16, Headers, &str); 6] = [
        (429, &[("retry-after", "7")], "throttled: Some(7000)"),
        (
            429,
            &[("retry-after", &in_ten_hours)],
            "throttled: Some(36000000)",
        ),
        (429, used_up, "throttled: Some(36000000)"),
        (503, &[("retry-after", "2")], "throttled: Some(2000)"),
        (500, &[("retry-after", "2")], "transient: http 500 2000"),
        (403, &[("retry-after", "2")], "throttled: Some(2000)"),
    ];
    for (status, headers, expected) in cases {
        assert_eq!(
            class_of(reply(status, headers, "")),
            expected,
            "{status} {headers:?}"
        );
    }
}

#[test]
fn messages_are_shortened_to_one_sanitised_line() {
    let message = format!("a\n\n\u{1b}[31m{}", "x".repeat(1000));
    let short = shorten(&message);
    assert!(
        short.starts_with("a \\u{1b}[31mxxx") && short.ends_with("x ..."),
        "{short}"
    );
    assert!(short.len() < 320);
    // Sanitising makes a text longer.
    assert!(shorten(&"\u{1b}".repeat(60)).ends_with(" ..."));
}

#[test]
fn endpoint_refusal_in_a_success_reply_may_be_billed() {
    for (code, message, expected) in [
        (402, "no credit", true),
        (403, "no access", true),
        (401, "wrong key", false),
    ] {
        for status in [200, code] {
            let body = format!(r#"{{"error":{{"code":{code},"message":"{message}"}}}}"#);
            let refused = classify(reply(status, &[], &body), SystemTime::UNIX_EPOCH + NOW);
            let Err(AttemptError::EndpointRefused(refusal)) = refused else {
                panic!("{status} {code} is not an endpoint refusal");
            };
            let may_be_billed = expected && status == 200;
            assert_eq!(
                refusal.failure.may_be_billed, may_be_billed,
                "{status} {code}"
            );
        }
    }
}
