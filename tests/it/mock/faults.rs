//! Effects of each kind of fault on a client, and the conditions under which a fault applies.

use std::time::Duration;

use distill::mock::request::MockRequest;
use distill::mock::response::MockResponse;
use distill::mock::script::fault_kind::FaultKind;
use serde_json::{Value, json};
use tokio::time::{Instant, advance, timeout};

use super::server::{ConnectionEnd, Server};
use super::{ask, ask_with, body, json_of, mock, statuses, text};

/// Sends a request to a mock with this fault. Returns the head and the body that the client receives, and the end of
/// the connection.
async fn receive(fault: &str) -> (String, Vec<u8>, ConnectionEnd) {
    let server = Server::start(&format!("[[faults]]\n{fault}")).await;
    let extra = json!({"logprobs": true, "top_logprobs": 3});
    let max_wait = if fault.contains("drip") {
        Duration::from_millis(300)
    } else {
        Duration::from_secs(10)
    };
    let (bytes, end) = server.exchange(&body("hello there", extra), max_wait).await;
    let head_end = b"\r\n\r\n";
    let blank_line = bytes.windows(4).position(|window| window == head_end);
    let body_start = blank_line.map_or(bytes.len(), |start| start + head_end.len());
    let head = String::from_utf8(bytes[..body_start].to_vec()).unwrap();
    let faults = server.mock.stats().faults;
    assert_eq!(faults.values().sum::<u64>(), 1, "{faults:?}");
    (head.to_lowercase(), bytes[body_start..].to_vec(), end)
}

#[tokio::test]
async fn error_faults_have_their_status_headers_and_body() {
    for status in [
        400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 503, 504, 529,
    ] {
        let (head, body, _) = receive(&format!("kind = \"http {status}\"")).await;
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{head}");
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert!(body["error"]["message"].is_string() && body["error"]["code"].is_string());
    }
    for status in [429, 502] {
        let (head, body, _) = receive(&format!("kind = \"html {status}\"")).await;
        assert!(
            head.contains(&format!(" {status} ")) && head.contains("text/html"),
            "{head}"
        );
        assert!(body.starts_with(b"<html>"));
    }
    let (head, body, _) = receive("kind = \"insufficient_quota\"").await;
    assert!(head.contains(" 429 "));
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["error"]["code"], "insufficient_quota");
    let (head, ..) = receive("kind = \"redirect\"\nheaders = {Location = \"http://other/\"}").await;
    assert!(
        head.contains(" 307 ") && head.contains("location: http://other/\r\n"),
        "{head}"
    );
    assert_eq!(head.matches("location").count(), 1, "{head}");
    let (head, body, _) = receive("kind = \"error in 200\"").await;
    assert!(head.contains(" 200 "));
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["error"]["code"], 502);
    let (head, body, _) = receive(
        "kind = \"http 503\"\nbody = \"busy\"\nretry_after = \"float\"\nretry_after_s = 1.5",
    )
    .await;
    assert!(head.contains("retry-after: 1.5\r\n"), "{head}");
    assert_eq!(body, b"busy");
}

#[tokio::test]
async fn connection_faults_end_the_connection_as_scripted() {
    let length = |head: &str| -> usize {
        let (_, value) = head.split_once("content-length: ").unwrap();
        value.split("\r\n").next().unwrap().parse().unwrap()
    };
    for kind in ["reset", "refused"] {
        let (head, body, end) = receive(&format!("kind = \"{kind}\"")).await;
        assert_eq!(
            (head.as_str(), body.len(), end),
            ("", 0, ConnectionEnd::Reset)
        );
    }
    for (kind, expected) in [
        ("reset in body", ConnectionEnd::Reset),
        ("short body", ConnectionEnd::Closed),
        ("stall in body", ConnectionEnd::Open),
    ] {
        let (head, body, end) = receive(&format!("kind = \"{kind}\"")).await;
        assert_eq!(body.len(), length(&head) / 2, "{kind}");
        assert_eq!(end, expected, "{kind}");
    }
    let (head, body, end) = receive("kind = \"unfinished chunks\"").await;
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    assert!(body.ends_with(b"}\r\n"), "the last chunk was sent");
    assert_eq!(end, ConnectionEnd::Closed);
    let (head, body, end) = receive("kind = \"stall\"").await;
    assert_eq!(
        (head.as_str(), body.len(), end),
        ("", 0, ConnectionEnd::Open)
    );
    let (head, body, end) = receive("kind = \"drip\"\ninterval_s = 0.05").await;
    assert!(
        !body.is_empty() && body.len() < length(&head) / 10,
        "{}",
        body.len()
    );
    assert_eq!(end, ConnectionEnd::Open);
    for interval in ["", "interval_s = 0.001"] {
        let (head, body, _) =
            receive(&format!("kind = \"blank lines\"\nsize = 5\n{interval}")).await;
        assert_eq!(body.len(), length(&head));
        assert!(body.starts_with(b"\n\n\n\n\n{"));
        serde_json::from_slice::<Value>(&body).unwrap();
    }
}

