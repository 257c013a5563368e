//! Files and batches in OpenAI's dialect, on a clock of their own.
//!
//! Nothing runs in the background: a batch is a function of time, looked up when somebody asks.
//! What is billed is billed when a batch comes to its end.

pub(crate) mod context;
pub(crate) mod job;
pub(crate) mod life;
pub(crate) mod rows;
pub(crate) mod upload;

use crate::mock::batch::context::Context;
use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::mock::batch::job::{AnswerRow, Batch, fates};
use crate::mock::batch::life::{Life, Status};
use crate::mock::batch::rows::mistake;
use crate::mock::request::{Request, wrong_method};
use crate::mock::response::{Reaction, Reply};
use crate::mock::script::batch::Outcome;

/// All files and batches.
#[derive(Debug, Default)]
pub(crate) struct Desk {
    files: BTreeMap<String, File>,
    batches: Vec<Batch>,
    /// For the names of files.
    named: usize,
}

#[derive(Debug)]
struct File {
    name: String,
    purpose: String,
    content: Bytes,
    /// Since the start, and in virtual seconds.
    visible: Duration,
    created: f64,
}

impl Desk {
    /// The reaction to a request, if it is for a file or a batch.
    pub(crate) fn handle(&mut self, request: &Request, context: &Context) -> Option<Reaction> {
        let (path, query) = request.path.split_once('?').unwrap_or((request.path, ""));
        let parts: Vec<&str> = path.strip_prefix("/v1/")?.split('/').collect();
        let reply = match (request.method, parts.as_slice()) {
            ("POST", ["files"]) => self.upload(request, context),
            ("GET", ["files"]) => self.list_files(context),
            ("GET", ["files", id]) => self.with_file(id, context, |file| {
                Reply::json(200, file.card(id, context).to_string())
            }),
            ("GET", ["files", id, "content"]) => self.with_file(id, context, |file| Reply {
                content_type: "application/octet-stream",
                ..Reply::json(200, file.content.clone())
            }),
            ("DELETE", ["files", id]) => self.delete(id, context),
            ("POST", ["batches"]) => return Some(self.create(request.body, context)),
            ("GET", ["batches"]) => self.list_batches(query, context),
            ("GET", ["batches", id]) => match self.batch(id) {
                Some(batch) => Reply::json(200, batch.card(context).to_string()),
                None => no_such("Batch", id, 404, "id"),
            },
            ("POST", ["batches", id, "cancel"]) => self.cancel(id, context),
            (method, ["files" | "batches", ..]) => return Some(wrong_method(path, method)),
            _ => return None,
        };
        Some(Reaction::Reply(reply))
    }

    fn upload(&mut self, request: &Request, context: &Context) -> Reply {
        let content_type = request.content_type.unwrap_or_default();
        let upload = match upload::parse(content_type, request.body) {
            Ok(upload) => upload,
            Err(problem) => return Reply::error(400, problem, Value::Null),
        };
        let missing = crate::mock::faults::seconds(context.script.batch.missing_s);
        let file = File {
            name: upload.filename,
            purpose: upload.purpose,
            content: Bytes::copy_from_slice(upload.content),
            visible: context.at + missing,
            created: context.now(),
        };
        let id = self.name_file();
        let card = file.card(&id, context);
        self.files.insert(id, file);
        Reply::json(200, card.to_string())
    }

    fn name_file(&mut self) -> String {
        self.named += 1;
        format!("file-{:024}", self.named)
    }

    fn with_file(&self, id: &str, context: &Context, then: impl FnOnce(&File) -> Reply) -> Reply {
        match self.files.get(id).filter(|file| file.visible <= context.at) {
            Some(file) => then(file),
            None => no_such("File", id, 404, "id"),
        }
    }

    fn list_files(&self, context: &Context) -> Reply {
        let visible = self
            .files
            .iter()
            .filter(|(_, file)| file.visible <= context.at);
        let cards: Vec<Value> = visible.map(|(id, file)| file.card(id, context)).collect();
        Reply::json(200, page(cards, false).to_string())
    }

    fn delete(&mut self, id: &str, context: &Context) -> Reply {
        let gone = json!({"id": id, "object": "file", "deleted": true});
        let reply = self.with_file(id, context, |_| Reply::json(200, gone.to_string()));
        if reply.status == 200 {
            self.files.remove(id);
        }
        reply
    }

    fn batch(&self, id: &str) -> Option<&Batch> {
        self.batches.iter().find(|batch| batch.id == id)
    }

    fn create(&mut self, body: &[u8], context: &Context) -> Reaction {
        match self.try_create(body, context) {
            Ok(_) if self.batches.len() <= context.script.batch.lost_creates as usize => {
                Reaction::Reset
            }
            Ok(reply) | Err(reply) => Reaction::Reply(reply),
        }
    }

