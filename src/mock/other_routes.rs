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
use crate::mock::response::{HttpReply, MockResponse};
use crate::mock::script::fault::ScriptedFault;
use crate::mock::stats;
use crate::mock::stats::StatsCollector;
use crate::mock::{Mock, MockState, unix_seconds};

impl Mock {
    /// Handles a request to another route. Only faults with a `path` apply to it.
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
            at: self.started.elapsed(),
        };
        let mut fault = None;
        if self.script.faults.iter().any(|fault| fault.path.is_some()) {
            let [method, body] = [request.method.as_bytes(), request.body];
            let hash = stats::body_hash(&[method, path.as_bytes(), body].concat());
            let attempt = self.state().stats.next_other_attempt(hash);
            let facts = RequestFacts { attempt, ..facts };
            fault = faults::select(&self.script, facts, &mut self.rng(hash, attempt));
        }
        let Some(fault) = fault else {
            return self.route(request, path);
        };
        self.state().stats.record_fault(fault.kind.to_string());
        pause(faults::duration(fault.after_s.unwrap_or(0.0))).await;
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
            let context = self.context();
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
                return MockResponse::Complete(HttpReply::error(404, &message, "not_found"));
            }
        };
        match method {
            "GET" => MockResponse::Complete(HttpReply::json(200, body.to_string())),
            _ => method_not_allowed(path, method),
        }
    }

    pub(crate) fn context(&self) -> BatchContext<'_> {
        BatchContext {
            script: &self.script,
            at: self.started.elapsed(),
            started: unix_seconds(self.wall),
        }
    }

    /// Writes and bills the results of the batches that have ended.
    pub(super) fn settle_batches(&self, state: &mut MockState, context: &BatchContext) {
        let MockState { stats, batches, .. } = state;
        batches.write_results(context, &mut |body| {
            self.answer_row(stats, body, context.at)
        });
    }

    /// Returns the status and the body of the response to a batch row.
    fn answer_row(&self, stats: &mut StatsCollector, body: &[u8], at: Duration) -> (u16, Bytes) {
        let chat = match ParsedChat::parse(body, &self.script) {
            Ok(chat) => chat,
            Err(reply) => return (reply.status, reply.body),
        };
        let hash = stats::body_hash(body);
        let attempt = stats.next_attempt(hash);
        let facts = RequestFacts {
            path: CHAT_PATH,
            is_chat: true,
            prompt: &chat.prompt,
            attempt,
            at,
        };
        let fault = faults::select(&self.script, facts, &mut self.rng(hash, attempt));
        let MockAnswer { body, usage } = self.write_answer(&chat, hash);
        let reply = HttpReply::json(200, body);
        let response = match fault {
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
        // A result file can contain only JSON: a reply that is not JSON becomes a 500.
        let reply = response.as_ref().and_then(MockResponse::reply);
        let is_json =
            |reply: &&HttpReply| serde_json::from_slice::<IgnoredAny>(&reply.body).is_ok();
        reply.filter(is_json).map_or_else(
            || {
                let message = "The request failed.";
                (500, HttpReply::error(500, message, "server_error").body)
            },
            |reply| (reply.status, reply.body.clone()),
        )
    }
}
