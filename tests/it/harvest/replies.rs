//! Malformed replies. An answer in a malformed reply is recorded, and not bought again.

use std::io::Write;

use distill::cache::record::{Record, Status};
use serde_json::{Value, json};

use super::{Run, exit_of};
use crate::fault_server::{FaultServer, Reaction, completion, reply};

/// Returns the records of two prompts whose requests get `reaction`. Both must be answered at the first attempt.
async fn records(reaction: Reaction) -> Vec<Record> {
    let context = format!("{reaction:?}")
        .chars()
        .take(200)
        .collect::<String>();
    let server = FaultServer::start(move |_| reaction.clone()).await;
    let run = Run::new(&server, &["a", "b"]);
    let summary = run.harvest().await;
    assert_eq!(
        (exit_of(&summary).0, summary.requests),
        (0, 2),
        "{context}: {summary:?}"
    );
    let records = run.records();
    assert_eq!(records.len(), 2, "{context}");
    records
}

fn reply_with_body(headers: Vec<(&'static str, String)>, body: impl Into<Vec<u8>>) -> Reaction {
    Reaction::Reply(200, headers, body.into())
}

/// Returns the body of the answer `hi` with its logprobs.
fn valid_body() -> String {
    completion("hi", 5).to_string()
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn encoding_and_json_errors_are_repaired() {
    let body = valid_body();
    let with_field = |field: &str| format!("{},{field}}}", &body[..body.len() - 1]);
    let encoding = |encoding: &str| vec![("content-encoding", encoding.to_owned())];
    let zstd = zstd::encode_all(body.as_bytes(), 3).unwrap();
    let deep = format!("\"trace\":{}{}", "[".repeat(300), "]".repeat(300));
    let chunks = [json!({"content": "h"}), json!({"content": "i"})]
        .map(|delta| json!({"choices": [{"index": 0, "delta": delta}]}));
    let last = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 10, "completion_tokens": 2}});
    let stream = format!(
        ": wait\n\ndata: {}\n\ndata: {}\n\ndata: {last}\n\ndata: [DONE]\n\n",
        chunks[0], chunks[1]
    );
    let reactions = [
        reply_with_body(vec![], format!("\u{feff}{body}")),
        reply_with_body(vec![], format!("{body}\n\ndata: [DONE]\n\n")),
        reply_with_body(vec![], format!("{body}<!-- served by a proxy -->")),
        reply_with_body(vec![], format!("data: {body}\n\n")),
        reply_with_body(vec![], stream),
        reply_with_body(vec![], with_field("\"timings\":{\"x\":1e400,\"y\":-inf}")),
        reply_with_body(vec![], with_field(&deep)),
        reply_with_body(vec![], with_field("\"choices\":null")),
        reply_with_body(encoding("gzip"), gzip(&body)),
        reply_with_body(vec![], gzip(&body)),
        reply_with_body(encoding("gzip"), body.clone()),
        reply_with_body(encoding("zstd"), zstd),
        // The connection breaks after the complete body.
        Reaction::UnfinishedChunks(body.into_bytes()),
    ];
    for reaction in reactions {
        for record in records(reaction).await {
            assert_eq!(
                (record.answer.text.as_str(), record.status),
                ("hi", Status::Ok)
            );
            assert_eq!(record.answer.finish_reason, "stop");
            assert_eq!(record.usage.unwrap().prompt_tokens, 10);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_accepts_compressed_replies() {
    let server = FaultServer::start(|_| reply(200, completion("hi", 0))).await;
    Run::new(&server, &["a"]).harvest().await;
    let accepted = server.requests()[0]
        .header("accept-encoding")
        .unwrap()
        .to_owned();
    for encoding in ["gzip", "br", "zstd"] {
        assert!(accepted.contains(encoding), "{accepted}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_unicode_becomes_replacement_character() {
    let body_with_text = |text: &[u8]| {
        let body = completion("hi", 0).to_string().into_bytes();
        let start = memchr::memmem::find(&body, b"\"hi\"").unwrap() + 1;
        [&body[..start], text, &body[start + 2..]].concat()
    };
    let cases: [(&[u8], &str); 5] = [
        (br"Nice \ud83d day", "Nice \u{fffd} day"),
        (br"Nice \ude00", "Nice \u{fffd}"),
        (b"Nice \xf0\x9f\x98", "Nice \u{fffd}"),
        (b"one\n\ttwo", "one\n\ttwo"),
        (br"a \ud83d\ude00 b", "a 😀 b"),
    ];
    for (text, expected) in cases {
        for record in records(reply_with_body(vec![], body_with_text(text))).await {
            assert_eq!(record.answer.text, expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answer_fields_are_parsed_and_unknown_fields_kept() {
    let record_with_content = async |content: Value| {
        let mut body = completion("x", 0);
        body["choices"][0]["message"]["content"] = content;
        records(reply(200, body)).await.remove(0)
    };
    let text = json!({"type": "text", "text": "Four."});
    let thinking = json!({"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]});
    let record = record_with_content(json!([thinking, text])).await;
    assert_eq!(
        (
            record.answer.text.as_str(),
            record.answer.reasoning.as_str()
        ),
        ("Four.", "Hm.")
    );
    let record = record_with_content(json!([{"type": "reasoning", "text": "Hm."}, text])).await;
    assert_eq!(
        (
            record.answer.text.as_str(),
            record.answer.reasoning.as_str()
        ),
        ("Four.", "Hm.")
    );
    let record = record_with_content(json!([{"type": "refusal", "refusal": "No."}])).await;
    assert_eq!(
        (record.answer.refusal.as_str(), record.reason.as_str()),
        ("No.", "refusal")
    );
    assert_eq!(
        record_with_content(json!(["Four", "."])).await.answer.text,
        "Four."
    );
    assert_eq!(record_with_content(text).await.answer.text, "Four.");
    let unknown_content = json!({"answer": 4});
    let record = record_with_content(unknown_content.clone()).await;
    assert_eq!(
        (
            record.reason.as_str(),
            &record.extra["message"]["content"][0]
        ),
        ("empty: stop", &unknown_content)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tool_calls_are_kept_unchanged() {
    let calls = json!([{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]);
    let mut body = completion("", 0);
    body["choices"][0]["message"] =
        json!({"role": "assistant", "content": null, "tool_calls": calls});
    body["choices"][0]["finish_reason"] = "tool_calls".into();
    let record = records(reply(200, body)).await.remove(0);
    assert_eq!(
        (
            record.reason.as_str(),
            &record.extra["message"]["tool_calls"]
        ),
        ("empty: tool_calls", &calls)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn paid_empty_answer_is_quarantined_once() {
    let usage = json!({"prompt_tokens": 12, "completion_tokens": 0, "total_tokens": 12});
    let cases = [
        (
            json!({"choices": [], "usage": usage, "prompt_filter_results": [{"prompt_index": 0}]}),
            "empty: content_filter",
        ),
        (json!({"model": "gemini", "usage": usage}), "empty"),
        (
            json!({"choices": [{"finish_reason": "length"}], "usage": usage}),
            "empty: length",
        ),
        (
            json!({"choices": [{"message": null, "finish_reason": "content_filter"}], "usage": usage}),
            "empty: content_filter",
        ),
    ];
    for (body, reason) in cases {
        let server = FaultServer::start(move |_| reply(200, body.clone())).await;
        let run = Run::new(&server, &["a"]);
        let summary = run.harvest().await;
        assert_eq!((summary.quarantined, summary.requests), (1, 1), "{reason}");
        let record = run.records().remove(0);
        assert_eq!(
            (record.reason.as_str(), record.usage.unwrap().prompt_tokens),
            (reason, 12)
        );
        assert_eq!(run.harvest().await.requests, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_body_is_saved_and_not_requested_again() {
    let cases = [
        reply_with_body(
            vec![],
            "{'choices': [{'message': {'content': 'hi'}}], \"usage\": 1}",
        ),
        reply_with_body(vec![("content-encoding", "gzip".into())], {
            let mut broken = gzip(&valid_body());
            broken[30] ^= 0xff;
            broken
        }),
    ];
    for reaction in cases {
        let Reaction::Reply(_, _, sent) = reaction.clone() else {
            unreachable!()
        };
        let server = FaultServer::start(move |_| reaction.clone()).await;
        let run = Run::new(&server, &["a"]);
        let summary = run.harvest().await;
        assert_eq!(
            (summary.quarantines["unreadable"], summary.requests),
            (1, 1),
            "{summary:?}"
        );
        let record = run.records().remove(0);
        let saved = run
            .config
            .run_dir
            .join("unreadable")
            .join(format!("{}.body", record.key));
        assert_eq!(std::fs::read(saved).unwrap(), sent);
        assert!(record.extra["unreadable"].is_string());
        assert_eq!(run.harvest().await.requests, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn possibly_billed_attempts_are_limited_across_runs() {
    // An HTML page in place of an answer may have been billed.
    let page = reply_with_body(vec![], "<html><title>Sign in</title></html>");
    let server = FaultServer::start(move |seen| match seen.prompt() {
        "a" => page.clone(),
        _ => reply(200, completion("B", 0)),
    })
    .await;
    let mut run = Run::new(&server, &["a", "b"]);
    run.config.retry.max_attempts = 3;
    let summary = run.harvest().await;
    assert_eq!(
        (summary.ok, summary.failures["malformed"], summary.requests),
        (1, 1, 4)
    );
    assert!(
        run.failures()[0]["message"]
            .as_str()
            .unwrap()
            .contains("HTML page")
    );
    for _ in 0..2 {
        let rerun = run.harvest().await;
        assert_eq!(
            (rerun.failed, rerun.requests, exit_of(&rerun).0),
            (1, 0, 3),
            "{rerun:?}"
        );
        assert_eq!(run.failures()[0]["attempts"], 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_of_concurrent_requests_are_recorded() {
    let mut body = completion("x", 0);
    // The run reads at most two bodies of this size at a time.
    body["choices"][0]["message"]["content"] = "z".repeat(6 << 20).into();
    let reaction = reply(200, body);
    let server = FaultServer::start(move |_| reaction.clone()).await;
    let summary = Run::with_numbered_prompts(&server, 16).harvest().await;
    assert_eq!((summary.ok, summary.requests), (16, 16));
}
