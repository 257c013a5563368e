use crate::client::score_text::*;
use crate::config::{SamplingConfig, TeacherConfig};

fn endpoint() -> EndpointConfig {
    EndpointConfig {
        teacher: TeacherConfig {
            model: "m".into(),
            ..TeacherConfig::default()
        },
        sampling: SamplingConfig {
            top_logprobs: 2,
            ..SamplingConfig::default()
        },
        limits: Default::default(),
        price: Default::default(),
    }
}

fn messages(answer: &str) -> Vec<Message> {
    let message = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    vec![message("user", "hi"), message("assistant", answer)]
}

fn read(reply: Value, answer: &str) -> Result<Completion, NoAnswer> {
    let scoring = ScoringMethod::PromptLogprobs(None);
    let messages = messages(answer);
    let body = scoring.body(&endpoint(), &messages);
    scoring.parse_reply(reply.to_string().as_bytes(), &body, &messages)
}

/// vLLM's reply to a conversation whose template ends with `<|im_start|>assistant\n` before the answer " a cat".
/// With `own_first`, each position lists the prompt's own token first, as newer versions do.
fn reply(own_first: bool) -> Value {
    let token = |logprob: f64, rank: u32, text: &str| json!({"logprob": logprob, "rank": rank, "decoded_token": text});
    let a = token(-1.5, 2, " a");
    let the = token(-0.5, 1, " the");
    let cat = token(-4.0, 9, " cat");
    let dog = token(-0.25, 1, " dog");
    let cow = token(-2.0, 2, " cow");
    let [second, third] = if own_first {
        [
            json!({"11": a, "12": the}),
            json!({"21": cat, "22": dog, "23": cow}),
        ]
    } else {
        [
            json!({"12": the, "11": a}),
            json!({"22": dog, "23": cow, "21": cat}),
        ]
    };
    json!({
        "id": "chatcmpl-1", "model": "m-1", "usage": {"prompt_tokens": 4, "completion_tokens": 1},
        "choices": [{"index": 0, "message": {"role": "assistant", "content": " x"}}],
        "prompt_logprobs": [null, {"7": token(-9999.0, 5, "\n")}, second, third],
    })
}

#[test]
fn prompt_logprobs_of_the_final_tokens_become_the_answer() {
    let completion = read(reply(true), " a cat").unwrap();
    let answer = &completion.answer;
    assert_eq!(
        (answer.text.as_str(), answer.finish_reason.as_str()),
        (" a cat", "stop")
    );
    assert_eq!(completion.usage.unwrap().prompt_tokens, 4);
    let logprobs = completion.logprobs.unwrap();
    assert_eq!(logprobs.token, [" a", " cat"]);
    assert_eq!(logprobs.logprob, [Some(-1.5), Some(-4.0)]);
    assert_eq!(logprobs.top[0], [" the", " a"]);
    assert_eq!(logprobs.top[1], [" dog", " cow", " cat"]);
    let best = &logprobs.top_logprob[1];
    assert_eq!(best, &[Some(-0.25), Some(-2.0), Some(-4.0)]);
}

#[test]
fn reported_token_ids_make_the_order_of_a_position_irrelevant() {
    let unordered = reply(false);
    assert!(
        read(unordered.clone(), " a cat")
            .unwrap()
            .logprobs
            .is_none()
    );
    let mut with_ids = unordered;
    with_ids["prompt_token_ids"] = json!([5, 7, 11, 21]);
    let ordered = read(reply(true), " a cat").unwrap().logprobs;
    assert_eq!(read(with_ids.clone(), " a cat").unwrap().logprobs, ordered);
    with_ids["prompt_token_ids"] = json!([5, 7, 21, 11]);
    assert!(read(with_ids, " a cat").unwrap().logprobs.is_none());
}

#[test]
fn logprobs_that_do_not_spell_the_answer_are_dropped_with_a_reason() {
    for answer in ["n cat", " a dog", "\n a cat", "long before \n a cat"] {
        let completion = read(reply(true), answer).unwrap();
        let is_spelled = answer == "\n a cat";
        assert_eq!(completion.logprobs.is_some(), is_spelled, "{answer:?}");
        assert_eq!(completion.logprobs_fault.is_none(), is_spelled);
    }
}

