//! The OpenAI-compatible server over HTTP.

mod errors;
mod scores;

use std::sync::Once;
use std::time::Duration;

use distill::serve::{self, ServeOptions, Server};
use futures_util::future::join_all;
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::tiny;

const CONTEXT: usize = 2500;
/// Time limit of a request, which only [`endless`] answers exceed.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A server over a tiny model, with a client.
struct Fixture {
    server: Server,
    client: Client,
    _model: tempfile::TempDir,
}

fn start(batch_size: usize, queue: usize) -> Fixture {
    start_with_context(batch_size, queue, CONTEXT)
}

/// Starts a server whose answers can be [`endless`].
fn start_endless(queue: usize) -> Fixture {
    start_with_context(1, queue, 200_000)
}

fn start_with_context(batch_size: usize, queue: usize, context: usize) -> Fixture {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // An error means that another test has installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let model = tempfile::tempdir().unwrap();
    tiny::write_model(model.path(), 1, context);
    let options = ServeOptions {
        port: 0,
        model_name: Some("tiny".into()),
        batch_size,
        queue,
        ..ServeOptions::default()
    };
    Fixture {
        server: serve::start(model.path(), options).unwrap(),
        client: Client::new(),
        _model: model,
    }
}

impl Fixture {
    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server.base_url())
    }

    async fn send(&self, body: &Value) -> Response {
        self.send_to("/chat/completions", body).await
    }

    async fn send_to(&self, path: &str, body: &Value) -> Response {
        let request = self.client.post(self.url(path)).json(body);
        timeout(TIMEOUT, request.send()).await.unwrap().unwrap()
    }

    /// Returns the answer to a request that must succeed.
    async fn ask(&self, body: &Value) -> Value {
        self.ask_at("/chat/completions", body).await
    }

    async fn ask_at(&self, path: &str, body: &Value) -> Value {
        let response = self.send_to(path, body).await;
        let status = response.status();
        let answer: Value = timeout(TIMEOUT, response.json()).await.unwrap().unwrap();
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    /// Returns the events of a stream, which must end with `[DONE]`.
    async fn stream(&self, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let response = self.send(&body).await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = timeout(TIMEOUT, response.text()).await.unwrap().unwrap();
        let mut events: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events
            .into_iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }
}

fn request(content: &str, extra: Value) -> Value {
    let mut body = json!({
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 40,
    });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

fn token_bytes(token: &Value) -> Vec<u8> {
    let bytes = token["bytes"].as_array().unwrap();
    bytes
        .iter()
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect()
}

#[tokio::test]
async fn models_route_lists_the_model() {
    let fixture = start(4, 64);
    let get = async |path: &str| -> Value {
        let response = fixture.client.get(fixture.url(path)).send().await.unwrap();
        response.json().await.unwrap()
    };
    let list = get("/models").await;
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0], get("/models/tiny").await);
    assert_eq!(list["data"][0]["id"], "tiny");
    assert_eq!(
        get("/models/org/large").await["error"]["code"],
        "model_not_found"
    );
}

#[tokio::test]
async fn answer_has_openai_format() {
    let fixture = start(4, 64);
    let answer = fixture.ask(&request("hi", json!({"max_tokens": 7}))).await;
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(
        answer["system_fingerprint"]
            .as_str()
            .unwrap()
            .starts_with("fp_")
    );
    assert!(answer["created"].as_i64().unwrap() > 1_600_000_000);
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "tiny");
    let choice = &answer["choices"][0];
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["logprobs"], Value::Null);
    assert_eq!(choice["message"]["role"], "assistant");
    // The prompt has one token per byte or control token: <|im_start|> user \n h i <|im_end|> \n <|im_start|> assistant
    // \n.
    let prompt_tokens = 1 + 5 + 2 + 2 + 1 + 10;
    assert_eq!(
        answer["usage"],
        json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 7,
            "total_tokens": prompt_tokens + 7,
        })
    );
}

