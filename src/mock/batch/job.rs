//! One batch: its rows, what becomes of them, and what is told about it.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::mock::batch::context::Context;
use crate::mock::batch::life::{Life, Moment, Status};
use crate::mock::batch::rows;
use crate::mock::batch::rows::Row;
use crate::mock::response::Reply;
use crate::mock::script::Script;
use crate::mock::script::batch::RequestCounts;

#[derive(Debug)]
pub(crate) struct Batch {
    pub id: String,
    pub input_file_id: String,
    pub endpoint: String,
    pub window: String,
    pub metadata: Value,
    pub life: Life,
    /// What validation will find.
    pub mistakes: Vec<Value>,
    pub rows: Vec<Row>,
    /// What becomes of them, in the order in which they are worked on.
    pub order: Vec<(usize, Fate)>,
    pub results: Option<Results>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Answer,
    /// In one of three shapes.
    Error(usize),
    Lost,
}

/// What is left of a batch at its end.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub output_file_id: Option<String>,
    pub error_file_id: Option<String>,
    pub completed: usize,
    pub failed: usize,
}

/// The status and the body that a row earns, when it is asked for its answer.
pub(crate) type AnswerRow<'a> = dyn FnMut(&[u8]) -> (u16, Bytes) + 'a;

impl Batch {
    pub(crate) fn moment(&self, context: &Context) -> Moment {
        self.life.at(&context.script.batch, context.now())
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.rows.iter().map(|row| row.tokens).sum()
    }

    /// The results, and the content of the output and of the error file.
    pub(crate) fn work(
        &self,
        moment: &Moment,
        answer: &mut AnswerRow,
    ) -> (Results, Vec<u8>, Vec<u8>) {
        let mut results = Results::default();
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        if moment.status == Status::Failed {
            return (results, output, errors);
        }
        for (place, &(index, fate)) in self.order.iter().enumerate() {
            let row = &self.rows[index];
            let id = format!("batch_req_{}_{index}", &self.id[6..]);
            let line = match (fate, moment.status) {
                _ if place < moment.done => match fate {
                    Fate::Lost => continue,
                    Fate::Answer => {
                        let (status, body) = answer(&row.body);
                        let line = rows::responded(&id, &row.custom_id, status, &body);
                        if status == 200 {
                            results.completed += 1;
                            output.extend_from_slice(&line);
                            continue;
                        }
                        line
                    }
                    Fate::Error(0) => {
                        let reply = Reply::error(500, "The server had an error.", "server_error");
                        rows::responded(&id, &row.custom_id, 500, &reply.body)
                    }
                    Fate::Error(1) => {
                        let message = "The request failed.";
                        rows::unanswered(&id, &row.custom_id, "server_error", message)
                    }
                    Fate::Error(_) => rows::hollow(&id, &row.custom_id),
                },
                (_, Status::Expired) => {
                    let message = "This request could not be executed before the completion \
                                   window expired.";
                    rows::unanswered(&id, &row.custom_id, "batch_expired", message)
                }
                _ => {
                    let message = "This batch was cancelled before this request executed.";
                    rows::unanswered(&id, &row.custom_id, "batch_cancelled", message)
                }
            };
            results.failed += 1;
            errors.extend_from_slice(&line);
        }
        (results, output, errors)
    }

    pub(crate) fn card(&self, context: &Context) -> Value {
        let moment = self.moment(context);
        let status = match (&context.script.batch.status, moment.status) {
            (Some(other), Status::InProgress) => other,
            (_, status) => status.name(),
        };
        let stamp = |at: Option<f64>| at.map(|at| context.stamp(at));
        let ended = |end: Status| stamp(moment.ended_at.filter(|_| moment.status == end));
        let results = self.results.as_ref();
        let errors = (moment.status == Status::Failed)
            .then(|| json!({"object": "list", "data": self.mistakes}));
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
            "created_at": context.stamp(self.life.created),
            "in_progress_at": stamp(moment.in_progress_at),
            "expires_at": context.stamp(self.life.expires()),
            "finalizing_at": stamp(moment.finalizing_at),
            "completed_at": ended(Status::Completed),
            "failed_at": ended(Status::Failed),
            "expired_at": ended(Status::Expired),
            "cancelling_at": stamp(moment.cancelling_at),
            "cancelled_at": ended(Status::Cancelled),
            "request_counts": self.request_counts(context.script, &moment),
            "metadata": self.metadata,
        })
    }

    fn request_counts(&self, script: &Script, moment: &Moment) -> Value {
        let counts = |total: usize, completed: usize, failed: usize| json!({"total": total, "completed": completed, "failed": failed});
        let total = moment.in_progress_at.map_or(0, |_| self.rows.len());
        match script.batch.request_counts {
            RequestCounts::Null => Value::Null,
            RequestCounts::Zero => counts(0, 0, 0),
            RequestCounts::AllCompleted if moment.status.is_end() => counts(total, total, 0),
            RequestCounts::AllCompleted => counts(total, moment.done, 0),
            RequestCounts::Right => match &self.results {
                Some(results) => counts(total, results.completed, results.failed),
                None => {
                    let done = &self.order[..moment.done];
                    let is = |fate: &&(usize, Fate)| fate.1 == Fate::Answer;
                    let completed = done.iter().filter(is).count();
                    counts(total, completed, moment.done - completed)
                }
            },
        }
    }
}

/// The order in which rows are worked on, and what becomes of each: neither is that of the file.
pub(crate) fn fates(rows: usize, script: &Script, batch: u64) -> Vec<(usize, Fate)> {
    let batch_script = &script.batch;
    let mut order: Vec<usize> = (0..rows).collect();
    let mut draw = fastrand::Rng::with_seed(script.seed ^ batch.wrapping_mul(0x9e37_79b9));
    draw.shuffle(&mut order);
    let mut fates: Vec<Fate> = (0..rows)
        .map(|place| match place {
            _ if place < batch_script.error_rows => Fate::Error(place % 3),
            _ if place - batch_script.error_rows < batch_script.lost_rows => Fate::Lost,
            _ => Fate::Answer,
        })
        .collect();
    draw.shuffle(&mut fates);
    order.into_iter().zip(fates).collect()
}
