//! [`BatchJob`]: the rows of a batch, their planned results, and the JSON of the batch.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::mock::batch::context::BatchContext;
use crate::mock::batch::lifecycle::{BatchLifecycle, BatchSnapshot, BatchStatus};
use crate::mock::batch::rows;
use crate::mock::batch::rows::{BatchRow, total_tokens};
use crate::mock::response::MockReply;
use crate::mock::script::Script;
use crate::mock::script::batch::RequestCountsMode;

/// A batch.
#[derive(Debug)]
pub(crate) struct BatchJob {
    pub id: String,
    pub input_file_id: String,
    pub endpoint: String,
    pub completion_window: String,
    pub metadata: Value,
    pub lifecycle: BatchLifecycle,
    /// Validation errors. They are reported when validation ends.
    pub errors: Vec<Value>,
    pub rows: Vec<BatchRow>,
    /// Index and planned result of each row, in processing order.
    pub plan: Vec<(usize, PlannedResult)>,
    /// None until the batch has ended.
    pub results: Option<BatchResults>,
}

/// The result of a row, as the script determines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlannedResult {
    Answer,
    /// A line of the error file. Format 0 has a response with status 500, 1 has only an error, and 2 has an empty
    /// response.
    Error(usize),
    /// No line in either result file.
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

/// Function that answers the body of a row with a status and a response body.
pub(crate) type AnswerRowFn<'a> = dyn FnMut(&[u8]) -> (u16, Bytes) + 'a;

impl BatchJob {
    /// Returns the state of the batch at the time of `context`.
    pub(crate) fn snapshot(&self, context: &BatchContext) -> BatchSnapshot {
        self.lifecycle
            .snapshot(&context.script.batch, context.virtual_now())
    }

    /// Returns the number of tokens of all rows: prompt tokens and `max_tokens`.
    pub(crate) fn tokens(&self) -> u64 {
        total_tokens(&self.rows)
    }

    /// Answers the rows. Returns the results, and the contents of the output file and the error file.
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
        for (position, &(index, planned)) in self.plan.iter().enumerate() {
            let row = &self.rows[index];
            let number = self.id.trim_start_matches("batch_");
            let id = format!("batch_req_{number}_{index}");
            let line = if position < snapshot.processed_rows {
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
                            MockReply::error(500, "The server had an error.", "server_error");
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

    /// Returns the batch object.
    pub(crate) fn to_json(&self, context: &BatchContext) -> Value {
        let snapshot = self.snapshot(context);
        let status = match (&context.script.batch.status, snapshot.status) {
            (Some(other), BatchStatus::InProgress) => other,
            (_, status) => status.as_str(),
        };
        let unix_time = |virtual_s: Option<f64>| virtual_s.map(|time| context.unix_time(time));
        let ended_as = |status: BatchStatus| {
            unix_time(snapshot.ended_at.filter(|_| snapshot.status == status))
        };
        let results = self.results.as_ref();
        let errors = (snapshot.status == BatchStatus::Failed)
            .then(|| json!({"object": "list", "data": self.errors}));
        json!({
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": status,
            "output_file_id": results.and_then(|results| results.output_file_id.as_ref()),
            "error_file_id": results.and_then(|results| results.error_file_id.as_ref()),
            "created_at": context.unix_time(self.lifecycle.created),
            "in_progress_at": unix_time(snapshot.in_progress_at),
            "expires_at": context.unix_time(self.lifecycle.expires()),
            "finalizing_at": unix_time(snapshot.finalizing_at),
            "completed_at": ended_as(BatchStatus::Completed),
            "failed_at": ended_as(BatchStatus::Failed),
            "expired_at": ended_as(BatchStatus::Expired),
            "cancelling_at": unix_time(snapshot.cancelling_at),
            "cancelled_at": ended_as(BatchStatus::Cancelled),
            "request_counts": self.request_counts(context.script, &snapshot),
            "metadata": self.metadata,
        })
    }

    fn request_counts(&self, script: &Script, snapshot: &BatchSnapshot) -> Value {
        let total = snapshot.in_progress_at.map_or(0, |_| self.rows.len());
        match script.batch.request_counts {
            RequestCountsMode::Null => Value::Null,
            RequestCountsMode::Zero => counts(0, 0, 0),
            RequestCountsMode::AllCompleted if snapshot.status.is_final() => {
                counts(total, total, 0)
            }
            RequestCountsMode::AllCompleted => counts(total, snapshot.processed_rows, 0),
            RequestCountsMode::Right => match &self.results {
                Some(results) => counts(total, results.completed, results.failed),
                None => {
                    let processed = &self.plan[..snapshot.processed_rows];
                    let is_answer =
                        |(_, planned): &&(usize, PlannedResult)| *planned == PlannedResult::Answer;
                    let completed = processed.iter().filter(is_answer).count();
                    counts(total, completed, snapshot.processed_rows - completed)
                }
            },
        }
    }
}

fn counts(total: usize, completed: usize, failed: usize) -> Value {
    json!({"total": total, "completed": completed, "failed": failed})
}

/// Shuffles the rows and plans the result of each, by the seed and the number of the batch.
pub(crate) fn plan_rows(
    rows: usize,
    script: &Script,
    batch_number: u64,
) -> Vec<(usize, PlannedResult)> {
    let batch_script = &script.batch;
    let mut order: Vec<usize> = (0..rows).collect();
    // 2^32 divided by the golden ratio spreads small numbers over more bits.
    let mut rng = fastrand::Rng::with_seed(script.seed ^ batch_number.wrapping_mul(0x9e37_79b9));
    rng.shuffle(&mut order);
    let mut results: Vec<PlannedResult> = (0..rows)
        .map(|index| match index {
            _ if index < batch_script.error_rows => PlannedResult::Error(index % 3),
            _ if index - batch_script.error_rows < batch_script.lost_rows => PlannedResult::Lost,
            _ => PlannedResult::Answer,
        })
        .collect();
    rng.shuffle(&mut results);
    order.into_iter().zip(results).collect()
}
