//! One batch: its rows, their planned results and its JSON.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::mock::batch::context::BatchContext;
use crate::mock::batch::lifecycle::{BatchLifecycle, BatchSnapshot, BatchStatus};
use crate::mock::batch::rows;
use crate::mock::batch::rows::BatchRow;
use crate::mock::response::HttpReply;
use crate::mock::script::Script;
use crate::mock::script::batch::RequestCountsMode;

/// A batch.
#[derive(Debug)]
pub(crate) struct BatchJob {
    pub id: String,
    pub input_file_id: String,
    pub endpoint: String,
    pub window: String,
    pub metadata: Value,
    pub lifecycle: BatchLifecycle,
    /// Validation errors, reported when validation ends.
    pub errors: Vec<Value>,
    pub rows: Vec<BatchRow>,
    /// Row index and planned result, in processing order.
    pub order: Vec<(usize, PlannedResult)>,
    pub results: Option<BatchResults>,
}

/// The result that the script plans for a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlannedResult {
    Answer,
    /// One of three kinds of line in the error file.
    Error(usize),
    /// In neither file.
    Lost,
}

/// The results of a batch that has ended.
#[derive(Debug, Default)]
pub(crate) struct BatchResults {
    pub output_file_id: Option<String>,
    pub error_file_id: Option<String>,
    pub completed: usize,
    pub failed: usize,
}

/// Answers the body of a row: returns a status and a response body.
pub(crate) type AnswerRowFn<'a> = dyn FnMut(&[u8]) -> (u16, Bytes) + 'a;

impl BatchJob {
    pub(crate) fn snapshot(&self, context: &BatchContext) -> BatchSnapshot {
        self.lifecycle.at(&context.script.batch, context.now())
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.rows.iter().map(|row| row.tokens).sum()
    }

    /// Runs the rows. Returns the results and the contents of the output and the error file.
    pub(crate) fn run_rows(
        &self,
        snapshot: &BatchSnapshot,
        answer: &mut AnswerRowFn,
    ) -> (BatchResults, Vec<u8>, Vec<u8>) {
        let mut results = BatchResults::default();
        let mut output = Vec::new();
        let mut errors = Vec::new();
        if snapshot.status == BatchStatus::Failed {
            return (results, output, errors);
        }
        for (position, &(index, planned)) in self.order.iter().enumerate() {
            let row = &self.rows[index];
            let id = format!("batch_req_{}_{index}", &self.id[6..]);
            let line = if position < snapshot.done {
                match planned {
                    PlannedResult::Lost => continue,
                    PlannedResult::Answer => {
                        let (status, body) = answer(&row.body);
                        let line = rows::response_line(&id, &row.custom_id, status, &body);
                        if status == 200 {
                            results.completed += 1;
                            output.extend_from_slice(&line);
                            continue;
                        }
                        line
                    }
                    PlannedResult::Error(0) => {
                        let reply =
                            HttpReply::error(500, "The server had an error.", "server_error");
                        rows::response_line(&id, &row.custom_id, 500, &reply.body)
                    }
                    PlannedResult::Error(1) => {
                        let message = "The request failed.";
                        rows::error_line(&id, &row.custom_id, "server_error", message)
                    }
                    PlannedResult::Error(_) => rows::empty_response_line(&id, &row.custom_id),
                }
            } else if snapshot.status == BatchStatus::Expired {
                let message = "This request could not be executed before the completion \
                                   window expired.";
                rows::error_line(&id, &row.custom_id, "batch_expired", message)
            } else {
                let message = "This batch was cancelled before this request executed.";
                rows::error_line(&id, &row.custom_id, "batch_cancelled", message)
            };
            results.failed += 1;
            errors.extend_from_slice(&line);
        }
        (results, output, errors)
    }

    pub(crate) fn to_json(&self, context: &BatchContext) -> Value {
        let snapshot = self.snapshot(context);
        let status = match (&context.script.batch.status, snapshot.status) {
            (Some(other), BatchStatus::InProgress) => other,
            (_, status) => status.as_str(),
        };
        let stamp = |at: Option<f64>| at.map(|at| context.stamp(at));
        let ended = |end: BatchStatus| stamp(snapshot.ended_at.filter(|_| snapshot.status == end));
        let results = self.results.as_ref();
        let errors = (snapshot.status == BatchStatus::Failed)
            .then(|| json!({"object": "list", "data": self.errors}));
        json!({
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.window,
            "status": status,
            "output_file_id": results.and_then(|results| results.output_file_id.as_ref()),
            "error_file_id": results.and_then(|results| results.error_file_id.as_ref()),
            "created_at": context.stamp(self.lifecycle.created),
            "in_progress_at": stamp(snapshot.in_progress_at),
            "expires_at": context.stamp(self.lifecycle.expires()),
            "finalizing_at": stamp(snapshot.finalizing_at),
            "completed_at": ended(BatchStatus::Completed),
            "failed_at": ended(BatchStatus::Failed),
            "expired_at": ended(BatchStatus::Expired),
            "cancelling_at": stamp(snapshot.cancelling_at),
            "cancelled_at": ended(BatchStatus::Cancelled),
            "request_counts": self.request_counts(context.script, &snapshot),
            "metadata": self.metadata,
        })
    }

    fn request_counts(&self, script: &Script, snapshot: &BatchSnapshot) -> Value {
        let counts = |total: usize, completed: usize, failed: usize| json!({"total": total, "completed": completed, "failed": failed});
        let total = snapshot.in_progress_at.map_or(0, |_| self.rows.len());
        match script.batch.request_counts {
            RequestCountsMode::Null => Value::Null,
            RequestCountsMode::Zero => counts(0, 0, 0),
            RequestCountsMode::AllCompleted if snapshot.status.is_final() => {
                counts(total, total, 0)
            }
            RequestCountsMode::AllCompleted => counts(total, snapshot.done, 0),
            RequestCountsMode::Right => match &self.results {
                Some(results) => counts(total, results.completed, results.failed),
                None => {
                    let done = &self.order[..snapshot.done];
                    let is = |planned: &&(usize, PlannedResult)| planned.1 == PlannedResult::Answer;
                    let completed = done.iter().filter(is).count();
                    counts(total, completed, snapshot.done - completed)
                }
            },
        }
    }
}

/// Shuffles the rows and plans the result of each.
pub(crate) fn plan_rows(rows: usize, script: &Script, batch: u64) -> Vec<(usize, PlannedResult)> {
    let batch_script = &script.batch;
    let mut order: Vec<usize> = (0..rows).collect();
    let mut rng = fastrand::Rng::with_seed(script.seed ^ batch.wrapping_mul(0x9e37_79b9));
    rng.shuffle(&mut order);
    let mut results: Vec<PlannedResult> = (0..rows)
        .map(|place| match place {
            _ if place < batch_script.error_rows => PlannedResult::Error(place % 3),
            _ if place - batch_script.error_rows < batch_script.lost_rows => PlannedResult::Lost,
            _ => PlannedResult::Answer,
        })
        .collect();
    rng.shuffle(&mut results);
    order.into_iter().zip(results).collect()
}
