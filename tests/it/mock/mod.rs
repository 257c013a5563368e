//! The mock teacher: answers, rejections, disconnects and counts. Submodules test its limits, faults, batches, script
//! and server.

pub mod batch;
mod faults;
mod limits;
mod script;
pub mod server;

use std::path::Path;

use distill::mock::Mock;
use distill::mock::request::MockRequest;
use distill::mock::response::{MockReply, MockResponse};
use distill::mock::script::Script;
use serde_json::{Value, json};

pub fn script(text: &str) -> Script {
    Script::parse(Path::new("script.toml"), text).unwrap()
}

pub fn mock(text: &str) -> Mock {
    Mock::new(script(text))
}

/// Returns the body of a chat request, with the fields of `extra`.
pub fn body(content: &str, extra: Value) -> Vec<u8> {
    let mut body = json!({
        "model": "mock",
        "messages": [{"role": "user", "content": content}],
    });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body.to_string().into_bytes()
}

pub fn json_of(reply: &MockReply) -> Value {
    serde_json::from_slice(&reply.body).unwrap()
}

/// Sends a chat request with the fields of `extra`. Returns its reply, which must be complete.
pub async fn ask_with(mock: &Mock, content: &str, extra: Value) -> MockReply {
    match mock.respond(MockRequest::chat(&body(content, extra))).await {
        MockResponse::Complete(reply) => reply,
        other => panic!("{other:?}"),
    }
}

pub async fn ask(mock: &Mock, content: &str) -> MockReply {
    ask_with(mock, content, json!({})).await
}

/// Sends `count` requests one after another. Returns their statuses.
pub async fn statuses(mock: &Mock, count: usize) -> Vec<u16> {
    let mut statuses = Vec::new();
    for _ in 0..count {
        statuses.push(ask(mock, "hi").await.status);
    }
    statuses
}

/// Returns the text of the first choice.
pub fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[tokio::test]
async fn answer_has_scripted_text_logprobs_and_usage() {
    let mock = mock(
        "[answers]\ntext = \"upper\"\ntoken = \"bytes\"\ncached_tokens = 3\nreasoning_tokens = 2",
    );
    let extra = json!({"logprobs": true, "top_logprobs": 5});
    let answer = json_of(&ask_with(&mock, "größe 日本", extra).await);
    assert_eq!(text(&answer), "GRÖSSE 日本");
    let positions = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    let mut bytes: Vec<u8> = Vec::new();
    for position in positions {
        let token = position["bytes"].as_array().unwrap();
        bytes.extend(token.iter().map(|byte| byte.as_u64().unwrap() as u8));
        let top = position["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 5);
        assert_eq!(top[0]["token"], position["token"]);
        let logprob = |rank: usize| top[rank]["logprob"].as_f64().unwrap();
        assert!(
            (1..5).all(|rank| logprob(rank) < logprob(rank - 1)),
            "{position}"
        );
    }
    assert_eq!(bytes, "GRÖSSE 日本".as_bytes());
    // At least one token contains only a part of a character.
    assert!(
        positions
            .iter()
            .any(|p| p["token"].as_str().unwrap().contains('\u{fffd}'))
    );
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], positions.len() + 2);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3);
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 2);
    let billed = mock.stats().billed;
    assert_eq!(billed.answers, 1);
    assert_eq!(billed.completion_tokens, positions.len() as u64 + 2);
    assert_eq!(
        billed.prompt_tokens,
        usage["prompt_tokens"].as_u64().unwrap()
    );
}

#[tokio::test]
async fn answer_length_follows_script_and_max_tokens() {
    let mock = mock("[answers]\ntokens = 6\nreasoning_tokens = 2");
    for (max_tokens, content, finish_reason, billed) in [
        (json!(null), "a b a b a b", "stop", 8),
        (json!(8), "a b a b a b", "stop", 8),
        (json!(5), "a b a", "length", 5),
        // The reasoning tokens use up `max_tokens`.
        (json!(2), "", "length", 2),
    ] {
        let answer = json_of(&ask_with(&mock, "a b", json!({"max_tokens": max_tokens})).await);
        assert_eq!(text(&answer), content);
        assert_eq!(answer["choices"][0]["finish_reason"], finish_reason);
        assert_eq!(answer["usage"]["completion_tokens"], billed);
    }
    let three_answers = json_of(&ask_with(&mock, "a b", json!({"n": 3})).await);
    assert_eq!(three_answers["choices"].as_array().unwrap().len(), 3);
    assert_eq!(three_answers["choices"][2]["index"], 2);
    assert_eq!(three_answers["usage"]["completion_tokens"], 24);
}

