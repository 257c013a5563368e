//! The thread that owns the model. Jobs arrive through a channel and share the model's forward passes.

use std::collections::HashMap;

use tokio::sync::{mpsc, oneshot};

use crate::model::Model;
use crate::model::batcher::{Batcher, GenerateOptions, TokenUpdate};
use crate::model::sampling::TokenLogprobs;
use crate::model::score::{self, ScoreInput};
use crate::tokenizer::Tokenizer;

/// Number of tokens at which a scoring pass is full: no further text is added. The last text may exceed it.
const SCORED_TOKENS_PER_PASS: usize = 4096;

/// A job for the model.
pub(crate) enum EngineJob {
    Generate(GenerateJob),
    Score(ScoreJob),
}

/// A text whose tokens are scored.
pub(crate) struct ScoreJob {
    /// Token ids (T).
    pub ids: Vec<u32>,
    /// Number of most likely tokens to return at each position.
    pub top_k: usize,
    /// Receives the logprobs of each token except the first (T - 1), or an error message.
    pub reply: oneshot::Sender<Result<Vec<TokenLogprobs>, String>>,
}

/// An answer to generate.
pub(crate) struct GenerateJob {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    pub options: GenerateOptions,
    /// Index of the answer within its request.
    pub index: usize,
    /// Receives the updates. A closed channel means that the client has disconnected: a queued job
    /// is dropped; a running one is cancelled before the next forward pass, which frees its slot.
    pub reply: mpsc::UnboundedSender<AnswerUpdate>,
}

/// New text of one answer, or the error that ends it.
pub(crate) struct AnswerUpdate {
    /// Index of the answer within its request.
    pub index: usize,
    /// The update, or an error message, after which the answer gets no more updates.
    pub update: Result<TokenUpdate, String>,
}

/// Runs jobs, up to `batch_size` answers at the same time, until every sender of `jobs` is dropped and
/// all jobs are finished.
///
/// Jobs wait in the channel until a slot is free, so the capacity of the channel bounds the queue.
pub(crate) fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    batch_size: usize,
    jobs: mpsc::Receiver<EngineJob>,
) {
    let mut engine = Engine {
        batcher: Batcher::new(model, tokenizer, batch_size),
        clients: HashMap::new(),
        score_jobs: Vec::new(),
        jobs,
        model,
        tokenizer,
    };
    while engine.admit() {
        engine.cancel_disconnected();
        engine.score();
        engine.step();
    }
}

struct Engine<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    batcher: Batcher<'a>,
    /// Jobs of the next scoring pass.
    score_jobs: Vec<ScoreJob>,
    /// The running answers by their id in the batcher: index within the request, and reply channel.
    clients: HashMap<u64, (usize, mpsc::UnboundedSender<AnswerUpdate>)>,
    jobs: mpsc::Receiver<EngineJob>,
}

impl Engine<'_> {
    /// Takes jobs from the channel while slots are free and the scoring pass is not full. Blocks while the engine has
    /// no jobs. Returns false once every sender is dropped and all jobs are finished.
    fn admit(&mut self) -> bool {
        while self.batcher.has_free_slot() && self.tokens_to_score() < SCORED_TOKENS_PER_PASS {
            let job = if self.batcher.is_idle() && self.score_jobs.is_empty() {
                match self.jobs.blocking_recv() {
                    Some(job) => job,
                    None => return false,
                }
            } else {
                match self.jobs.try_recv() {
                    Ok(job) => job,
                    Err(_) => return true,
                }
            };
            match job {
                EngineJob::Generate(job) if !job.reply.is_closed() => self.start(job),
                EngineJob::Score(job) if !job.reply.is_closed() => self.score_jobs.push(job),
                EngineJob::Generate(_) | EngineJob::Score(_) => {}
            }
        }
        true
    }

    fn tokens_to_score(&self) -> usize {
        self.score_jobs.iter().map(|job| job.ids.len()).sum()
    }

    fn start(&mut self, job: GenerateJob) {
        match self.batcher.submit(job.prompt, &job.options) {
            Ok(id) => {
                self.clients.insert(id, (job.index, job.reply));
            }
            Err(error) => send(&job.reply, job.index, Err(format!("{error:#}"))),
        }
    }

    /// Scores the texts of all waiting score jobs in one forward pass.
    fn score(&mut self) {
        let jobs = std::mem::take(&mut self.score_jobs);
        if jobs.is_empty() {
            return;
        }
        let vocabulary = self.model.config().vocab_size;
        let vocabulary = vocabulary.min(self.tokenizer.vocab_size());
        let inputs: Vec<ScoreInput> = jobs
            .iter()
            .map(|job| ScoreInput {
                ids: &job.ids,
                top_k: job.top_k,
            })
            .collect();
        let result = score::score(self.model, vocabulary, &inputs);
        let result = result.map_err(|error| format!("{error:#}"));
        if let Err(message) = &result {
            tracing::error!("the forward pass failed: {message}");
        }
        for (index, job) in jobs.into_iter().enumerate() {
            let logprobs = result
                .as_ref()
                .map(|logprobs| logprobs[index].clone())
                .map_err(String::clone);
            // The client may have disconnected.
            let _ = job.reply.send(logprobs);
        }
    }

    fn cancel_disconnected(&mut self) {
        self.clients.retain(|&id, (_, reply)| {
            let is_disconnected = reply.is_closed();
            if is_disconnected {
                tracing::debug!(id, "client disconnected; its answer is cancelled");
                self.batcher.cancel(id);
            }
            !is_disconnected
        });
    }

    fn step(&mut self) {
        match self.batcher.step() {
            Ok(updates) => {
                for update in updates {
                    self.deliver(update);
                }
            }
            Err(error) => {
                let message = format!("{error:#}");
                tracing::error!("the forward pass failed: {message}");
                self.batcher.clear();
                for (index, reply) in std::mem::take(&mut self.clients).into_values() {
                    send(&reply, index, Err(message.clone()));
                }
            }
        }
    }

    fn deliver(&mut self, update: TokenUpdate) {
        let id = update.id;
        let is_last = update.finish_reason.is_some();
        if let Some((index, reply)) = self.clients.get(&id) {
            send(reply, *index, Ok(update));
        }
        if is_last {
            self.clients.remove(&id);
        }
    }
}

/// Sends an update. Ignores a closed channel: [`Engine::cancel_disconnected`] handles disconnected clients.
fn send(
    reply: &mpsc::UnboundedSender<AnswerUpdate>,
    index: usize,
    update: Result<TokenUpdate, String>,
) {
    let _ = reply.send(AnswerUpdate { index, update });
}
