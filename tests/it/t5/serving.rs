//! The OpenAI API over an encoder-decoder.

use distill::serve::{self, ServeOptions, Server};
use reqwest::Client;
use serde_json::{Value, json};

use super::write_model;

struct Fixture {
    server: Server,
    _model: tempfile::TempDir,
}

impl Fixture {
    fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let model = tempfile::tempdir().unwrap();
        write_model(model.path(), 9);
        let options = ServeOptions {
            port: 0,
            model_name: Some("t5".into()),
            ..ServeOptions::default()
        };
        Self {
            server: serve::start(model.path(), options).unwrap(),
            _model: model,
        }
    }

    fn post(&self, path: &str, body: &Value) -> (u16, String) {
        let url = format!("{}{path}", self.server.base_url());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let response = Client::new().post(url).json(body).send().await.unwrap();
            (response.status().as_u16(), response.text().await.unwrap())
        })
    }

    fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, text) = self.post(path, body);
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }
}

fn chat(content: &str) -> Value {
    json!({"model": "t5", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 1.0})
}

/// The bytes of the logprobs spell the text, also at the first token, whose space is not part of the answer.
#[test]
fn logprobs_spell_the_answer_and_include_its_end() {
    let fixture = Fixture::start();
    for seed in 0..20 {
        let mut body = chat("the red cat");
        body["logprobs"] = true.into();
        body["top_logprobs"] = 20.into();
        body["seed"] = seed.into();
        let answer = fixture.ask("/chat/completions", &body);
        let choice = &answer["choices"][0];
        let positions = choice["logprobs"]["content"].as_array().unwrap();
        let bytes: Vec<u8> = positions
            .iter()
            .flat_map(|position| position["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap() as u8)
            .collect();
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            choice["message"]["content"]
        );
        assert!(
            positions
                .iter()
                .all(|p| p["top_logprobs"].as_array().unwrap().len() == 20)
        );
        let completion_tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
        assert_eq!(completion_tokens, positions.len() as u64);
        // Three words and the end of the source.
        assert_eq!(answer["usage"]["prompt_tokens"], 4);
        if choice["finish_reason"] == "stop" {
            assert_eq!(positions.last().unwrap()["token"], "</s>");
        }
    }
}

#[test]
fn several_answers_streams_and_stop_strings_agree() {
    let fixture = Fixture::start();
    let mut body = chat("question one");
    body["seed"] = 4.into();
    let single = fixture.ask("/chat/completions", &body);
    let text = single["choices"][0]["message"]["content"]
        .as_str()
        .unwrap()
        .to_owned();
    body["n"] = 3.into();
    let several = fixture.ask("/chat/completions", &body);
    assert_eq!(several["choices"][0]["message"]["content"], text);
    assert_eq!(several["choices"].as_array().unwrap().len(), 3);
    body["n"] = 1.into();
    body["stream"] = true.into();
    let (_, events) = fixture.post("/chat/completions", &body);
    let streamed: String = events
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
        .filter_map(|event| Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert_eq!(streamed, text);
    body["stream"] = false.into();
    let stop: String = text.chars().skip(2).take(2).collect();
    body["stop"] = stop.clone().into();
    let stopped = fixture.ask("/chat/completions", &body);
    let before = text.find(&stop).unwrap();
    assert_eq!(stopped["choices"][0]["message"]["content"], text[..before]);
}

/// A text prompt is a source: it gets the end token, and the answer does not continue it.
#[test]
fn text_prompt_is_a_source() {
    let fixture = Fixture::start();
    let body = json!({"model": "t5", "prompt": "the red cat", "max_tokens": 8, "temperature": 0, "logprobs": 2});
    let text = fixture.ask("/completions", &body);
    let mut body = chat("the red cat");
    body["temperature"] = 0.into();
    let answer = fixture.ask("/chat/completions", &body);
    assert_eq!(
        text["choices"][0]["text"],
        answer["choices"][0]["message"]["content"]
    );
    assert_eq!(text["usage"]["prompt_tokens"], 4);
}

#[test]
fn requests_that_need_logprobs_of_the_prompt_are_refused() {
    let fixture = Fixture::start();
    let mut prompt_logprobs = chat("the");
    prompt_logprobs["prompt_logprobs"] = 1.into();
    let mut continued = chat("the");
    continued["messages"] = json!([
        {"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"},
    ]);
    continued["continue_final_message"] = true.into();
    continued["add_generation_prompt"] = false.into();
    let echo = json!({"model": "t5", "prompt": "the", "echo": true, "max_tokens": 1});
    for (path, body, expected) in [
        (
            "/chat/completions",
            prompt_logprobs,
            "without predicting it",
        ),
        ("/chat/completions", continued, "cannot continue an answer"),
        ("/completions", echo, "without predicting it"),
    ] {
        let (status, text) = fixture.post(path, &body);
        assert_eq!(status, 400, "{text}");
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn source_longer_than_the_context_is_refused() {
    let fixture = Fixture::start();
    let (status, text) = fixture.post("/chat/completions", &chat(&"cat ".repeat(9000)));
    assert_eq!(status, 400, "{text}");
    assert!(text.contains("context_length_exceeded"), "{text}");
}
