//! Parses and validates chat completion requests. Pure.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::mock::limits::TokenCost;
use crate::mock::response::MockReply;
use crate::mock::script::Script;
use crate::mock::script::answers::AcceptedMaxTokens;

/// Output tokens that the limits assume for a request without `max_tokens`.
const DEFAULT_OUTPUT_TOKENS: u64 = 16;

/// Maximum of `n`, as in OpenAI's API.
const MAX_CHOICES: u64 = 128;

/// A valid chat completion request.
#[derive(Debug)]
pub(crate) struct ParsedChat<'a> {
    pub model: Cow<'a, str>,
    /// Text of the last message.
    pub prompt: Cow<'a, str>,
    pub prompt_tokens: u64,
    pub max_tokens: Option<u64>,
    /// Number of answers.
    pub n: u64,
    pub temperature: f64,
    /// Number of alternatives for each token, if logprobs are requested.
    pub top_logprobs: Option<usize>,
}

/// The request fields that the mock reads. Other fields are ignored.
#[derive(Deserialize)]
struct ChatBody<'a> {
    #[serde(borrow)]
    model: Cow<'a, str>,
    #[serde(borrow)]
    messages: Vec<ChatMessage<'a>>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    n: Option<u64>,
    temperature: Option<f64>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    stream: Option<bool>,
}

/// A message. Its content stays raw, because only the content of the last message is decoded.
#[derive(Deserialize)]
struct ChatMessage<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct PlainText<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
struct MessagePart<'a> {
    #[serde(borrow, default)]
    text: Cow<'a, str>,
}

impl<'a> ParsedChat<'a> {
    /// Parses a request body.
    ///
    /// # Errors
    /// The reply that rejects the request: a 400, or a 404 for an unknown model.
    pub(crate) fn parse(body: &'a [u8], script: &Script) -> Result<ParsedChat<'a>, MockReply> {
        let fields: ChatBody<'a> = serde_json::from_slice(body).map_err(|error| {
            let message = format!("We could not parse the JSON body of your request: {error}");
            MockReply::error(400, &message, Value::Null)
        })?;
        check_model(&fields.model, script)?;
        check_parameters(body, &fields, script)?;
        let prompt = last_text(&fields.messages)?;
        let chat = ParsedChat {
            prompt,
            prompt_tokens: fields.messages.iter().map(ChatMessage::tokens).sum(),
            max_tokens: fields.max_completion_tokens.or(fields.max_tokens),
            n: fields.n.unwrap_or(1),
            temperature: fields.temperature.unwrap_or(1.0),
            top_logprobs: (fields.logprobs == Some(true))
                .then_some(fields.top_logprobs.unwrap_or_default()),
            model: fields.model,
        };
        chat.check_context(script)?;
        Ok(chat)
    }

    /// Returns the tokens that the limits charge before the answer exists.
    pub(crate) fn cost(&self) -> TokenCost {
        let output_tokens = self.max_tokens.unwrap_or(DEFAULT_OUTPUT_TOKENS);
        TokenCost {
            prompt_tokens: self.prompt_tokens,
            output_tokens: output_tokens.saturating_mul(self.n),
        }
    }

    fn check_context(&self, script: &Script) -> Result<(), MockReply> {
        let max_tokens = self.max_tokens.unwrap_or_default();
        let requested = self.prompt_tokens.saturating_add(max_tokens);
        match script.answers.context_tokens {
            Some(context) if requested > context => {
                let message = format!(
                    "This model's maximum context length is {context} tokens. However, you \
                     requested {requested} tokens. Please reduce the length of the messages."
                );
                Err(MockReply::bad_field(
                    "messages",
                    &message,
                    "context_length_exceeded",
                ))
            }
            _ => Ok(()),
        }
    }
}

impl ChatMessage<'_> {
    /// Estimates the tokens of a message: one per four bytes of the content's JSON, plus four for the role.
    fn tokens(&self) -> u64 {
        let bytes = self.content.map_or(0, |content| content.get().len());
        4 + (bytes as u64).div_ceil(4)
    }
}

fn check_model(model: &str, script: &Script) -> Result<(), MockReply> {
    if script.model == "*" || script.model == model {
        return Ok(());
    }
    let message = format!("The model `{model}` does not exist or you do not have access to it.");
    Err(MockReply::error(404, &message, "model_not_found"))
}

fn check_parameters(raw: &[u8], body: &ChatBody, script: &Script) -> Result<(), MockReply> {
    let answers = &script.answers;
    if !answers.refuse_parameters.is_empty() {
        let fields: Map<String, Value> = serde_json::from_slice(raw).unwrap_or_default();
        let is_set = |name: &&String| fields.get(*name).is_some_and(|value| !value.is_null());
        if let Some(name) = answers.refuse_parameters.iter().find(is_set) {
            return Err(unsupported(name, ""));
        }
    }
    match answers.max_tokens_field {
        AcceptedMaxTokens::MaxTokens if body.max_completion_tokens.is_some() => {
            return Err(unsupported("max_completion_tokens", "max_tokens"));
        }
        AcceptedMaxTokens::MaxCompletionTokens if body.max_tokens.is_some() => {
            return Err(unsupported("max_tokens", "max_completion_tokens"));
        }
        _ => {}
    }
    if body.stream == Some(true) {
        return Err(unsupported("stream", ""));
    }
    let max_top_logprobs = answers.top_logprobs;
    match body.top_logprobs {
        Some(_) if body.logprobs != Some(true) => Err(MockReply::bad_field(
            "top_logprobs",
            "The 'logprobs' parameter must be true if 'top_logprobs' is set.",
            Value::Null,
        )),
        Some(top_logprobs) if top_logprobs > max_top_logprobs => {
            let message = format!(
                "Invalid value for 'top_logprobs': must be less than or equal to {max_top_logprobs}."
            );
            Err(MockReply::bad_field(
                "top_logprobs",
                &message,
                "invalid_value",
            ))
        }
        _ if body.n.is_some_and(|n| !(1..=MAX_CHOICES).contains(&n)) => {
            let message = format!("Invalid value for 'n': must be from 1 to {MAX_CHOICES}.");
            Err(MockReply::bad_field("n", &message, "invalid_value"))
        }
        _ => Ok(()),
    }
}

/// Returns the error for an unsupported field. `replacement` is the field to use instead, or empty.
fn unsupported(name: &str, replacement: &str) -> MockReply {
    let mut message = format!("Unsupported parameter: '{name}' is not supported with this model.");
    if !replacement.is_empty() {
        message += &format!(" Use '{replacement}' instead.");
    }
    MockReply::bad_field(name, &message, "unsupported_parameter")
}

/// Returns the text of the last message. Its content is a string or a list of parts.
fn last_text<'a>(messages: &[ChatMessage<'a>]) -> Result<Cow<'a, str>, MockReply> {
    let Some(last) = messages.last() else {
        let message = "Invalid 'messages': empty array.";
        return Err(MockReply::bad_field("messages", message, "empty_array"));
    };
    let Some(content) = last.content else {
        return Ok(Cow::Borrowed(""));
    };
    if let Ok(PlainText(text)) = serde_json::from_str(content.get()) {
        return Ok(text);
    }
    match serde_json::from_str::<Vec<MessagePart>>(content.get()) {
        Ok(parts) => Ok(Cow::Owned(
            parts.into_iter().map(|part| part.text).collect(),
        )),
        Err(_) => Err(MockReply::bad_field(
            "messages",
            "Invalid type for 'messages[-1].content': expected a string or an array of parts.",
            "invalid_type",
        )),
    }
}
