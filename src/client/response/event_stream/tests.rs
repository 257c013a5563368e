use crate::client::response::event_stream::*;
use serde_json::json;

fn stream(chunks: &[Value], end: &str) -> Value {
    let mut text = String::from(": keep-alive\n\n");
    for chunk in chunks {
        text.push_str(&format!("data: {chunk}\n\n"));
    }
    joined(format!("{text}{end}").as_bytes()).unwrap().unwrap()
}

#[test]
fn chunks_are_joined_into_one_body() {
    let chunk = |delta: Value, logprobs: Value, finish: Value| json!({"id": "x", "model": "m", "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]});
    let token =
        |text: &str| json!({"content": [{"token": text, "logprob": -1.0}], "refusal": null});
    let call = |id: Value, arguments: &str| json!({"tool_calls": [{"index": 0, "id": id, "function": {"arguments": arguments}}]});
    let chunks = [
        chunk(
            json!({"role": "assistant", "content": ""}),
            Value::Null,
            Value::Null,
        ),
        chunk(json!({"content": "Hel"}), token("Hel"), Value::Null),
        chunk(json!({"reasoning_content": "hm"}), Value::Null, Value::Null),
        json!({"choices": [{"index": 1, "delta": {"content": "another"}}]}),
        chunk(call(json!("c1"), "{\"a\""), Value::Null, Value::Null),
        chunk(call(json!("c1"), ":1}"), Value::Null, Value::Null),
        chunk(
            json!({"role": "assistant", "content": "lo"}),
            token("lo"),
            Value::Null,
        ),
        chunk(json!({}), Value::Null, json!("stop")),
        json!({"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
    ];
    for (end, separator) in [
        ("data: [DONE]\n\n", "\n"),
        ("", "\n"),
        ("data: [DONE]", "\r\n"),
    ] {
        let text: String = chunks
            .iter()
            .map(|chunk| format!("event: chunk{separator}data: {chunk}{separator}{separator}"))
            .collect();
        let body = joined(format!("{text}{end}").as_bytes()).unwrap().unwrap();
        let choice = &body["choices"][0];
        assert_eq!(
            choice["message"],
            json!({
                "role": "assistant", "content": "Hello", "reasoning_content": "hm",
                "tool_calls": [{"index": 0, "id": "c1", "function": {"arguments": "{\"a\":1}"}}],
            })
        );
        assert_eq!(choice["finish_reason"], "stop");
        let tokens: Vec<_> = choice["logprobs"]["content"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| &t["token"])
            .collect();
        assert_eq!(tokens, ["Hel", "lo"]);
        assert_eq!(
            (&body["model"], &body["usage"]["prompt_tokens"]),
            (&json!("m"), &json!(3))
        );
        assert_eq!(body["choices"][1]["message"]["content"], "another");
    }
}

#[test]
fn keep_alive_events_are_skipped() {
    let chunk = |text: &str, finish: Value| json!({"choices": [{"delta": {"content": text}, "finish_reason": finish}]});
    let first = chunk("Hel", Value::Null);
    let last = chunk("lo", json!("stop"));
    let several_lines = serde_json::to_string_pretty(&last).unwrap();
    let several_lines = several_lines.replace('\n', "\r\ndata: ");
    let bodies = [
        format!("data: ping\n\ndata: null\n\ndata: {first}\n\ndata: {last}\n\n"),
        format!("data: {first}\n\ndata: {last}\n\nevent: error\ndata: overloaded\n\n"),
        format!("data: {first}\r\n\r\ndata: {several_lines}\r\n\r\ndata: [DONE]\r\n\r\n"),
        format!("data: {first}\r\rdata: {last}\r\r"),
        format!("{first}\n{last}\n"),
        format!("{first}{last}[DONE]"),
        format!("[{first}, {last}]"),
        format!("\u{1e}{first}\n\u{1e}{last}\n"),
    ];
    for body in bodies {
        let joined = joined(body.as_bytes())
            .unwrap()
            .unwrap_or_else(|e| panic!("{body}: {e}"));
        assert_eq!(
            joined["choices"][0]["message"]["content"], "Hello",
            "{body}"
        );
    }
    // A delta that cannot be parsed is an error.
    let broken = format!("{first}\n{{\"choices\": x\n{last}");
    assert!(joined(broken.as_bytes()).unwrap().is_err());
    let cut = format!("{first}\n{first}\n");
    assert_eq!(joined(cut.as_bytes()), Some(Err(JsonProblem::CutOff)));
}

#[test]
fn partial_text_is_not_an_answer_if_an_error_follows_or_a_chunk_is_missing() {
    let chunk = |text: &str, finish: Value| json!({"choices": [{"delta": {"content": text}, "finish_reason": finish}]});
    let first = chunk("hel", Value::Null);
    let last = chunk("lo", json!("stop"));
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}});
    let done = "data: [DONE]\n\n";
    let errors = [
        format!("data: {first}\n\ndata: {{\"error\":{{\"message\":\"m\"}}}}\n\n{done}"),
        format!("data: {first}\n\ndata: {{\"error\":\"m\"}}\n\n{done}"),
        format!(
            "data: {first}\n\ndata: {{\"object\":\"error\",\"message\":\"m\",\"code\":500}}\n\n{done}"
        ),
        format!("data: {first}\n\nevent: error\ndata: m\n\n{done}"),
    ];
    for body in errors {
        let joined = joined(body.as_bytes()).unwrap().unwrap();
        assert_eq!(joined.get("choices"), None, "{body}");
    }
    for body in [
        format!("data: {usage}\n\ndata: {first}\n\n"),
        format!("data: {first}\n\ndata: {usage}\n\ndata: {first}\n\n"),
        // A delta is missing.
        format!("data: {first}\n\ndata: {{\"id\":\"x\",\"obj\n\ndata: {last}\n\n{done}"),
    ] {
        assert!(joined(body.as_bytes()).unwrap().is_err(), "{body}");
    }
}

#[test]
fn complete_answer_in_one_event_is_returned() {
    let answer =
        json!({"choices": [{"message": {"content": "hi"}}], "usage": {"prompt_tokens": 1}});
    assert_eq!(stream(std::slice::from_ref(&answer), ""), answer);
    let lines = format!("data: {answer}\ndata: [DONE]\n");
    assert_eq!(joined(lines.as_bytes()).unwrap().unwrap(), answer);
}

#[test]
fn broken_stream_is_cut_off_and_its_error_is_returned() {
    let chunk = json!({"choices": [{"delta": {"content": "hel"}}]});
    let cut = format!("data: {chunk}\n\n");
    assert_eq!(joined(cut.as_bytes()), Some(Err(JsonProblem::CutOff)));
    assert_eq!(joined(b": wait\n\n"), Some(Err(JsonProblem::CutOff)));
    let body = stream(
        &[chunk.clone(), json!({"error": {"message": "overloaded"}})],
        "",
    );
    assert_eq!(body["error"]["message"], "overloaded");
    // An end marker completes a stream without a finish reason.
    assert_eq!(
        stream(&[chunk], "data: [DONE]\n\n")["choices"][0]["message"]["content"],
        "hel"
    );
    // The usage of the stream completes it, too.
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}});
    let chunk = json!({"choices": [{"delta": {"content": "hel"}}]});
    assert_eq!(
        stream(&[chunk.clone(), usage], "")["choices"][0]["message"]["content"],
        "hel"
    );
    let done = format!("data: {chunk}\n\ndata: DONE\n\n");
    assert!(joined(done.as_bytes()).unwrap().is_ok());
    assert_eq!(joined(b"{\"a\":1}"), None);
    assert!(joined(b"data: hello\n\n").unwrap().is_err());
}

#[test]
fn error_event_without_a_preceding_blank_line_keeps_the_chunk() {
    let chunk = json!({"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]});
    let text = format!("data: {chunk}\nevent: error\ndata: late\n\n");
    let body = joined(text.as_bytes()).unwrap().unwrap();
    assert_eq!(body["choices"][0]["message"]["content"], "hi");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
}

#[test]
fn event_with_a_list_of_chunks_is_joined() {
    let chunk = |text: &str, finish: Value| json!({"choices": [{"delta": {"content": text}, "finish_reason": finish}]});
    let first = json!([chunk("Hel", Value::Null), chunk("lo", json!("stop"))]);
    let last = json!([{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}]);
    let body = stream(&[first, last], "data: [DONE]\n\n");
    assert_eq!(body["choices"][0]["message"]["content"], "Hello");
    assert_eq!(body["usage"]["completion_tokens"], 2);
}