#[tokio::test]
async fn body_faults_change_the_body_of_a_200_reply() {
    let connection_faults = [
        "reset in body",
        "short body",
        "unfinished chunks",
        "stall in body",
        "drip",
    ];
    for kind in FaultKind::all().filter(|kind| kind.corrupts_answer()) {
        if connection_faults.contains(&kind.to_string().as_str()) {
            continue;
        }
        let (head, body, _) = receive(&format!("kind = \"{kind}\"")).await;
        assert!(head.contains(" 200 ok"), "{kind}: {head}");
        let extra = json!({"logprobs": true, "top_logprobs": 3});
        let valid_answer = json_of(&ask_with(&mock(""), "hello there", extra).await);
        // Unit tests of `mock::corrupt` check the body of each kind.
        assert_ne!(body, serde_json::to_vec(&valid_answer).unwrap(), "{kind}");
        if kind == FaultKind::HugeBody {
            assert_eq!(body.len(), 64 << 20);
        }
    }
}

#[tokio::test]
async fn fault_with_first_applies_per_body() {
    let mock = mock("[[faults]]\nkind = \"http 500\"\nfirst = 2");
    for content in ["a", "b"] {
        let mut statuses = Vec::new();
        for _ in 0..4 {
            statuses.push(ask(&mock, content).await.status);
        }
        assert_eq!(statuses, [500, 500, 200, 200], "{content}");
    }
    let stats = mock.stats();
    assert_eq!(stats.faults, [("http 500".to_string(), 4)].into());
    assert_eq!((stats.billed.answers, stats.bodies), (4, 2));
}

#[tokio::test(start_paused = true)]
async fn fault_applies_in_its_window_and_to_matching_prompts() {
    let mock = mock(
        "[[faults]]\nkind = \"http 400\"\nmatching = \"poison\"\n\
         [[faults]]\nkind = \"http 503\"\nfrom_s = 10\nto_s = 20\nafter_s = 0.5",
    );
    assert_eq!(statuses(&mock, 1).await, [200]);
    assert_eq!(ask(&mock, "some poison here").await.status, 400);
    advance(Duration::from_secs(10)).await;
    let start = Instant::now();
    assert_eq!(statuses(&mock, 1).await, [503]);
    assert_eq!(start.elapsed().as_millis(), 500);
    // Both faults match; the first one applies.
    assert_eq!(ask(&mock, "poison").await.status, 400);
    advance(Duration::from_secs(10)).await;
    assert_eq!(statuses(&mock, 1).await, [200]);
}

#[tokio::test(start_paused = true)]
async fn stalled_request_occupies_its_slot_until_the_client_disconnects() {
    let mock = mock("[[faults]]\nkind = \"stall\"\n[limits]\nconcurrency = 1");
    let body = body("hi", json!({}));
    let hour = Duration::from_secs(3600);
    timeout(hour, mock.respond(MockRequest::chat(&body)))
        .await
        .unwrap_err();
    // The stalled request occupied the only slot until it was dropped.
    let stats = mock.stats();
    assert_eq!(
        (stats.max_in_flight, stats.in_flight, stats.abandoned),
        (1, 0, 1)
    );
    assert_eq!(stats.billed.answers, 0);
}

#[tokio::test]
async fn corrupt_answers_are_billed_and_errors_are_not() {
    for (fault, billed) in [
        ("kind = \"http 500\"", 0),
        ("kind = \"http 500\"\nbilled = true", 1),
        ("kind = \"reset\"", 0),
        ("kind = \"reset in body\"", 1),
        ("kind = \"truncated\"", 1),
        ("kind = \"truncated\"\nbilled = false", 0),
        ("kind = \"refusal\"", 1),
    ] {
        let mock = mock(&format!("[[faults]]\n{fault}"));
        let body = body("hi", json!({}));
        let response = mock.respond(MockRequest::chat(&body)).await;
        assert_eq!(mock.times_billed(&body), billed, "{fault}: {response:?}");
        assert_eq!(mock.stats().answered, 0);
    }
}

#[tokio::test]
async fn connection_faults_are_response_variants_without_tcp() {
    let body = body("hi there", json!({}));
    let respond = async |kind: &str| {
        let mock = mock(&format!("[[faults]]\nkind = \"{kind}\""));
        mock.respond(MockRequest::chat(&body)).await
    };
    assert_eq!(respond("reset").await, MockResponse::Reset);
    assert_eq!(respond("refused").await, MockResponse::Refused);
    let MockResponse::ShortBody(reply) = respond("short body").await else {
        panic!("unexpected response");
    };
    assert_eq!(text(&json_of(&reply)), "hi there");
    let MockResponse::Drip {
        reply,
        slow,
        interval,
    } = respond("drip").await
    else {
        panic!("unexpected response");
    };
    assert_eq!((slow, interval), (reply.body.len(), Duration::from_secs(1)));
}
