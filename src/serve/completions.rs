//! `POST /v1/completions`: continues a plain text, or echoes it with the logprobs of its own tokens.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::answers;
use super::error::ErrorResponse;
use super::fields::{MAX_TOP_LOGPROBS, RequestFields};
use super::wire::{PromptLogprobs, TextChoice, TextCompletion, TextLogprobs, TokenUsage};
use crate::model::batcher::{FinishReason, GenerateOptions};
use crate::serve::state::AppState;
use crate::tokenizer::Tokenizer;

/// Maximum number of prompts in a request.
const MAX_PROMPTS: usize = 64;
/// Default of `max_tokens`, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A validated request.
#[derive(Debug)]
struct CompletionRequest {
    model: String,
    prompts: Vec<PromptInput>,
    /// `max_tokens` may be 0 only with `echo`; then the response contains only the prompt.
    options: GenerateOptions,
    n: usize,
    /// Whether the text of the response begins with the prompt.
    echo: bool,
    /// See [`RequestFields::prompt_logprobs`].
    prompt_logprobs: Option<usize>,
    /// vLLM's `return_tokens_as_token_ids`: the logprobs name tokens as `token_id:N`.
    tokens_as_ids: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum PromptInput {
    Text(String),
    Ids(Vec<u32>),
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of token ids, or a list of either"
)]
enum PromptInputs {
    One(PromptInput),
    Several(Vec<PromptInput>),
}

impl CompletionRequest {
    fn parse(body: &[u8]) -> Result<Self, ErrorResponse> {
        let fields = RequestFields::parse(body)?;
        if fields.get("stream")?.unwrap_or(false) {
            let message =
                "`/v1/completions` does not stream: omit `stream`, or use `/v1/chat/completions`";
            return Err(ErrorResponse::bad_field("stream", message));
        }
        let prompts = match fields.require("prompt")? {
            PromptInputs::One(prompt) => vec![prompt],
            PromptInputs::Several(prompts) => prompts,
        };
        if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
            let message = format!("`prompt` must contain 1 to {MAX_PROMPTS} texts");
            return Err(ErrorResponse::bad_field("prompt", message));
        }
        let echo = fields.get("echo")?.unwrap_or(false);
        let min_tokens = if echo { 0 } else { 1 };
        let max_tokens = fields.at_least("max_tokens", min_tokens)?;
        Ok(Self {
            model: fields.require("model")?,
            prompts,
            options: GenerateOptions {
                max_tokens: max_tokens.unwrap_or(DEFAULT_MAX_TOKENS),
                sampling: fields.sampling()?,
                stop: fields.stop()?,
                top_logprobs: fields.in_range("logprobs", 0, MAX_TOP_LOGPROBS)?,
            },
            n: fields.n()?,
            echo,
            prompt_logprobs: fields.prompt_logprobs()?,
            tokens_as_ids: fields.get("return_tokens_as_token_ids")?.unwrap_or(false),
        })
    }

    /// Encodes the prompts as token ids.
    ///
    /// # Errors
    /// 400 if an id is not in the vocabulary, or a prompt is empty or does not fit the context.
    fn encode(&self, app: &AppState) -> Result<Vec<Vec<u32>>, ErrorResponse> {
        let bad_prompt = |message: String| ErrorResponse::bad_field("prompt", message);
        let encode = |prompt: &PromptInput| {
            let ids = match prompt {
                PromptInput::Ids(ids) => ids.clone(),
                PromptInput::Text(text) => app
                    .tokenizer
                    .encode_text_prompt(text)
                    .map_err(|error| bad_prompt(format!("{error:#}")))?,
            };
            if ids.is_empty() {
                return Err(bad_prompt("`prompt` is empty".into()));
            }
            if let Some(id) = ids.iter().find(|&&id| id as usize >= app.vocab_size) {
                return Err(bad_prompt(format!(
                    "token id {id} is not in the vocabulary"
                )));
            }
            app.check_length("prompt", ids.len(), self.options.max_tokens > 0)?;
            Ok(ids)
        };
        self.prompts.iter().map(encode).collect()
    }

    /// Returns the number of most likely tokens to compute at each prompt position, or `None` if the request does
    /// not need the logprobs of the prompts.
    fn prompt_top_logprobs(&self) -> Option<usize> {
        let for_echo = self.options.top_logprobs.filter(|_| self.echo);
        for_echo.max(self.prompt_logprobs)
    }
}

/// Answers with `n` continuations of each prompt.
pub(crate) async fn completions(
    State(app): State<Arc<AppState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ErrorResponse> {
    let body = body.map_err(|error| ErrorResponse::http(error.status(), error.body_text()))?;
    let request = CompletionRequest::parse(&body)?;
    app.check_model(&request.model)?;
    app.check_scores_prompts("prompt_logprobs", request.prompt_logprobs.is_some())?;
    app.check_scores_prompts("echo", request.echo)?;
    let prompts = request.encode(&app)?;
    let (answers, completion_tokens) = if request.options.max_tokens == 0 {
        (Vec::new(), 0)
    } else {
        let updates = answers::submit(&app, &prompts, &request.options, request.n)?;
        answers::collect(updates, prompts.len() * request.n).await?
    };
    let prompt_logprobs = match request.prompt_top_logprobs() {
        Some(top_k) => answers::score(&app, &prompts, top_k).await?,
        None => vec![Vec::new(); prompts.len()],
    };
    let mut choices = Vec::with_capacity(prompts.len() * request.n);
    for index in 0..prompts.len() * request.n {
        let prompt = &prompts[index / request.n];
        let prompt_logprobs = &prompt_logprobs[index / request.n];
        let answer = answers.get(index);
        let mut text = String::new();
        if request.echo {
            text = prompt_text(prompt, &app.tokenizer);
        }
        text.push_str(answer.map_or("", |answer| &answer.text));
        let logprobs = request.options.top_logprobs.map(|top_k| {
            let first_id = request.echo.then(|| prompt[0]);
            let echoed = prompt_logprobs.iter().filter(|_| request.echo);
            let generated = answer.map_or(&[][..], |answer| &answer.token_logprobs);
            let tokens = echoed.chain(generated);
            TextLogprobs::new(
                first_id,
                tokens,
                top_k,
                &app.tokenizer,
                request.tokens_as_ids,
            )
        });
        choices.push(TextChoice {
            index,
            text,
            logprobs,
            finish_reason: answer
                .and_then(|answer| answer.finish_reason)
                .unwrap_or(FinishReason::Length),
            prompt_logprobs: request
                .prompt_logprobs
                .map(|top_k| PromptLogprobs::new(prompt_logprobs, top_k, &app.tokenizer)),
        });
    }
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let completion = TextCompletion {
        head: &app.head("text_completion"),
        choices,
        usage: TokenUsage::new(prompt_tokens, completion_tokens),
    };
    Ok(Json(completion).into_response())
}

/// Returns the text of a prompt, decoded from its tokens. Control tokens appear by name.
fn prompt_text(prompt: &[u32], tokenizer: &Tokenizer) -> String {
    let mut bytes = Vec::new();
    for &id in prompt {
        match tokenizer.token_bytes(id) {
            Some(token) => bytes.extend(token),
            None => bytes.extend(tokenizer.token_name(id).as_bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
