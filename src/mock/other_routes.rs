//! Requests for anything but an answer: files, batches, the list of models.

use std::time::Duration;

use bytes::Bytes;
use serde::de::IgnoredAny;
use serde_json::json;

use crate::mock::answer::Answer;
use crate::mock::batch::context::Context;
use crate::mock::chat::Chat;
use crate::mock::faults;
use crate::mock::faults::Seen;
use crate::mock::handle::pause;
use crate::mock::ledger;
use crate::mock::ledger::Ledger;
use crate::mock::request::CHAT;
use crate::mock::request::{Request, wrong_method};
use crate::mock::response::{Reaction, Reply};
use crate::mock::script::fault::Fault;
use crate::mock::{Mock, State, unix};

impl Mock {
    /// A request for anything but an answer. Only a fault that names its path hits it.
    pub(crate) async fn elsewhere(&self, request: &Request<'_>, path: &str) -> Reaction {
        let seen = Seen {
            path,
            is_chat: false,
            prompt: "",
            attempt: 0,
            at: self.started.elapsed(),
        };
        let mut fault = None;
        if self.script.faults.iter().any(|fault| fault.path.is_some()) {
            let [method, body] = [request.method.as_bytes(), request.body];
            let hash = ledger::hash(&[method, path.as_bytes(), body].concat());
            let attempt = self.state().ledger.asked_elsewhere(hash);
            let seen = Seen { attempt, ..seen };
            fault = faults::choose(&self.script, seen, &mut self.draw(hash, attempt));
        }
        let Some(fault) = fault else {
            return self.rest(request, path);
        };
        self.state().ledger.failed(fault.kind.to_string());
        pause(faults::seconds(fault.after_s.unwrap_or(0.0))).await;
        if fault.kind.is_of_an_answer() {
            return match self.rest(request, path) {
                Reaction::Reply(reply) => faults::spoil(fault, reply),
                other => other,
            };
        }
        match faults::error(fault, self.wall_now()) {
            Some(reaction) => reaction,
            None => std::future::pending().await,
        }
    }

    fn rest(&self, request: &Request<'_>, path: &str) -> Reaction {
        let reaction = {
            let mut state = self.state();
            let context = self.context();
            self.settle(&mut state, &context);
            state.desk.handle(request, &context)
        };
        reaction.unwrap_or_else(|| self.models(request.method, path))
    }

    fn models(&self, method: &str, path: &str) -> Reaction {
        let model = self.script.model_name();
        let card = || json!({"id": model, "object": "model", "owned_by": "distill"});
        let found = match path.strip_prefix("/v1/models") {
            Some("") => json!({"object": "list", "data": [card()]}),
            Some(name) if name.strip_prefix('/') == Some(model) => card(),
            _ => {
                let message = format!("there is no {method} {path}");
                return Reaction::Reply(Reply::error(404, &message, "not_found"));
            }
        };
        match method {
            "GET" => Reaction::Reply(Reply::json(200, found.to_string())),
            _ => wrong_method(path, method),
        }
    }

    pub(crate) fn context(&self) -> Context<'_> {
        Context {
            script: &self.script,
            at: self.started.elapsed(),
            started: unix(self.wall),
        }
    }

    /// Bills and writes down what batches have come to.
    pub(super) fn settle(&self, state: &mut State, context: &Context) {
        let State { ledger, desk, .. } = state;
        desk.settle(context, &mut |body| {
            self.answer_row(ledger, body, context.at)
        });
    }

    /// The status and the body of a row of a batch.
    fn answer_row(&self, ledger: &mut Ledger, body: &[u8], at: Duration) -> (u16, Bytes) {
        let chat = match Chat::parse(body, &self.script) {
            Ok(chat) => chat,
            Err(reply) => return (reply.status, reply.body),
        };
        let hash = ledger::hash(body);
        let attempt = ledger.asked_in_batch(hash);
        let seen = Seen {
            path: CHAT,
            is_chat: true,
            prompt: &chat.prompt,
            attempt,
            at,
        };
        let fault = faults::choose(&self.script, seen, &mut self.draw(hash, attempt));
        let Answer { body, usage } = self.write_answer(&chat, hash);
        let reply = Reply::json(200, body);
        let reaction = match fault {
            None => Some(Reaction::Reply(reply)),
            Some(fault) if fault.kind.is_of_an_answer() => Some(faults::spoil(fault, reply)),
            Some(fault) => faults::error(fault, self.wall_now()),
        };
        if let Some(fault) = fault {
            ledger.failed(fault.kind.to_string());
        }
        if fault.is_none_or(Fault::is_billed) {
            ledger.billed_in_batch(hash, &usage);
        }
        // A line of a file can only hold what is JSON, whatever happened on the way to it.
        let reply = reaction.as_ref().and_then(Reaction::reply);
        let is_json = |reply: &&Reply| serde_json::from_slice::<IgnoredAny>(&reply.body).is_ok();
        reply.filter(is_json).map_or_else(
            || {
                let message = "The request failed.";
                (500, Reply::error(500, message, "server_error").body)
            },
            |reply| (reply.status, reply.body.clone()),
        )
    }
}
