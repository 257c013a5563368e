//! Handles the routes other than chat completions: files, batches and models.

use std::time::Duration;

use bytes::Bytes;
use serde::de::IgnoredAny;
use serde_json::json;

use crate::mock::answer::MockAnswer;
use crate::mock::batch::context::BatchContext;
use crate::mock::chat::ParsedChat;
use crate::mock::faults;
use crate::mock::faults::RequestFacts;
use crate::mock::handle::pause;
use crate::mock::request::CHAT_PATH;
use crate::mock::request::{MockRequest, method_not_allowed};
use crate::mock::response::{MockReply, MockResponse};
use crate::mock::script::fault::ScriptedFault;
use crate::mock::stats;
use crate::mock::stats::StatsCollector;
use crate::mock::{Mock, MockState, unix_seconds};

impl Mock {
    /// Handles a request to a route other than chat completions. Only faults with a `path` apply to it.
    pub(crate) async fn respond_other_route(
        &self,
        request: &MockRequest<'_>,
        path: &str,
    ) -> MockResponse {
        let facts = RequestFacts {
            path,
            is_chat: false,
            prompt: "",
            attempt: 0,
            elapsed: self.started.elapsed(),
        };
        let mut fault = None;
        if self.script.faults.iter().any(|fault| fault.path.is_some()) {
            let [method, body] = [request.method.as_bytes(), request.body];
            let hash = stats::body_hash(&[method, path.as_bytes(), body].concat());
            let attempt = self.state().stats.next_other_route_attempt(hash);
            let facts = RequestFacts { attempt, ..facts };
            fault = faults::select(&self.script, facts, &mut self.rng(hash, attempt));
        }
        let Some(fault) = fault else {
            return self.route(request, path);
        };
        self.state().stats.record_fault(fault.kind.to_string());
        pause(faults::duration_from_s(fault.after_s.unwrap_or(0.0))).await;
        if fault.kind.corrupts_answer() {
            return match self.route(request, path) {
                MockResponse::Complete(reply) => faults::corrupt(fault, reply),
                other => other,
            };
        }
        match faults::error_response(fault, self.wall_now()) {
            Some(response) => response,
            None => std::future::pending().await,
        }
    }

    fn route(&self, request: &MockRequest<'_>, path: &str) -> MockResponse {
        let response = {
            let mut state = self.state();
            let context = self.batch_context();
            self.settle_batches(&mut state, &context);
            state.batches.handle(request, &context)
        };
        response.unwrap_or_else(|| self.models(request.method, path))
    }

    fn models(&self, method: &str, path: &str) -> MockResponse {
        let model = self.script.model_name();
        let model_json = || json!({"id": model, "object": "model", "owned_by": "distill"});
        let body = match path.strip_prefix("/v1/models") {
            Some("") => json!({"object": "list", "data": [model_json()]}),
            Some(name) if name.strip_prefix('/') == Some(model) => model_json(),
            _ => {
                let message = format!("unknown route: {method} {path}");
                return MockResponse::Complete(MockReply::error(404, &message, "not_found"));
            }
        };
        match method {
            "GET" => MockResponse::Complete(MockReply::json(200, body.to_string())),
            _ => method_not_allowed(path, method),
        }
    }

    pub(crate) fn batch_context(&self) -> BatchContext<'_> {
        BatchContext {
            script: &self.script,
            elapsed: self.started.elapsed(),
            start_unix_s: unix_seconds(self.wall_start),
        }
    }

    /// Writes and bills the results of the batches that have ended.
    pub(super) fn settle_batches(&self, state: &mut MockState, context: &BatchContext) {
        let MockState { stats, batches, .. } = state;
        batches.write_results(context, &mut |body| {
            self.answer_row(stats, body, context.elapsed)
        });
    }

    /// Answers a batch row and bills the answer. Returns the status and the body of the response.
    fn answer_row(
        &self,
        stats: &mut StatsCollector,
        body: &[u8],
        elapsed: Duration,
    ) -> (u16, Bytes) {
        let chat = match ParsedChat::parse(body, &self.script) {
            Ok(chat) => chat,
            Err(reply) => return (reply.status, reply.body),
        };
        let hash = stats::body_hash(body);
        let attempt = stats.record_attempt(hash);
        let facts = RequestFacts {
            path: CHAT_PATH,
            is_chat: true,
            prompt: &chat.prompt,
            attempt,
            elapsed,
        };
        let fault = faults::select(&self.script, facts, &mut self.rng(hash, attempt));
        let MockAnswer { body, usage } = self.write_answer(&chat, hash);
        let reply = MockReply::json(200, body);
        let mut response = match fault {
            None => Some(MockResponse::Complete(reply)),
            Some(fault) if fault.kind.corrupts_answer() => Some(faults::corrupt(fault, reply)),
            Some(fault) => faults::error_response(fault, self.wall_now()),
        };
        if let Some(fault) = fault {
            stats.record_fault(fault.kind.to_string());
        }
        if fault.is_none_or(ScriptedFault::is_billed) {
            stats.record_billed_in_batch(hash, &usage);
        }
        // A result file contains JSON, so a reply that is not JSON becomes an error with status 500.
        let reply = response.as_mut().and_then(MockResponse::reply_mut);
        let is_json =
            |reply: &&mut MockReply| serde_json::from_slice::<IgnoredAny>(&reply.body).is_ok();
        reply.filter(is_json).map_or_else(
            || {
                let message = "The request failed.";
                (500, MockReply::error(500, message, "server_error").body)
            },
            |reply| (reply.status, reply.body.clone()),
        )
    }
}