#[tokio::test]
async fn streamed_answer_equals_unstreamed_answer() {
    let fixture = start(4, 64);
    for extra in [
        json!({"seed": 11, "temperature": 1, "logprobs": true, "top_logprobs": 3}),
        json!({"seed": 12, "temperature": 0.7, "top_p": 0.9, "n": 3, "max_tokens": 300}),
        json!({"seed": 13, "temperature": 1, "stop": ["e", "xy"], "max_tokens": 2000}),
    ] {
        let mut body = request("tell me", extra);
        let unstreamed = fixture.ask(&body).await;
        body["stream_options"] = json!({"include_usage": true});
        let mut events = fixture.stream(&body).await;
        let usage = events.pop().unwrap();
        assert_eq!(usage["choices"], json!([]));
        assert_eq!(usage["usage"], unstreamed["usage"]);
        for expected in unstreamed["choices"].as_array().unwrap() {
            let mut content = String::new();
            let mut logprobs = Vec::new();
            let mut finish_reason = Value::Null;
            for event in &events {
                assert_eq!(event["object"], "chat.completion.chunk");
                assert_eq!(event["usage"], Value::Null);
                let choice = &event["choices"][0];
                if choice["index"] != expected["index"] {
                    continue;
                }
                assert_eq!(finish_reason, Value::Null, "an event follows the end");
                content += choice["delta"]["content"].as_str().unwrap_or_default();
                if let Some(tokens) = choice["logprobs"]["content"].as_array() {
                    logprobs.extend(tokens.clone());
                }
                finish_reason = choice["finish_reason"].clone();
            }
            assert_eq!(content, expected["message"]["content"]);
            assert_eq!(finish_reason, expected["finish_reason"]);
            let expected = expected["logprobs"]["content"].as_array();
            assert_eq!(logprobs.len(), expected.map_or(0, Vec::len));
            assert_eq!(Some(logprobs), expected.cloned().or(Some(Vec::new())));
        }
    }
}

#[tokio::test]
async fn logprobs_match_the_text() {
    let fixture = start(4, 64);
    let body = json!({
        "seed": 3, "temperature": 1, "max_tokens": 400, "logprobs": true, "top_logprobs": 20,
    });
    let answer = fixture.ask(&request("tell me", body)).await;
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    let mut bytes = Vec::new();
    let mut in_top = 0;
    let mut partial = 0;
    for position in content {
        let top = position["top_logprobs"].as_array().unwrap();
        let logprobs: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert_eq!(top.len(), 20);
        assert!(logprobs.is_sorted_by(|a, b| a >= b));
        assert!(logprobs.iter().map(|logprob| logprob.exp()).sum::<f64>() <= 1.0);
        for same in top.iter().filter(|t| t["token"] == position["token"]) {
            // Tokens that are parts of different characters may have the same text.
            if same["bytes"] == position["bytes"] && !token_bytes(same).is_empty() {
                assert_eq!(same["logprob"], position["logprob"]);
                in_top += 1;
            }
        }
        let token = token_bytes(position);
        match std::str::from_utf8(&token) {
            Ok("") => assert!(position["token"].as_str().unwrap().starts_with("<|")),
            Ok(text) => assert_eq!(position["token"], text),
            Err(_) => {
                assert!(position["token"].as_str().unwrap().contains('\u{fffd}'));
                partial += 1;
            }
        }
        bytes.extend(token);
    }
    assert!(
        in_top > 10,
        "only {in_top} emitted tokens are among the 20 most likely ones"
    );
    assert!(
        partial > 10,
        "only {partial} tokens are parts of characters"
    );
    assert_eq!(String::from_utf8_lossy(&bytes), text(&answer));
}

#[tokio::test]
async fn end_of_turn_token_is_counted_but_not_in_content() {
    let fixture = start(16, 64);
    let body = json!({
        "seed": 1, "temperature": 1, "n": 16, "max_tokens": 300, "logprobs": true,
    });
    let answer = fixture.ask(&request("tell me", body)).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 16);
    let mut completion_tokens = 0;
    let mut stopped = 0;
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        let tokens = choice["logprobs"]["content"].as_array().unwrap().len();
        completion_tokens += tokens;
        if choice["finish_reason"] == "stop" {
            let end = &choice["logprobs"]["content"][tokens - 1];
            assert_eq!(
                (&end["token"], &end["bytes"]),
                (&"<|im_end|>".into(), &json!([]))
            );
            stopped += 1;
        } else {
            assert_eq!(tokens, 300);
        }
        assert!(
            !choice["message"]["content"]
                .as_str()
                .unwrap()
                .contains("<|im_end|>")
        );
    }
    assert!(stopped > 0, "none of 16 answers has an end-of-turn token");
    assert_eq!(answer["usage"]["completion_tokens"], completion_tokens);
    assert_ne!(choices[0]["message"], choices[1]["message"]);
}