    fn try_create(&mut self, body: &[u8], context: &Context) -> Result<Reply, Reply> {
        let script = context.script;
        let body: Value = serde_json::from_slice(body)
            .map_err(|_| Reply::error(400, "The body is not valid JSON.", Value::Null))?;
        let required = |param: &str| {
            body[param].as_str().map(String::from).ok_or_else(|| {
                let message = format!("Missing required parameter: '{param}'.");
                Reply::bad_field(param, &message, "missing_required_parameter")
            })
        };
        let (input_file_id, endpoint) = (required("input_file_id")?, required("endpoint")?);
        let window = required("completion_window")?;
        let seconds = parse_window(&window).ok_or_else(|| {
            let message = format!("Invalid value: '{window}'. Supported values are: '24h'.");
            Reply::bad_field("completion_window", &message, "invalid_value")
        })?;
        let file = self.files.get(&input_file_id);
        let file = file.filter(|file| file.visible <= context.at);
        let file = file.ok_or_else(|| no_such("File", &input_file_id, 400, "input_file_id"))?;
        let (rows, mut mistakes) = rows::read(&file.content, &endpoint, script);
        if script.batch.outcome == Outcome::Failed && mistakes.is_empty() {
            let message = "The mock was told to fail this batch.";
            mistakes.push(mistake("invalid_request", Some(1), Some("body"), message));
        }
        if let Some(limit) = script.batch.enqueued_tokens {
            let waiting: u64 = self
                .batches
                .iter()
                .filter(|batch| !batch.moment(context).status.is_end())
                .map(Batch::tokens)
                .sum();
            let own: u64 = rows.iter().map(|row| row.tokens).sum();
            if waiting + own > limit {
                let message = format!(
                    "Enqueued token limit reached for {} in organization org-mock. Limit: {limit} \
                     enqueued tokens. Please try again once some in_progress batches have been \
                     completed.",
                    script.model_name()
                );
                mistakes.push(mistake("token_limit_exceeded", None, None, &message));
            }
        }
        let number = self.batches.len() as u64;
        let batch = Batch {
            id: format!("batch_{number:024}"),
            input_file_id,
            endpoint,
            window,
            metadata: body["metadata"].clone(),
            life: Life {
                created: context.now(),
                window: seconds,
                rows: rows.len(),
                is_bad: !mistakes.is_empty(),
                cancelled: None,
            },
            mistakes,
            order: fates(rows.len(), script, number),
            rows,
            results: None,
        };
        let card = batch.card(context);
        self.batches.push(batch);
        Ok(Reply::json(200, card.to_string()))
    }

    /// The newest first, as many as `limit` says, from the one after `after` on.
    fn list_batches(&self, query: &str, context: &Context) -> Reply {
        let parameter = |name: &str| {
            let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs
                .filter(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .next()
        };
        let limit = parameter("limit").and_then(|limit| limit.parse().ok());
        let limit = limit.unwrap_or(20usize).clamp(1, 100);
        let mut batches = self.batches.iter().rev();
        if let Some(after) = parameter("after") {
            batches.by_ref().find(|batch| batch.id == after);
        }
        let cards: Vec<Value> = batches
            .by_ref()
            .take(limit)
            .map(|batch| batch.card(context))
            .collect();
        Reply::json(200, page(cards, batches.next().is_some()).to_string())
    }

    fn cancel(&mut self, id: &str, context: &Context) -> Reply {
        let Some(batch) = self.batches.iter_mut().find(|batch| batch.id == id) else {
            return no_such("Batch", id, 404, "id");
        };
        match batch.moment(context).status {
            Status::Validating | Status::InProgress => {
                batch.life.cancelled = Some(context.now());
                Reply::json(200, batch.card(context).to_string())
            }
            Status::Cancelling => Reply::json(200, batch.card(context).to_string()),
            status => {
                let message = format!("Cannot cancel a batch with status '{}'.", status.name());
                Reply::error(409, &message, Value::Null)
            }
        }
    }

    /// Writes the files of the batches that have come to their end since the last time.
    pub(crate) fn settle(&mut self, context: &Context, answer: &mut AnswerRow) {
        for index in 0..self.batches.len() {
            let batch = &self.batches[index];
            let moment = batch.moment(context);
            if batch.results.is_some() || !moment.status.is_end() {
                continue;
            }
            let (mut results, output, errors) = batch.work(&moment, answer);
            let created = moment.ended_at.unwrap_or_default();
            results.output_file_id = self.keep("output", output, created, context);
            results.error_file_id = self.keep("error", errors, created, context);
            self.batches[index].results = Some(results);
        }
    }

    fn keep(
        &mut self,
        what: &str,
        content: Vec<u8>,
        created: f64,
        context: &Context,
    ) -> Option<String> {
        if content.is_empty() {
            return None;
        }
        let id = self.name_file();
        let file = File {
            name: format!("{id}_{what}.jsonl"),
            purpose: "batch_output".into(),
            content: content.into(),
            visible: context.at,
            created,
        };
        self.files.insert(id.clone(), file);
        Some(id)
    }
}

impl File {
    fn card(&self, id: &str, context: &Context) -> Value {
        json!({
            "id": id,
            "object": "file",
            "bytes": self.content.len(),
            "created_at": context.stamp(self.created),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        })
    }
}

/// Seconds of `24h` or `7d`.
fn parse_window(window: &str) -> Option<f64> {
    let unit = match window.chars().last()? {
        'h' => 3600.0,
        'd' => 86_400.0,
        _ => return None,
    };
    let count: u16 = window[..window.len() - 1].parse().ok()?;
    Some(f64::from(count) * unit)
}

fn page(cards: Vec<Value>, has_more: bool) -> Value {
    let id = |card: Option<&Value>| card.map_or(Value::Null, |card| card["id"].clone());
    json!({
        "object": "list",
        "first_id": id(cards.first()),
        "last_id": id(cards.last()),
        "data": cards,
        "has_more": has_more,
    })
}

fn no_such(what: &str, id: &str, status: u16, param: &str) -> Reply {
    let message = format!("No such {what} object: {id}");
    let reply = Reply::bad_field(param, &message, Value::Null);
    Reply { status, ..reply }
}
