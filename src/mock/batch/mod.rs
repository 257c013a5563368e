//! OpenAI's file and batch API, on a virtual clock.
//!
//! Nothing runs in the background: the state of a batch is a function of time, which is computed when a request
//! arrives. A batch that has ended is billed when the mock's statistics are read, or at the next request that is not a
//! chat completion.
//!
//! | file | content |
//! |---|---|
//! | `mod` | [`BatchStore`]: the routes, all files and batches |
//! | `upload` | multipart parsing |
//! | `rows` | validation of the input file; the lines of the result files |
//! | `job` | one batch: its rows, planned results and JSON |
//! | `lifecycle` | the status of a batch as a function of time |
//! | `context` | the script, and the current real and virtual time |

pub(crate) mod context;
pub(crate) mod job;
pub(crate) mod lifecycle;
pub(crate) mod rows;
pub(crate) mod upload;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::mock::batch::context::BatchContext;
use crate::mock::batch::job::{AnswerRowFn, BatchJob, plan_rows};
use crate::mock::batch::lifecycle::{BatchLifecycle, BatchStatus};
use crate::mock::batch::rows::{error_entry, total_tokens};
use crate::mock::request::{MockRequest, method_not_allowed};
use crate::mock::response::{MockReply, MockResponse};
use crate::mock::script::batch::ScriptedOutcome;

/// Default number of batches in a page of the list, as in OpenAI's API.
const DEFAULT_PAGE_SIZE: usize = 20;

/// Maximum number of batches in a page of the list, as in OpenAI's API.
const MAX_PAGE_SIZE: usize = 100;

/// All files and batches.
#[derive(Debug, Default)]
pub(crate) struct BatchStore {
    files: BTreeMap<String, StoredFile>,
    batches: Vec<BatchJob>,
    /// Number of file ids that were assigned.
    assigned_file_ids: usize,
}

/// An uploaded file or a result file.
#[derive(Debug)]
struct StoredFile {
    name: String,
    purpose: String,
    content: Bytes,
    /// Real time since the start of the mock at which the file becomes visible to requests.
    visible_at: Duration,
    /// Time of creation, in virtual seconds since the start of the mock.
    created: f64,
}

impl BatchStore {
    /// Handles a request to a file or batch route. Returns None for other routes.
    pub(crate) fn handle(
        &mut self,
        request: &MockRequest,
        context: &BatchContext,
    ) -> Option<MockResponse> {
        let (path, query) = request.path.split_once('?').unwrap_or((request.path, ""));
        let parts: Vec<&str> = path.strip_prefix("/v1/")?.split('/').collect();
        let reply = match (request.method, parts.as_slice()) {
            ("POST", ["files"]) => self.upload(request, context),
            ("GET", ["files"]) => self.list_files(context),
            ("GET", ["files", id]) => self.with_file(id, context, |file| {
                MockReply::json(200, file.to_json(id, context).to_string())
            }),
            ("GET", ["files", id, "content"]) => self.with_file(id, context, |file| MockReply {
                content_type: "application/octet-stream",
                ..MockReply::json(200, file.content.clone())
            }),
            ("DELETE", ["files", id]) => self.delete(id, context),
            ("POST", ["batches"]) => return Some(self.create(request.body, context)),
            ("GET", ["batches"]) => self.list_batches(query, context),
            ("GET", ["batches", id]) => match self.batch(id) {
                Some(batch) => MockReply::json(200, batch.to_json(context).to_string()),
                None => not_found("Batch", id, 404, "id"),
            },
            ("POST", ["batches", id, "cancel"]) => self.cancel(id, context),
            (method, ["files" | "batches", ..]) => return Some(method_not_allowed(path, method)),
            _ => return None,
        };
        Some(MockResponse::Complete(reply))
    }

    fn upload(&mut self, request: &MockRequest, context: &BatchContext) -> MockReply {
        let content_type = request.content_type.unwrap_or_default();
        let upload = match upload::parse(content_type, request.body) {
            Ok(upload) => upload,
            Err(problem) => return MockReply::error(400, problem, Value::Null),
        };
        let invisible_time = crate::mock::faults::duration_from_s(context.script.batch.missing_s);
        let file = StoredFile {
            name: upload.filename,
            purpose: upload.purpose,
            content: Bytes::copy_from_slice(upload.content),
            visible_at: context.elapsed + invisible_time,
            created: context.virtual_now(),
        };
        let id = self.next_file_id();
        let json = file.to_json(&id, context);
        self.files.insert(id, file);
        MockReply::json(200, json.to_string())
    }

