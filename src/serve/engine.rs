//! The thread that owns the model: requests come in by a channel, and share its forward passes.

use std::collections::HashMap;

use tokio::sync::mpsc;

use crate::data::tokenizer::Tokenizer;
use crate::model::Model;
use crate::model::generate::{Batcher, GenerateOptions, Update};

/// One answer to generate.
pub struct Job {
    /// Token ids, ready to be continued.
    pub prompt: Vec<u32>,
    pub options: GenerateOptions,
    /// Which of the request's answers this is.
    pub index: usize,
    /// Where the updates go. A closed channel means that the client has gone: the job is dropped,
    /// or its answer is given up and its slot freed before the next forward pass.
    pub reply: mpsc::UnboundedSender<Reply>,
}

/// News of one answer.
pub struct Reply {
    /// As in the [`Job`].
    pub index: usize,
    /// The message of an error ends the answer.
    pub update: Result<Update, String>,
}

/// Answers jobs, `batch_size` at once, until every sender of `jobs` is gone and all is answered.
///
/// Jobs wait in the channel itself until a slot is free, so its capacity bounds the queue.
pub fn run(model: &Model, tokenizer: &Tokenizer, batch_size: usize, jobs: mpsc::Receiver<Job>) {
    let mut engine = Engine {
        batcher: Batcher::new(model, tokenizer, batch_size),
        clients: HashMap::new(),
        jobs,
    };
    while engine.admit() {
        engine.drop_deserted();
        engine.step();
    }
}

struct Engine<'a> {
    batcher: Batcher<'a>,
    /// Index and channel of each answer under way, by the batcher's id.
    clients: HashMap<u64, (usize, mpsc::UnboundedSender<Reply>)>,
    jobs: mpsc::Receiver<Job>,
}

impl Engine<'_> {
    /// Fills the free slots; waits for a job while there is nothing to do. False at the end.
    fn admit(&mut self) -> bool {
        while self.batcher.has_room() {
            let job = if self.batcher.is_idle() {
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
            if !job.reply.is_closed() {
                self.start(job);
            }
        }
        true
    }

    fn start(&mut self, job: Job) {
        match self.batcher.submit(job.prompt, &job.options) {
            Ok(id) => {
                self.clients.insert(id, (job.index, job.reply));
            }
            Err(error) => send(&job.reply, job.index, Err(format!("{error:#}"))),
        }
    }

    fn drop_deserted(&mut self) {
        self.clients.retain(|&id, (_, reply)| {
            let deserted = reply.is_closed();
            if deserted {
                tracing::debug!(id, "the client has gone; its answer is given up");
                self.batcher.cancel(id);
            }
            !deserted
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

    fn deliver(&mut self, update: Update) {
        let (id, last) = (update.id, update.finish_reason.is_some());
        if let Some((index, reply)) = self.clients.get(&id) {
            send(reply, *index, Ok(update));
        }
        if last {
            self.clients.remove(&id);
        }
    }
}

/// A client that has gone is found out by [`Engine::drop_deserted`].
fn send(reply: &mpsc::UnboundedSender<Reply>, index: usize, update: Result<Update, String>) {
    let _gone = reply.send(Reply { index, update });
}
