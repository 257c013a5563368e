//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::answers;
use super::engine::Reply;
use super::error::ApiError;
use super::request::ChatRequest;
use super::wire::{
    AssistantMessage, Chunk, ChunkChoice, Completion, CompletionChoice, Delta, Head, Logprobs,
    PromptLogprobs, Usage,
};
use crate::model::batcher::{FinishReason, TokenUpdate};
use crate::model::sampling::TokenLogprobs;
use crate::serve::state::App;

/// Answers a conversation, whole or as server-sent events.
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body = body.map_err(|error| ApiError::http(error.status(), error.body_text()))?;
    let request = ChatRequest::parse(&body)?;
    app.check_model(&request.model)?;
    let prompt = match request.continues {
        true => app
            .tokenizer
            .encode_continued(&request.messages)
            .map(|(ids, _)| ids),
        false => app.tokenizer.encode_prompt(&request.messages),
    };
    let prompt = prompt.map_err(|error| ApiError::bad_field("messages", format!("{error:#}")))?;
    app.check_length("messages", prompt.len(), true)?;
    let answering = Answering {
        head: app.head(if request.stream {
            "chat.completion.chunk"
        } else {
            "chat.completion"
        }),
        prompt_tokens: prompt.len(),
        n: request.n,
        logprobs: request.options.top_logprobs.is_some(),
        app: Arc::clone(&app),
    };
    let prompts = [prompt];
    let replies = answers::submit(&app, &prompts, &request.options, request.n)?;
    if request.stream {
        return Ok(answering.stream(replies, request.include_usage));
    }
    let scored = match request.prompt_logprobs {
        Some(top) => Some((answers::score(&app, &prompts, top).await?.concat(), top)),
        None => None,
    };
    let [prompt] = &prompts;
    let ids = request.prompt_ids.then_some(prompt.as_slice());
    answering.whole(replies, scored, ids).await
}

/// A request whose answers are under way.
struct Answering {
    app: Arc<App>,
    head: Head,
    prompt_tokens: usize,
    n: usize,
    logprobs: bool,
}

impl Answering {
    /// `scored` are the choices behind the prompt, where they are asked for, and how many of the likeliest
    /// tokens to tell of each.
    async fn whole(
        &self,
        replies: mpsc::UnboundedReceiver<Reply>,
        scored: Option<(Vec<TokenLogprobs>, usize)>,
        prompt_token_ids: Option<&[u32]>,
    ) -> Result<Response, ApiError> {
        let (answers, completion_tokens) = answers::collect(replies, self.n).await?;
        let choices = answers
            .into_iter()
            .enumerate()
            .map(|(index, answer)| CompletionChoice {
                index,
                logprobs: self.logprobs(&answer.choices),
                message: AssistantMessage {
                    role: "assistant",
                    content: answer.text,
                    refusal: None,
                },
                finish_reason: answer.finish_reason,
            })
            .collect();
        let completion = Completion {
            head: &self.head,
            choices,
            usage: Usage::new(self.prompt_tokens, completion_tokens),
            prompt_logprobs: scored
                .map(|(scored, top)| PromptLogprobs::new(&scored, top, &self.app.tokenizer)),
            prompt_token_ids,
        };
        Ok(Json(completion).into_response())
    }

    fn stream(self, replies: mpsc::UnboundedReceiver<Reply>, include_usage: bool) -> Response {
        let mut streaming = Streaming {
            unfinished: self.n,
            completion_tokens: 0,
            include_usage,
            answering: self,
        };
        let opening = streaming.opening();
        let news = UnboundedReceiverStream::new(replies)
            .flat_map(move |reply| stream::iter(streaming.events(reply)));
        Sse::new(stream::iter(opening).chain(news))
            .keep_alive(KeepAlive::default())
            .into_response()
    }

    fn logprobs(&self, choices: &[TokenLogprobs]) -> Option<Logprobs<'_>> {
        self.logprobs
            .then(|| Logprobs::new(choices, &self.app.tokenizer))
    }
}

/// The state of one stream of events.
struct Streaming {
    answering: Answering,
    unfinished: usize,
    completion_tokens: usize,
    include_usage: bool,
}

impl Streaming {
    /// The first event of each answer names the role.
    fn opening(&self) -> Vec<Result<Event, axum::Error>> {
        let open = |index| {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            self.chunk(index, delta, None, None)
        };
        (0..self.answering.n).map(open).collect()
    }

    /// The events that a reply gives rise to; after the last answer's end, those that close the
    /// stream.
    fn events(&mut self, reply: Reply) -> Vec<Result<Event, axum::Error>> {
        let TokenUpdate {
            text,
            token_logprobs: choices,
            finish_reason,
            ..
        } = match reply.update {
            Ok(update) => update,
            Err(message) => return vec![event(&ApiError::internal(message).body())],
        };
        self.completion_tokens += 1;
        let mut events = Vec::new();
        if !text.is_empty() || !choices.is_empty() {
            let delta = Delta {
                role: None,
                content: Some(text),
            };
            let logprobs = self.answering.logprobs(&choices);
            events.push(self.chunk(reply.index, delta, logprobs, None));
        }
        if finish_reason.is_some() {
            events.push(self.chunk(reply.index, Delta::default(), None, finish_reason));
            self.unfinished -= 1;
            if self.unfinished == 0 {
                self.close(&mut events);
            }
        }
        events
    }

    fn close(&self, events: &mut Vec<Result<Event, axum::Error>>) {
        if self.include_usage {
            let usage = Usage::new(self.answering.prompt_tokens, self.completion_tokens);
            events.push(event(&Chunk {
                head: &self.answering.head,
                choices: Vec::new(),
                usage: Some(Some(usage)),
            }));
        }
        events.push(Ok(Event::default().data("[DONE]")));
    }

    fn chunk(
        &self,
        index: usize,
        delta: Delta,
        logprobs: Option<Logprobs<'_>>,
        finish_reason: Option<FinishReason>,
    ) -> Result<Event, axum::Error> {
        event(&Chunk {
            head: &self.answering.head,
            choices: vec![ChunkChoice {
                index,
                delta,
                logprobs,
                finish_reason,
            }],
            usage: self.include_usage.then_some(None),
        })
    }
}

fn event(data: &impl Serialize) -> Result<Event, axum::Error> {
    Event::default().json_data(data)
}