    fn next_file_id(&mut self) -> String {
        self.assigned_file_ids += 1;
        format!("file-{:024}", self.assigned_file_ids)
    }

    /// Returns the reply of `respond` for a visible file, or a 404.
    fn with_file(
        &self,
        id: &str,
        context: &BatchContext,
        respond: impl FnOnce(&StoredFile) -> MockReply,
    ) -> MockReply {
        match self
            .files
            .get(id)
            .filter(|file| file.visible_at <= context.elapsed)
        {
            Some(file) => respond(file),
            None => not_found("File", id, 404, "id"),
        }
    }

    fn list_files(&self, context: &BatchContext) -> MockReply {
        let visible = self
            .files
            .iter()
            .filter(|(_, file)| file.visible_at <= context.elapsed);
        let entries: Vec<Value> = visible
            .map(|(id, file)| file.to_json(id, context))
            .collect();
        MockReply::json(200, list_page(entries, false).to_string())
    }

    fn delete(&mut self, id: &str, context: &BatchContext) -> MockReply {
        let deleted = json!({"id": id, "object": "file", "deleted": true});
        let reply = self.with_file(id, context, |_| MockReply::json(200, deleted.to_string()));
        if reply.status == 200 {
            self.files.remove(id);
        }
        reply
    }

    fn batch(&self, id: &str) -> Option<&BatchJob> {
        self.batches.iter().find(|batch| batch.id == id)
    }

    fn create(&mut self, body: &[u8], context: &BatchContext) -> MockResponse {
        match self.try_create(body, context) {
            Ok(_) if self.batches.len() <= context.script.batch.lost_creates as usize => {
                MockResponse::Reset
            }
            Ok(reply) | Err(reply) => MockResponse::Complete(reply),
        }
    }

    fn try_create(&mut self, body: &[u8], context: &BatchContext) -> Result<MockReply, MockReply> {
        let script = context.script;
        let body: Value = serde_json::from_slice(body)
            .map_err(|_| MockReply::error(400, "The body is not valid JSON.", Value::Null))?;
        let required = |param: &str| {
            body[param].as_str().map(String::from).ok_or_else(|| {
                let message = format!("Missing required parameter: '{param}'.");
                MockReply::bad_field(param, &message, "missing_required_parameter")
            })
        };
        let input_file_id = required("input_file_id")?;
        let endpoint = required("endpoint")?;
        let completion_window = required("completion_window")?;
        let window_s = parse_window(&completion_window).ok_or_else(|| {
            // The message of OpenAI. The mock accepts other windows too.
            let message =
                format!("Invalid value: '{completion_window}'. Supported values are: '24h'.");
            MockReply::bad_field("completion_window", &message, "invalid_value")
        })?;
        let file = self.files.get(&input_file_id);
        let file = file.filter(|file| file.visible_at <= context.elapsed);
        let file = file.ok_or_else(|| not_found("File", &input_file_id, 400, "input_file_id"))?;
        let (rows, mut errors) = rows::parse_input_file(&file.content, &endpoint, script);
        if script.batch.outcome == ScriptedOutcome::Failed && errors.is_empty() {
            let message = "The script fails this batch.";
            errors.push(error_entry(
                "invalid_request",
                Some(1),
                Some("body"),
                message,
            ));
        }
        if let Some(limit) = script.batch.enqueued_tokens {
            let enqueued: u64 = self
                .batches
                .iter()
                .filter(|batch| !batch.snapshot(context).status.is_final())
                .map(BatchJob::tokens)
                .fold(0, u64::saturating_add);
            if enqueued.saturating_add(total_tokens(&rows)) > limit {
                let message = format!(
                    "Enqueued token limit reached for {} in organization org-mock. Limit: {limit} \
                     enqueued tokens. Please try again once some in_progress batches have been \
                     completed.",
                    script.model_name()
                );
                errors.push(error_entry("token_limit_exceeded", None, None, &message));
            }
        }
        let number = self.batches.len() as u64;
        let batch = BatchJob {
            id: format!("batch_{number:024}"),
            input_file_id,
            endpoint,
            completion_window,
            metadata: body["metadata"].clone(),
            lifecycle: BatchLifecycle {
                created: context.virtual_now(),
                window_s,
                rows: rows.len(),
                is_invalid: !errors.is_empty(),
                cancelled: None,
            },
            errors,
            plan: plan_rows(rows.len(), script, number),
            rows,
            results: None,
        };
        let json = batch.to_json(context);
        self.batches.push(batch);
        Ok(MockReply::json(200, json.to_string()))
    }

