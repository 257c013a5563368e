//! Error responses.

use serde_json::{Value, json};

use super::{CONTEXT, request, start};

#[tokio::test]
async fn validation_errors_have_openai_format() {
    let fixture = start(4, 64);
    let long = "a".repeat(CONTEXT);
    for (status, code, param, body) in [
        (
            404,
            json!("model_not_found"),
            json!("model"),
            request("", json!({"model": "gpt-4"})),
        ),
        (
            400,
            json!("context_length_exceeded"),
            json!("messages"),
            request(&long, json!({})),
        ),
        (
            400,
            Value::Null,
            json!("temperature"),
            request("", json!({"temperature": "hot"})),
        ),
        (
            400,
            Value::Null,
            json!("top_logprobs"),
            request("", json!({"top_logprobs": 1})),
        ),
        (
            400,
            Value::Null,
            json!("messages"),
            json!({"model": "tiny"}),
        ),
        (400, Value::Null, Value::Null, json!("not an object")),
    ] {
        let response = fixture.send(&body).await;
        assert_eq!(response.status(), status, "{code} {param}");
        let answer: Value = response.json().await.unwrap();
        assert_eq!(answer["error"]["code"], code, "{answer}");
        assert_eq!(answer["error"]["param"], param, "{answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
        assert!(answer["error"]["message"].is_string());
    }
}

#[tokio::test]
async fn more_answers_than_the_queue_holds_are_a_bad_request() {
    let fixture = start(1, 2);
    let three_answers = request("hi", json!({"n": 3}));
    let three_prompts = json!({"model": "tiny", "prompt": ["a", "b", "c"], "max_tokens": 1});
    let three_scores = json!({"model": "tiny", "prompt": ["a", "b", "c"], "max_tokens": 0, "echo": true,
        "logprobs": 1});
    for (path, body) in [
        ("/chat/completions", three_answers),
        ("/completions", three_prompts),
        ("/completions", three_scores),
    ] {
        let response = fixture.send_to(path, &body).await;
        assert_eq!(response.status(), 400);
        let answer: Value = response.json().await.unwrap();
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("`--queue`"), "{message}");
    }
}

#[tokio::test]
async fn http_errors_have_openai_format() {
    let fixture = start(4, 64);
    let client = &fixture.client;
    let chat = fixture.url("/chat/completions");
    for (status, request) in [
        (400, client.post(&chat).body("{\"model\": ")),
        (413, client.post(&chat).body(vec![b' '; (16 << 20) + 1])),
        (405, client.get(&chat)),
        (404, client.post(fixture.url("/embeddings")).body("{}")),
    ] {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status);
        let answer: Value = response.json().await.unwrap();
        assert!(answer["error"]["message"].is_string(), "{answer}");
    }
}
