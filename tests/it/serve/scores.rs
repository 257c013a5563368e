//! Logprobs of the prompt: `echo` and `prompt_logprobs`.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{CONTEXT, request, start};

/// Returns a JSON list of numbers, with None for null.
fn floats(list: &Value) -> Vec<Option<f64>> {
    list.as_array().unwrap().iter().map(Value::as_f64).collect()
}

fn is_close(a: &[Option<f64>], b: &[Option<f64>]) -> bool {
    let is_same = |(a, b): (&Option<f64>, &Option<f64>)| match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() < 1e-4,
        (a, b) => a == b,
    };
    a.len() == b.len() && a.iter().zip(b).all(is_same)
}

/// Returns the ids N of tokens named `token_id:N`.
fn ids(tokens: &Value) -> Vec<u32> {
    let id = |token: &Value| {
        let name = token.as_str().unwrap();
        name.strip_prefix("token_id:").unwrap().parse().unwrap()
    };
    tokens.as_array().unwrap().iter().map(id).collect()
}

#[tokio::test]
async fn scores_of_generated_text_match_generation() {
    let fixture = start(4, 64);
    let body = json!({
        "model": "tiny", "prompt": "the inn", "max_tokens": 30, "temperature": 1, "seed": 4, "echo": true,
        "logprobs": 5, "return_tokens_as_token_ids": true,
    });
    let generated = fixture.ask_at("/completions", &body).await;
    assert!(generated["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(generated["object"], "text_completion");
    let choice = &generated["choices"][0];
    let ids = ids(&choice["logprobs"]["tokens"]);
    let prompt = generated["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert!(ids.len() > prompt + 10 && prompt > 2);
    assert!(choice["text"].as_str().unwrap().starts_with("the inn"));

    // As a prompt, the same tokens are scored in one forward pass instead of one pass per token.
    let body =
        json!({"model": "tiny", "prompt": ids, "max_tokens": 0, "echo": true, "logprobs": 5});
    let scored = fixture.ask_at("/completions", &body).await;
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    assert_eq!(scored["choices"][0]["finish_reason"], "length");
    let generated_logprobs = &choice["logprobs"];
    let scored_logprobs = &scored["choices"][0]["logprobs"];
    let logprobs = floats(&scored_logprobs["token_logprobs"]);
    assert_eq!(logprobs[0], None);
    assert!(
        logprobs[1..]
            .iter()
            .all(|logprob| logprob.is_some_and(|l| l <= 0.0))
    );
    assert!(is_close(
        &logprobs,
        &floats(&generated_logprobs["token_logprobs"])
    ));
    for (position, top) in scored_logprobs["top_logprobs"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
    {
        let top: Vec<f64> = match top.as_object() {
            Some(top) => top
                .values()
                .map(|logprob| logprob.as_f64().unwrap())
                .collect(),
            None => Vec::new(),
        };
        assert!(top.len() <= 5 && top.is_sorted_by(|a, b| a >= b));
        assert_eq!(top.is_empty(), position == 0);
    }
}

#[tokio::test]
async fn echo_and_prompt_logprobs_agree() {
    let fixture = start(4, 64);
    let body = json!({
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the inn, é"}],
        "max_tokens": 1, "prompt_logprobs": 4, "continue_final_message": true, "add_generation_prompt": false,
        "return_token_ids": true,
    });
    let answer = fixture.ask(&request("", body)).await;
    let positions = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(positions[0], Value::Null);
    let mut logprobs = vec![None];
    let mut ids = Vec::new();
    for position in &positions[1..] {
        // The first entry is the token of the prompt. It is listed in addition to the four most likely tokens if it is
        // not one of them.
        let entries: Vec<(&String, &Value)> = position.as_object().unwrap().iter().collect();
        let (id, entry) = entries[0];
        assert_eq!(entries.len(), if entry["rank"].is_null() { 5 } else { 4 });
        ids.push(id.parse::<u32>().unwrap());
        logprobs.push(entry["logprob"].as_f64());
    }
    let decoded_token = |position: &Value| {
        let entry = position.as_object().unwrap().values().next().unwrap();
        entry["decoded_token"].as_str().unwrap().to_owned()
    };
    // The prompt ends with the message to continue.
    let last_tokens: Vec<String> = positions[positions.len() - 6..]
        .iter()
        .map(decoded_token)
        .collect();
    assert_eq!(last_tokens.concat(), " inn, é");

    // The id of <|im_start|>, after 256 bytes, 6 merges and <|endoftext|>.
    let im_start = 256 + 6 + 1;
    let prompt: Vec<u32> = [im_start].into_iter().chain(ids).collect();
    assert_eq!(answer["prompt_token_ids"], json!(prompt));
    let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 0,
        "prompt_logprobs": 2});
    let scored = fixture.ask_at("/completions", &body).await;
    let scored = &scored["choices"][0];
    assert!(is_close(
        &logprobs,
        &floats(&scored["logprobs"]["token_logprobs"])
    ));
    assert_eq!(
        scored["prompt_logprobs"].as_array().unwrap().len(),
        prompt.len()
    );
}

#[tokio::test]
async fn multiple_prompts_get_n_answers_each() {
    let fixture = start(4, 64);
    let body = json!({"model": "tiny", "prompt": ["the", "inn"], "n": 2, "max_tokens": 5, "seed": 1,
        "temperature": 1, "echo": true, "logprobs": 1});
    let answer = fixture.ask_at("/completions", &body).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (choice, prompt) in choices.iter().zip(["the", "the", "inn", "inn"]) {
        assert!(choice["text"].as_str().unwrap().starts_with(prompt));
    }
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    for choice in choices {
        let offsets = floats(&choice["logprobs"]["text_offset"]);
        // A token that continues a character has the offset of the character.
        assert!(offsets.is_sorted());
    }
}

#[tokio::test]
async fn invalid_scoring_request_names_the_field() {
    let fixture = start(4, 64);
    let long = vec![7; CONTEXT + 1];
    for (field, body) in [
        ("prompt", json!({})),
        ("prompt", json!({"prompt": []})),
        ("prompt", json!({"prompt": ""})),
        ("prompt", json!({"prompt": [5, "a"]})),
        ("prompt", json!({"prompt": [5, 271]})),
        (
            "prompt",
            json!({"prompt": long, "echo": true, "max_tokens": 0}),
        ),
        ("prompt", json!({"prompt": vec![7; CONTEXT]})),
        ("max_tokens", json!({"prompt": "a", "max_tokens": 0})),
        ("logprobs", json!({"prompt": "a", "logprobs": true})),
        (
            "prompt_logprobs",
            json!({"prompt": "a", "prompt_logprobs": 21}),
        ),
        ("stream", json!({"prompt": "a", "stream": true})),
    ] {
        let mut body = body;
        body["model"] = "tiny".into();
        let response = fixture.send_to("/completions", &body).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{body}");
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["param"], field, "{error}");
    }
    // A text that fills the context can be scored, because no token is generated.
    let full = json!({"model": "tiny", "prompt": vec![7; CONTEXT], "echo": true, "max_tokens": 0, "logprobs": 0});
    fixture.ask_at("/completions", &full).await;
    for (field, extra) in [
        (
            "continue_final_message",
            json!({"continue_final_message": true}),
        ),
        (
            "continue_final_message",
            json!({"add_generation_prompt": false}),
        ),
        (
            "messages",
            json!({"continue_final_message": true, "add_generation_prompt": false}),
        ),
        (
            "prompt_logprobs",
            json!({"prompt_logprobs": 1, "stream": true}),
        ),
    ] {
        let response = fixture.send(&request("hi", extra)).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["param"], field, "{error}");
    }
}