#[test]
fn template_white_space_before_the_answer_is_excluded() {
    let logprobs = read(reply(true), "a cat").unwrap().logprobs.unwrap();
    assert_eq!(logprobs.token, ["a", " cat"]);
    assert_eq!(logprobs.top[0], ["the", "a"]);
    let cat = read(reply(true), "cat").unwrap().logprobs.unwrap();
    assert_eq!(cat.token, ["cat"]);
    assert_eq!(cat.top[0], ["dog", "cow", "cat"]);
}

#[test]
fn reply_without_prompt_logprobs_is_an_error() {
    let mut plain = reply(true);
    plain.as_object_mut().unwrap().remove("prompt_logprobs");
    let Err(NoAnswer::Error(error)) = read(plain, " a cat") else {
        panic!("expected an error");
    };
    assert_eq!(error.status, Some(400));
    assert!(error.message.contains("prompt_logprobs"), "{error:?}");
    let error = json!({"error": {"message": "prompt_logprobs is too large", "code": 400}});
    assert!(matches!(read(error, ""), Err(NoAnswer::Error(_))));
    let scoring = ScoringMethod::PromptLogprobs(None);
    let cut_off = scoring.parse_reply(b"{\"choices\":[", &Value::Null, &[]);
    assert!(matches!(cut_off, Err(NoAnswer::Malformed(_))));
    let empty = read(json!({"choices": []}), "");
    assert!(matches!(empty, Err(NoAnswer::Malformed(_))));
}

/// The echo names tokens by text or id and ends with the generated token; a token added in front is rejected.
#[test]
fn echo_is_parsed_by_text_and_by_id_and_shifted_positions_are_rejected() {
    let folder = std::path::Path::new("tests/it/golden/tokenizers/bytelevel");
    let tokenizer = Tokenizer::load(folder).unwrap();
    let scoring = ScoringMethod::Echo(tokenizer);
    let answer = "Grüße 👋";
    let messages = messages(answer);
    let body = scoring.body(&endpoint(), &messages);
    let ids: Vec<u32> = serde_json::from_value(body["prompt"].clone()).unwrap();
    assert_eq!(
        (&body["max_tokens"], &body["echo"]),
        (&json!(1), &json!(true))
    );
    let tokenizer = scoring.tokenizer().unwrap();
    let text = |id: &u32| {
        let bytes = tokenizer.token_bytes(*id).map(String::from_utf8_lossy);
        bytes.map_or(tokenizer.token_name(*id), Cow::into_owned)
    };
    let as_id = |id: &u32| format!("token_id:{id}");
    let reply = |names: Vec<String>| {
        let logprobs: Vec<Value> = (0..names.len()).map(|at| json!(-0.5 * at as f64)).collect();
        let top: Vec<Value> = names.iter().map(|name| json!({name: -0.25})).collect();
        let logprobs = json!({"tokens": names, "token_logprobs": logprobs, "top_logprobs": top});
        let reply = json!({"choices": [{"text": "", "logprobs": logprobs}]}).to_string();
        scoring
            .parse_reply(reply.as_bytes(), &body, &messages)
            .unwrap()
            .logprobs
    };
    let tokens_named_by = |name: &dyn Fn(&u32) -> String| -> Vec<String> {
        ids.iter().chain([&7]).map(name).collect()
    };
    let by_ids = reply(tokens_named_by(&as_id)).unwrap();
    let by_texts = reply(tokens_named_by(&text)).unwrap();
    assert!(by_ids.matches_text && by_texts.matches_text);
    assert_eq!(by_ids.token, by_texts.token);
    let first = ids.len() - by_ids.token.len();
    assert_eq!(by_ids.logprob[0], Some(-0.5 * first as f32));
    for name in [&as_id as &dyn Fn(&u32) -> String, &text] {
        let mut shifted = tokens_named_by(name);
        shifted.insert(0, "<s>".into());
        assert_eq!(reply(shifted), None);
    }
}

#[test]
fn body_requests_one_token_and_prompt_logprobs() {
    let scoring = ScoringMethod::PromptLogprobs(None);
    assert_eq!(
        scoring.body(&endpoint(), &messages("yes")).to_string(),
        r#"{"model":"m","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"}],"max_completion_tokens":1,"prompt_logprobs":2,"add_generation_prompt":false,"continue_final_message":true,"return_token_ids":true}"#
    );
}