#[tokio::test]
async fn stop_string_cuts_the_answer_before_it() {
    let fixture = start(4, 64);
    // The stop string is two consecutive letters or digits of an answer. Tries seeds until an answer has them.
    let is_alphanumeric = |pair: &&[u8]| pair.iter().all(u8::is_ascii_alphanumeric);
    let mut seed = 0;
    let (body, full_text, stop) = loop {
        let body = json!({"seed": seed, "temperature": 1, "max_tokens": 400});
        let full = fixture.ask(&request("tell me", body.clone())).await;
        let full_text = text(&full).to_string();
        let valid_text = full_text.split('\u{fffd}').next().unwrap();
        if let Some(stop) = valid_text.as_bytes().windows(2).find(is_alphanumeric) {
            let stop = std::str::from_utf8(stop).unwrap().to_string();
            break (body, full_text, stop);
        }
        seed += 1;
    };
    let stop = &*stop;
    let mut body = request("tell me", body);
    body["stop"] = json!([stop]);
    body["logprobs"] = true.into();
    let answer = fixture.ask(&body).await;
    assert_eq!(text(&answer), full_text.split_once(stop).unwrap().0);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let tokens = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    let bytes: Vec<u8> = tokens.iter().flat_map(token_bytes).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), text(&answer));
    // The tokens of the stop string were generated, so they are counted.
    let completion_tokens = answer["usage"]["completion_tokens"].as_u64().unwrap() as usize;
    assert!(completion_tokens > tokens.len());
    assert!(
        completion_tokens <= tokens.len() + 2,
        "{stop:?} after {:?}: {completion_tokens} tokens, {} returned",
        text(&answer),
        tokens.len()
    );
}

#[tokio::test]
async fn seed_makes_the_answer_reproducible() {
    let fixture = start(4, 64);
    let ask = async |seed: Value| {
        let body = request("tell me", json!({"seed": seed, "temperature": 1}));
        text(&fixture.ask(&body).await).to_string()
    };
    assert_eq!(ask(json!(7)).await, ask(json!(7)).await);
    assert_ne!(ask(json!(7)).await, ask(json!(8)).await);
    assert_ne!(ask(Value::Null).await, ask(Value::Null).await);
}

#[tokio::test]
async fn concurrent_requests_get_the_same_answers_as_sequential_ones() {
    let fixture = start(8, 64);
    let bodies: Vec<Value> = (0..16)
        .map(|index| {
            let content = "ab ".repeat(1 + 13 * index);
            request(&content, json!({"max_tokens": 10 + 3 * index}))
        })
        .collect();
    let together = join_all(bodies.iter().map(|body| fixture.ask(body))).await;
    for (body, together) in bodies.iter().zip(together) {
        let alone = fixture.ask(body).await;
        assert_eq!(text(&alone), text(&together));
        assert_eq!(alone["usage"], together["usage"]);
    }
}

/// Returns a request whose answer takes longer than any test.
fn endless() -> Value {
    request("tell me", json!({"max_tokens": null, "stream": true}))
}

/// Reads a stream until its first text, which shows that the answer is running.
async fn wait_for_first_text(response: &mut Response) {
    loop {
        let piece = timeout(TIMEOUT, response.chunk()).await.unwrap().unwrap();
        let piece = String::from_utf8(piece.unwrap().to_vec()).unwrap();
        if piece.contains("\"delta\":{\"content\"") {
            return;
        }
    }
}

#[tokio::test]
async fn disconnect_frees_the_slot() {
    let fixture = start_endless(64);
    let mut streaming = fixture.send(&endless()).await;
    wait_for_first_text(&mut streaming).await;
    let mut unstreamed = endless();
    unstreamed["stream"] = false.into();
    // Two requests wait in the queue. The client of the second one disconnects.
    let queued = fixture.send(&endless()).await;
    let timed_out = timeout(Duration::from_millis(50), fixture.send(&unstreamed)).await;
    assert!(timed_out.is_err(), "the slot was free");
    drop(streaming);
    drop(queued);
    fixture.ask(&request("hi", json!({}))).await;
}

#[tokio::test]
async fn full_queue_rejects_with_retry_after() {
    let fixture = start_endless(2);
    let mut running = fixture.send(&endless()).await;
    wait_for_first_text(&mut running).await;
    let _first = fixture.send(&endless()).await;
    // One slot is left in the queue: a request for two answers is rejected.
    let pair = request("hi", json!({"n": 2}));
    assert_eq!(
        fixture.send(&pair).await.status(),
        StatusCode::SERVICE_UNAVAILABLE
    );
    let _second = fixture.send(&endless()).await;
    let refused = fixture.send(&request("hi", json!({}))).await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers()["retry-after"], "1");
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["type"], "server_error");
}

#[tokio::test]
async fn shutdown_lets_running_answers_finish() {
    let Fixture {
        server,
        client,
        _model,
    } = start(1, 64);
    let url = format!("{}/chat/completions", server.base_url());
    let body = request("hi", json!({"max_tokens": 500, "stream": true}));
    let mut response = client.post(&url).json(&body).send().await.unwrap();
    wait_for_first_text(&mut response).await;
    let shutdown = tokio::task::spawn_blocking(|| server.shutdown());
    let remaining = timeout(TIMEOUT, response.text()).await.unwrap().unwrap();
    assert!(remaining.ends_with("data: [DONE]\n\n"), "{remaining}");
    timeout(TIMEOUT, shutdown).await.unwrap().unwrap().unwrap();
    let error = client.post(&url).json(&body).send().await.unwrap_err();
    assert!(error.is_connect(), "{error}");
}
