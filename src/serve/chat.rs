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
    app.check_scores_prompts("prompt_logprobs", request.prompt_logprobs.is_some())?;
    let prompt = if request.continue_final {
        let encoded = app.tokenizer.encode_continued(&request.messages);
        encoded.map(|(ids, _)| ids)
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
        returns_logprobs: request.options.top_logprobs.is_some(),
        app: Arc::clone(&app),
    };
    let prompts = [prompt];
    let updates = answers::submit(&app, &prompts, &request.options, request.n)?;
    if request.stream {
        return Ok(chat.stream(updates, request.include_usage));
    }
    let prompt_logprobs = match request.prompt_logprobs {
        Some(top_k) => {
            let logprobs = answers::score(&app, &prompts, top_k).await?.concat();
            Some(PromptLogprobs::new(&logprobs, top_k, &app.tokenizer))
        }
        None => None,
    };
    let [prompt] = &prompts;
    let prompt_ids = request.prompt_ids.then_some(prompt.as_slice());
    chat.respond(updates, prompt_logprobs, prompt_ids).await
}

/// A request whose answers are being generated.
struct PendingChat {
    app: Arc<AppState>,
    head: ResponseHead,
    prompt_tokens: usize,
    /// Number of answers.
    n: usize,
    /// Whether the response contains the logprobs of the answers.
    returns_logprobs: bool,
}

impl PendingChat {
    /// Responds with one object once all answers are complete.
    async fn respond(
        &self,
        updates: mpsc::UnboundedReceiver<AnswerUpdate>,
        prompt_logprobs: Option<PromptLogprobs<'_>>,
        prompt_token_ids: Option<&[u32]>,
    ) -> Result<Response, ErrorResponse> {
        let (answers, completion_tokens) = answers::collect(updates, self.n).await?;
        let choices = answers
            .into_iter()
            .enumerate()
            .map(|(index, answer)| ChatChoice {
                index,
                logprobs: self.logprobs(&answer.token_logprobs),
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
            prompt_logprobs,
            prompt_token_ids,
        };
        Ok(Json(completion).into_response())
    }

    /// Responds with a stream of server-sent events.
    fn stream(
        self,
        updates: mpsc::UnboundedReceiver<AnswerUpdate>,
        include_usage: bool,
    ) -> Response {
        let mut streaming = ChatStream {
            unfinished: self.n,
            completion_tokens: 0,
            include_usage,
            chat: self,
        };
        let role_events = streaming.role_events();
        let updates = UnboundedReceiverStream::new(updates)
            .flat_map(move |update| stream::iter(streaming.events(update)));
        Sse::new(stream::iter(role_events).chain(updates))
            .keep_alive(KeepAlive::default())
            .into_response()
    }

    fn logprobs(&self, token_logprobs: &[TokenLogprobs]) -> Option<ChatLogprobs<'_>> {
        self.returns_logprobs
            .then(|| ChatLogprobs::new(token_logprobs, &self.app.tokenizer))
    }
}

/// The state of one event stream.
struct ChatStream {
    chat: PendingChat,
    /// Number of answers that have not ended yet.
    unfinished: usize,
    completion_tokens: usize,
    include_usage: bool,
}

impl ChatStream {
    /// Returns the first event of each answer, which names the role.
    fn role_events(&self) -> Vec<Result<Event, axum::Error>> {
        let role_event = |index| {
            let delta = MessageDelta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            self.chunk(index, delta, None, None)
        };
        (0..self.chat.n).map(role_event).collect()
    }

    /// Converts an update to events. Adds the closing events once every answer has ended or failed.
    fn events(&mut self, answer: AnswerUpdate) -> Vec<Result<Event, axum::Error>> {
        let TokenUpdate {
            text,
            token_logprobs,
            finish_reason,
            ..
        } = match answer.update {
            Ok(update) => update,
            Err(message) => {
                let mut events = vec![event(&ErrorResponse::internal(message).body())];
                self.end_answer(&mut events);
                return events;
            }
        };
        self.completion_tokens += 1;
        let mut events = Vec::new();
        if !text.is_empty() || !token_logprobs.is_empty() {
            let delta = MessageDelta {
                role: None,
                content: Some(text),
            };
            let logprobs = self.chat.logprobs(&token_logprobs);
            events.push(self.chunk(answer.index, delta, logprobs, None));
        }
        if finish_reason.is_some() {
            events.push(self.chunk(answer.index, MessageDelta::default(), None, finish_reason));
            self.end_answer(&mut events);
        }
        events
    }

    /// Counts an answer that has ended or failed. After the last one, appends the closing events.
    fn end_answer(&mut self, events: &mut Vec<Result<Event, axum::Error>>) {
        self.unfinished -= 1;
        if self.unfinished == 0 {
            self.push_closing_events(events);
        }
    }

    /// Appends the event with the usage, if it was requested, and the event that ends the stream.
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::tokenizer::Tokenizer;

    #[test]
    fn stream_ends_after_its_last_answer_has_failed() {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden/tokenizers/bytelevel");
        let app = Arc::new(AppState {
            model: "tiny".into(),
            fingerprint: String::new(),
            started: 0,
            context: 100,
            vocab_size: 100,
            tokenizer: Arc::new(Tokenizer::load(&folder).unwrap()),
            jobs: mpsc::channel(1).0,
        });
        let mut stream = ChatStream {
            unfinished: 2,
            completion_tokens: 0,
            include_usage: true,
            chat: PendingChat {
                head: app.head("chat.completion.chunk"),
                prompt_tokens: 1,
                n: 2,
                returns_logprobs: false,
                app,
            },
        };
        let mut failed_events = |index| {
            let update = Err("out of memory".into());
            stream.events(AnswerUpdate { index, update }).len()
        };
        assert_eq!(failed_events(0), 1);
        // The error, the usage and `[DONE]`.
        assert_eq!(failed_events(1), 3);
    }
}