    /// Lists batches, newest first: up to `limit`, starting after the batch `after`.
    fn list_batches(&self, query: &str, context: &BatchContext) -> MockReply {
        let parameter = |name: &str| {
            let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs
                .filter(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .next()
        };
        let limit = parameter("limit").and_then(|limit| limit.parse().ok());
        let limit = limit.unwrap_or(DEFAULT_PAGE_SIZE).clamp(1, MAX_PAGE_SIZE);
        let mut batches = self.batches.iter().rev();
        if let Some(after) = parameter("after") {
            batches.by_ref().find(|batch| batch.id == after);
        }
        let entries: Vec<Value> = batches
            .by_ref()
            .take(limit)
            .map(|batch| batch.to_json(context))
            .collect();
        MockReply::json(
            200,
            list_page(entries, batches.next().is_some()).to_string(),
        )
    }

    fn cancel(&mut self, id: &str, context: &BatchContext) -> MockReply {
        let Some(batch) = self.batches.iter_mut().find(|batch| batch.id == id) else {
            return not_found("Batch", id, 404, "id");
        };
        match batch.snapshot(context).status {
            BatchStatus::Validating | BatchStatus::InProgress => {
                batch.lifecycle.cancelled = Some(context.virtual_now());
                MockReply::json(200, batch.to_json(context).to_string())
            }
            BatchStatus::Cancelling => MockReply::json(200, batch.to_json(context).to_string()),
            status => {
                let message = format!("Cannot cancel a batch with status '{}'.", status.as_str());
                MockReply::error(409, &message, Value::Null)
            }
        }
    }

    /// Writes the result files of the batches that ended since the last call.
    pub(crate) fn write_results(&mut self, context: &BatchContext, answer: &mut AnswerRowFn) {
        for index in 0..self.batches.len() {
            let batch = &self.batches[index];
            let snapshot = batch.snapshot(context);
            if batch.results.is_some() || !snapshot.status.is_final() {
                continue;
            }
            let (mut results, output, errors) = batch.run_rows(&snapshot, answer);
            let created = snapshot.ended_at.unwrap_or_default();
            results.output_file_id = self.store_result("output", output, created, context);
            results.error_file_id = self.store_result("error", errors, created, context);
            self.batches[index].results = Some(results);
        }
    }

    /// Stores a result file, unless it is empty, and returns its id.
    fn store_result(
        &mut self,
        kind: &str,
        content: Vec<u8>,
        created: f64,
        context: &BatchContext,
    ) -> Option<String> {
        if content.is_empty() {
            return None;
        }
        let id = self.next_file_id();
        let file = StoredFile {
            name: format!("{id}_{kind}.jsonl"),
            purpose: "batch_output".into(),
            content: content.into(),
            visible_at: context.elapsed,
            created,
        };
        self.files.insert(id.clone(), file);
        Some(id)
    }
}

impl StoredFile {
    fn to_json(&self, id: &str, context: &BatchContext) -> Value {
        json!({
            "id": id,
            "object": "file",
            "bytes": self.content.len(),
            "created_at": context.unix_time(self.created),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        })
    }
}

/// Parses a completion window such as `24h` or `7d`. Returns seconds.
fn parse_window(window: &str) -> Option<f64> {
    let unit = match window.chars().last()? {
        'h' => 3600.0,
        'd' => 86_400.0,
        _ => return None,
    };
    let count: u16 = window[..window.len() - 1].parse().ok()?;
    Some(f64::from(count) * unit)
}

fn list_page(entries: Vec<Value>, has_more: bool) -> Value {
    let id = |entry: Option<&Value>| entry.map_or(Value::Null, |entry| entry["id"].clone());
    json!({
        "object": "list",
        "first_id": id(entries.first()),
        "last_id": id(entries.last()),
        "data": entries,
        "has_more": has_more,
    })
}

fn not_found(object: &str, id: &str, status: u16, param: &str) -> MockReply {
    let message = format!("No such {object} object: {id}");
    let reply = MockReply::bad_field(param, &message, Value::Null);
    MockReply { status, ..reply }
}
