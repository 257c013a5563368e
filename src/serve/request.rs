//! Parses and validates the body of a chat completion request.

use serde::Deserialize;

use super::error::ErrorResponse;
use super::fields::{MAX_TOP_LOGPROBS, RequestFields};
use crate::model::batcher::GenerateOptions;
use crate::prompt::message::Message;

/// A validated chat completion request.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub model: String,
    pub messages: Vec<Message>,
    /// `max_tokens` is `usize::MAX` if the request does not set it.
    pub options: GenerateOptions,
    /// Number of answers.
    pub n: usize,
    /// vLLM's `continue_final_message`: the answer continues the last message.
    pub continue_final: bool,
    /// See [`RequestFields::prompt_logprobs`].
    pub prompt_logprobs: Option<usize>,
    /// vLLM's `return_token_ids`: return the token ids of the prompt. A stream ignores it.
    pub prompt_ids: bool,
    pub stream: bool,
    /// Whether the stream ends with a chunk that contains the usage.
    pub include_usage: bool,
}

impl ChatRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// 400 that names the invalid field.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ErrorResponse> {
        let fields = RequestFields::parse(body)?;
        let stream = fields.get("stream")?.unwrap_or(false);
        let stream_options: Option<StreamOptions> = fields.get("stream_options")?;
        if stream_options.is_some() && !stream {
            let message = "`stream_options` requires `stream: true`";
            return Err(ErrorResponse::bad_field("stream_options", message));
        }
        Ok(Self {
            model: fields.require("model")?,
            messages: messages(&fields)?,
            options: GenerateOptions {
                max_tokens: max_tokens(&fields)?,
                sampling: fields.sampling()?,
                stop: fields.stop()?,
                top_logprobs: top_logprobs(&fields)?,
            },
            n: fields.n()?,
            continue_final: continue_final(&fields)?,
            prompt_logprobs: prompt_logprobs(&fields, stream)?,
            prompt_ids: fields.get("return_token_ids")?.unwrap_or(false),
            stream,
            include_usage: stream_options.is_some_and(|options| options.include_usage),
        })
    }
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// A message as clients send it.
#[derive(Deserialize)]
struct RequestMessage {
    role: String,
    content: Option<MessageContent>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of text parts")]
enum MessageContent {
    Text(String),
    Parts(Vec<TextPart>),
}

/// A text part. Parts of other types (images, audio) have no `text` and are rejected.
#[derive(Deserialize)]
struct TextPart {
    text: String,
}

fn messages(fields: &RequestFields) -> Result<Vec<Message>, ErrorResponse> {
    let messages: Vec<RequestMessage> = fields.require("messages")?;
    if messages.is_empty() {
        return Err(ErrorResponse::bad_field("messages", "`messages` is empty"));
    }
    Ok(messages
        .into_iter()
        .map(RequestMessage::into_message)
        .collect())
}

impl RequestMessage {
    fn into_message(self) -> Message {
        Message {
            // `developer` is OpenAI's newer name for `system`; chat templates use the old name.
            role: match self.role.as_str() {
                "developer" => "system".into(),
                _ => self.role,
            },
            content: match self.content {
                Some(MessageContent::Text(text)) => text,
                Some(MessageContent::Parts(parts)) => {
                    parts.into_iter().map(|part| part.text).collect()
                }
                None => String::new(),
            },
        }
    }
}

fn max_tokens(fields: &RequestFields) -> Result<usize, ErrorResponse> {
    // OpenAI renamed the field; clients send either name.
    let max_tokens = fields.at_least("max_tokens", 1)?;
    let max_completion_tokens = fields.at_least("max_completion_tokens", 1)?;
    Ok(max_completion_tokens.or(max_tokens).unwrap_or(usize::MAX))
}

/// Returns true if the answer continues the last message. Otherwise, it is a new message: vLLM's
/// `add_generation_prompt`, which is true by default.
fn continue_final(fields: &RequestFields) -> Result<bool, ErrorResponse> {
    let continue_final = fields.get("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.get("add_generation_prompt")?.unwrap_or(true);
    if continue_final == add_generation_prompt {
        let problem = if continue_final {
            "`continue_final_message` needs `add_generation_prompt` = false, whose default is true"
        } else {
            "set `continue_final_message` or `add_generation_prompt` (the default) to true"
        };
        return Err(ErrorResponse::bad_field("continue_final_message", problem));
    }
    Ok(continue_final)
}

fn prompt_logprobs(fields: &RequestFields, stream: bool) -> Result<Option<usize>, ErrorResponse> {
    let top_k = fields.prompt_logprobs()?;
    if top_k.is_some() && stream {
        let message = "`prompt_logprobs` is not supported with `stream: true`";
        return Err(ErrorResponse::bad_field("prompt_logprobs", message));
    }
    Ok(top_k)
}

/// Returns the number of most likely tokens to report with each token of the answer, or None for no logprobs.
fn top_logprobs(fields: &RequestFields) -> Result<Option<usize>, ErrorResponse> {
    let returns_logprobs = fields.get("logprobs")?.unwrap_or(false);
    let top_k = fields.in_range("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
    if returns_logprobs {
        return Ok(Some(top_k.unwrap_or(0)));
    }
    if top_k.is_some() {
        let message = "`top_logprobs` requires `logprobs: true`";
        return Err(ErrorResponse::bad_field("top_logprobs", message));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(extra: Value) -> Result<ChatRequest, ErrorResponse> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        let extra = extra.as_object().cloned().unwrap_or_default();
        body.as_object_mut().unwrap().extend(extra);
        ChatRequest::parse(body.to_string().as_bytes())
    }

    #[test]
    fn absent_and_null_fields_use_openai_defaults() {
        for extra in [
            json!({}),
            json!({"n": null, "temperature": null, "stop": null}),
        ] {
            let request = parse(extra).unwrap();
            assert_eq!(request.n, 1);
            assert_eq!(request.options.sampling.temperature, 1.0);
            assert_eq!(request.options.max_tokens, usize::MAX);
            assert!(!request.stream && request.options.stop.is_empty());
            assert_eq!(request.options.top_logprobs, None);
        }
    }

    #[test]
    fn content_accepts_string_or_text_parts() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let request = parse(json!({"messages": [
            {"role": "developer", "content": parts},
            {"role": "assistant", "content": null, "tool_calls": []},
        ]}))
        .unwrap();
        let turns: Vec<(&str, &str)> = request
            .messages
            .iter()
            .map(|message| (message.role.as_str(), message.content.as_str()))
            .collect();
        assert_eq!(turns, [("system", "ab"), ("assistant", "")]);
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let request = parse(json!({
            "user": "u", "tools": [], "max_tokens": 9, "max_completion_tokens": 5, "seed": -1,
            "stop": "x", "logprobs": true, "top_logprobs": 20, "n": 16,
        }))
        .unwrap();
        assert_eq!(request.options.max_tokens, 5);
        assert_eq!(request.options.sampling.seed, u64::MAX);
        assert_eq!(request.options.stop, ["x"]);
        assert_eq!(request.options.top_logprobs, Some(20));
        assert_eq!(request.n, 16);
    }

    #[test]
    fn invalid_field_is_named_in_the_error() {
        let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
        for (field, extra) in [
            ("model", json!({"model": null})),
            ("messages", json!({"messages": []})),
            (
                "messages",
                json!({"messages": [{"role": "user", "content": 3}]}),
            ),
            (
                "messages",
                json!({"messages": [{"role": "user", "content": image}]}),
            ),
            ("temperature", json!({"temperature": "hot"})),
            ("temperature", json!({"temperature": 2.1})),
            ("top_p", json!({"top_p": -0.1})),
            ("max_tokens", json!({"max_tokens": 0})),
            (
                "max_completion_tokens",
                json!({"max_completion_tokens": -3}),
            ),
            ("n", json!({"n": 0})),
            ("n", json!({"n": 17})),
            ("stop", json!({"stop": ["a", "b", "c", "d", "e"]})),
            ("stop", json!({"stop": 1})),
            ("seed", json!({"seed": 0.5})),
            ("top_logprobs", json!({"top_logprobs": 2})),
            (
                "top_logprobs",
                json!({"logprobs": true, "top_logprobs": 21}),
            ),
            (
                "stream_options",
                json!({"stream_options": {"include_usage": true}}),
            ),
        ] {
            let error = parse(extra.clone()).unwrap_err().body();
            assert_eq!(error["error"]["param"], field, "{extra}: {error}");
        }
    }
}
