//! `POST /v1/completions`: a plain text goes on, or is given back with the logprobs of its own tokens.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::answers;
use super::error::ApiError;
use super::fields::{Fields, MAX_TOP_LOGPROBS};
use super::wire::{PromptLogprobs, TextChoice, TextCompletion, TextLogprobs, Usage};
use crate::model::batcher::{FinishReason, GenerateOptions};
use crate::serve::state::App;
use crate::tokenizer::Tokenizer;

const MAX_PROMPTS: usize = 64;
/// OpenAI's default.
const MAX_TOKENS: usize = 16;

/// What a client asks for.
#[derive(Debug)]
struct CompletionRequest {
    model: String,
    prompts: Vec<Prompt>,
    /// Its `max_tokens` are 0 where nothing is to be written, which `echo` alone allows.
    options: GenerateOptions,
    n: usize,
    /// Give the prompt back in front of the answer.
    echo: bool,
    /// See [`Fields::prompt_logprobs`].
    prompt_logprobs: Option<usize>,
    /// vLLM's: tokens are told as `token_id:N`.
    tokens_as_ids: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of token ids, or a list of either"
)]
enum Prompts {
    One(Prompt),
    Several(Vec<Prompt>),
}

impl CompletionRequest {
    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        if fields.get("stream")?.unwrap_or(false) {
            let message = "text completions are not streamed here; `/v1/chat/completions` are";
            return Err(ApiError::bad_field("stream", message));
        }
        let prompts = match fields.require("prompt")? {
            Prompts::One(prompt) => vec![prompt],
            Prompts::Several(prompts) => prompts,
        };
        if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
            let message = format!("`prompt` holds 1 to {MAX_PROMPTS} texts");
            return Err(ApiError::bad_field("prompt", message));
        }
        let echo = fields.get("echo")?.unwrap_or(false);
        let least = if echo { 0 } else { 1 };
        let max_tokens = fields.within("max_tokens", least, usize::MAX)?;
        Ok(Self {
            model: fields.require("model")?,
            prompts,
            options: GenerateOptions {
                max_tokens: max_tokens.unwrap_or(MAX_TOKENS),
                sampling: fields.sampling()?,
                stop: fields.stop()?,
                top_logprobs: fields.within("logprobs", 0, MAX_TOP_LOGPROBS)?,
            },
            n: fields.n()?,
            echo,
            prompt_logprobs: fields.prompt_logprobs()?,
            tokens_as_ids: fields.get("return_tokens_as_token_ids")?.unwrap_or(false),
        })
    }

    /// The prompts in ids, which the model must have and which must fit it.
    fn encode(&self, app: &App) -> Result<Vec<Vec<u32>>, ApiError> {
        let bad = |message: String| ApiError::bad_field("prompt", message);
        let encode = |prompt: &Prompt| {
            let ids = match prompt {
                Prompt::Ids(ids) => ids.clone(),
                Prompt::Text(text) => app
                    .tokenizer
                    .encode_text(text)
                    .map_err(|error| bad(format!("{error:#}")))?,
            };
            if ids.is_empty() {
                return Err(bad("`prompt` has no tokens".into()));
            }
            if let Some(id) = ids.iter().find(|&&id| id as usize >= app.tokens) {
                return Err(bad(format!("there is no token {id}")));
            }
            app.check_length("prompt", ids.len(), self.options.max_tokens > 0)?;
            Ok(ids)
        };
        self.prompts.iter().map(encode).collect()
    }

    /// How many of the likeliest tokens of the prompts to find out, if their logprobs are asked for.
    fn top_of_prompts(&self) -> Option<usize> {
        let echoed = self.options.top_logprobs.filter(|_| self.echo);
        echoed.max(self.prompt_logprobs)
    }
}

/// Goes on with each prompt, after it has been told again where that is asked for.
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body = body.map_err(|error| ApiError::http(error.status(), error.body_text()))?;
    let request = CompletionRequest::parse(&body)?;
    app.check_model(&request.model)?;
    let prompts = request.encode(&app)?;
    let (answers, completion_tokens) = match request.options.max_tokens {
        0 => (Vec::new(), 0),
        _ => {
            let replies = answers::submit(&app, &prompts, &request.options, request.n)?;
            answers::collect(replies, prompts.len() * request.n).await?
        }
    };
    let scored = match request.top_of_prompts() {
        Some(top) => answers::score(&app, &prompts, top).await?,
        None => vec![Vec::new(); prompts.len()],
    };
    let mut choices = Vec::with_capacity(prompts.len() * request.n);
    for index in 0..prompts.len() * request.n {
        let (prompt, scored) = (&prompts[index / request.n], &scored[index / request.n]);
        let said = answers.get(index);
        let mut text = String::new();
        if request.echo {
            text = told(prompt, &app.tokenizer);
        }
        text.push_str(said.map_or("", |answer| &answer.text));
        let logprobs = request.options.top_logprobs.map(|top| {
            let first = request.echo.then(|| prompt[0]);
            let echoed = scored.iter().filter(|_| request.echo);
            let written = said.map_or(&[][..], |answer| &answer.choices);
            let choices = echoed.chain(written);
            TextLogprobs::new(first, choices, top, &app.tokenizer, request.tokens_as_ids)
        });
        choices.push(TextChoice {
            index,
            text,
            logprobs,
            finish_reason: said
                .and_then(|answer| answer.finish_reason)
                .unwrap_or(FinishReason::Length),
            prompt_logprobs: request
                .prompt_logprobs
                .map(|top| PromptLogprobs::new(scored, top, &app.tokenizer)),
        });
    }
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let completion = TextCompletion {
        head: &app.head("text_completion"),
        choices,
        usage: Usage::new(prompt_tokens, completion_tokens),
    };
    Ok(Json(completion).into_response())
}

/// A prompt as its tokens tell it.
fn told(prompt: &[u32], tokenizer: &Tokenizer) -> String {
    let mut bytes = Vec::new();
    for &id in prompt {
        match tokenizer.token_bytes(id) {
            Some(of_token) => bytes.extend(of_token),
            None => bytes.extend(tokenizer.token_name(id).as_bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
