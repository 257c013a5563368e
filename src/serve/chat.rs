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
use super::engine::AnswerUpdate;
use super::error::ErrorResponse;
use super::request::ChatRequest;
use super::wire::{
    AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs,
    MessageDelta, PromptLogprobs, ResponseHead, TokenUsage,
};
use crate::model::batcher::{FinishReason, TokenUpdate};
use crate::model::sampling::TokenLogprobs;
use crate::serve::state::AppState;

/// Answers a conversation with one JSON object, or with a stream of server-sent events.
pub(crate) async fn completions(
    State(app): State<Arc<AppState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ErrorResponse> {
    let body = body.map_err(|error| ErrorResponse::http(error.status(), error.body_text()))?;
    let request = ChatRequest::parse(&body)?;
    app.check_model(&request.model)?;
    let prompt = if request.continue_final {
        let continued = app.tokenizer.encode_continued(&request.messages);
        continued.map(|(ids, _)| ids)
    } else {
        app.tokenizer.encode_prompt(&request.messages)
    };
    let prompt =
        prompt.map_err(|error| ErrorResponse::bad_field("messages", format!("{error:#}")))?;
    app.check_length("messages", prompt.len(), true)?;
    let chat = PendingChat {
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
        return Ok(chat.stream(replies, request.include_usage));
    }
    let scored = match request.prompt_logprobs {
        Some(top) => Some((answers::score(&app, &prompts, top).await?.concat(), top)),
        None => None,
    };
    let [prompt] = &prompts;
    let ids = request.prompt_ids.then_some(prompt.as_slice());
    chat.whole(replies, scored, ids).await
}

/// A request whose answers are being generated.
struct PendingChat {
    app: Arc<AppState>,
    head: ResponseHead,
    prompt_tokens: usize,
    n: usize,
    logprobs: bool,
}

impl PendingChat {
    /// Responds with one object once all answers are complete. `scored` holds the choices of the
    /// prompt's tokens, if requested, and the number of most likely tokens to return for each.
    async fn whole(
        &self,
        replies: mpsc::UnboundedReceiver<AnswerUpdate>,
        scored: Option<(Vec<TokenLogprobs>, usize)>,
        prompt_token_ids: Option<&[u32]>,
    ) -> Result<Response, ErrorResponse> {
        let (answers, completion_tokens) = answers::collect(replies, self.n).await?;
        let choices = answers
            .into_iter()
            .enumerate()
            .map(|(index, answer)| ChatChoice {
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
        let completion = ChatCompletion {
            head: &self.head,
            choices,
            usage: TokenUsage::new(self.prompt_tokens, completion_tokens),
            prompt_logprobs: scored
                .map(|(scored, top)| PromptLogprobs::new(&scored, top, &self.app.tokenizer)),
            prompt_token_ids,
        };
        Ok(Json(completion).into_response())
    }

    fn stream(
        self,
        replies: mpsc::UnboundedReceiver<AnswerUpdate>,
        include_usage: bool,
    ) -> Response {
        let mut streaming = ChatStream {
            unfinished: self.n,
            completion_tokens: 0,
            include_usage,
            chat: self,
        };
        let role_events = streaming.role_events();
        let updates = UnboundedReceiverStream::new(replies)
            .flat_map(move |reply| stream::iter(streaming.events(reply)));
        Sse::new(stream::iter(role_events).chain(updates))
            .keep_alive(KeepAlive::default())
            .into_response()
    }

    fn logprobs(&self, choices: &[TokenLogprobs]) -> Option<ChatLogprobs<'_>> {
        self.logprobs
            .then(|| ChatLogprobs::new(choices, &self.app.tokenizer))
    }
}

/// The state of one event stream.
struct ChatStream {
    chat: PendingChat,
    unfinished: usize,
    completion_tokens: usize,
    include_usage: bool,
}

impl ChatStream {
    /// Returns the first event of each answer, which names the role.
    fn role_events(&self) -> Vec<Result<Event, axum::Error>> {
        let open = |index| {
            let delta = MessageDelta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            self.chunk(index, delta, None, None)
        };
        (0..self.chat.n).map(open).collect()
    }

    /// Converts an update to events. The last update of the last answer adds the closing events.
    fn events(&mut self, reply: AnswerUpdate) -> Vec<Result<Event, axum::Error>> {
        let TokenUpdate {
            text,
            token_logprobs: choices,
            finish_reason,
            ..
        } = match reply.update {
            Ok(update) => update,
            Err(message) => return vec![event(&ErrorResponse::internal(message).body())],
        };
        self.completion_tokens += 1;
        let mut events = Vec::new();
        if !text.is_empty() || !choices.is_empty() {
            let delta = MessageDelta {
                role: None,
                content: Some(text),
            };
            let logprobs = self.chat.logprobs(&choices);
            events.push(self.chunk(reply.index, delta, logprobs, None));
        }
        if finish_reason.is_some() {
            events.push(self.chunk(reply.index, MessageDelta::default(), None, finish_reason));
            self.unfinished -= 1;
            if self.unfinished == 0 {
                self.push_closing_events(&mut events);
            }
        }
        events
    }

    fn push_closing_events(&self, events: &mut Vec<Result<Event, axum::Error>>) {
        if self.include_usage {
            let usage = TokenUsage::new(self.chat.prompt_tokens, self.completion_tokens);
            events.push(event(&ChatChunk {
                head: &self.chat.head,
                choices: Vec::new(),
                usage: Some(Some(usage)),
            }));
        }
        events.push(Ok(Event::default().data("[DONE]")));
    }

    fn chunk(
        &self,
        index: usize,
        delta: MessageDelta,
        logprobs: Option<ChatLogprobs<'_>>,
        finish_reason: Option<FinishReason>,
    ) -> Result<Event, axum::Error> {
        event(&ChatChunk {
            head: &self.chat.head,
            choices: vec![ChatChunkChoice {
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