#[tokio::test]
async fn rejected_parameter_is_named_in_the_error() {
    let mock = mock(
        "key = \"k\"\n[answers]\nrefuse_parameters = [\"seed\"]\ncontext_tokens = 100\n\
         max_tokens_field = \"max_completion_tokens\"\ntop_logprobs = 5",
    );
    let ask_with_key = async |body: &[u8]| {
        let request = MockRequest {
            authorization: Some("Bearer k"),
            ..MockRequest::chat(body)
        };
        match mock.respond(request).await {
            MockResponse::Complete(reply) => {
                (reply.status, json_of(&reply)["error"]["param"].clone())
            }
            other => panic!("{other:?}"),
        }
    };
    for (status, param, extra) in [
        (200, json!(null), json!({"seed": null})),
        (400, json!("seed"), json!({"seed": 1})),
        (400, json!("max_tokens"), json!({"max_tokens": 1})),
        (400, json!("stream"), json!({"stream": true})),
        (400, json!("top_logprobs"), json!({"top_logprobs": 1})),
        (
            400,
            json!("top_logprobs"),
            json!({"logprobs": true, "top_logprobs": 6}),
        ),
        (400, json!("messages"), json!({"messages": []})),
        (
            400,
            json!("messages"),
            json!({"max_completion_tokens": 101}),
        ),
        (400, json!(null), json!({"messages": 3})),
        (400, json!("n"), json!({"n": 0})),
        (404, json!(null), json!({"model": "other"})),
    ] {
        assert_eq!(
            ask_with_key(&body("hi", extra.clone())).await,
            (status, param),
            "{extra}"
        );
    }
    assert_eq!(ask(&mock, "hi").await.status, 401);
    assert_eq!(mock.stats().billed.answers, 1);
}

#[tokio::test(start_paused = true)]
async fn disconnect_is_counted_and_billed_as_scripted() {
    for (bill_abandoned, billed) in [(true, 1), (false, 0)] {
        let mock = mock(&format!(
            "[answers]\nlatency_s = 10\nbill_abandoned = {bill_abandoned}"
        ));
        let second = std::time::Duration::from_secs(1);
        tokio::time::timeout(second, ask(&mock, "hi"))
            .await
            .unwrap_err();
        let stats = mock.stats();
        assert_eq!(
            (stats.abandoned, stats.answered, stats.in_flight),
            (1, 0, 0)
        );
        assert_eq!(stats.billed.answers, billed);
    }
}

#[tokio::test(start_paused = true)]
async fn latencies_and_faults_depend_on_seed_not_order() {
    let text = |seed| {
        format!(
            "seed = {seed}\n[answers]\nlatency_s = [1, 9]\n[[faults]]\nkind = \"http 500\"\nshare = 0.5"
        )
    };
    let run = async |seed: u64, reverse: bool| {
        let mock = mock(&text(seed));
        let mut outcomes = Vec::new();
        for index in 0..40 {
            let index = if reverse { 39 - index } else { index };
            let start = tokio::time::Instant::now();
            let status = ask(&mock, &format!("prompt {index}")).await.status;
            outcomes.push((index, status, start.elapsed()));
        }
        outcomes.sort();
        outcomes
    };
    let first = run(1, false).await;
    assert_eq!(first, run(1, true).await);
    assert_ne!(first, run(2, false).await);
    let failed = first.iter().filter(|(_, status, _)| *status == 500).count();
    assert!(
        (8..=32).contains(&failed),
        "{failed} of 40 requests failed, with a probability of 0.5"
    );
    let answered = first.iter().filter(|(_, status, _)| *status == 200);
    let seconds: Vec<f64> = answered.map(|(_, _, time)| time.as_secs_f64()).collect();
    assert!(seconds.iter().all(|s| (1.0..9.01).contains(s)));
    assert!(seconds.iter().any(|s| *s < 4.0) && seconds.iter().any(|s| *s > 6.0));
}

#[tokio::test]
async fn stats_count_how_often_each_body_is_billed() {
    let mock = mock("");
    for content in ["a", "a", "b", "a"] {
        ask(&mock, content).await;
    }
    assert_eq!(mock.times_billed(&body("a", json!({}))), 3);
    assert_eq!(mock.times_billed(&body("c", json!({}))), 0);
    let stats = mock.stats();
    assert_eq!(stats.bodies, 2);
    assert_eq!(stats.bodies_by_times_billed, [(1, 1), (3, 1)].into());
    assert_eq!(stats.by_status, [(200, 4)].into());
}
