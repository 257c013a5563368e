//! The thread that owns the model: requests come in by a channel, and share its forward passes.

use std::collections::HashMap;

use tokio::sync::{mpsc, oneshot};

use crate::model::Model;
use crate::model::batcher::{Batcher, GenerateOptions, TokenUpdate};
use crate::model::sampling::TokenLogprobs;
use crate::model::score::{self, ScoreInput};
use crate::tokenizer::Tokenizer;

/// Tokens that are scored in one forward pass; a text that is longer has one of its own.
const SCORED_TOKENS_PER_PASS: usize = 4096;

/// What the model is to do.
pub(crate) enum Job {
    Answer(Answer),
    Score(Score),
}

/// A text whose tokens' logprobs are asked for.
pub(crate) struct Score {
    /// Token ids (T).
    pub ids: Vec<u32>,
    /// How many of the likeliest tokens to tell at each position.
    pub top: usize,
    /// Where the choices go (T - 1), or the message of an error.
    pub reply: oneshot::Sender<Result<Vec<TokenLogprobs>, String>>,
}

/// One answer to generate.
pub(crate) struct Answer {
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
pub(crate) struct Reply {
    /// As in the [`Answer`].
    pub index: usize,
    /// The message of an error ends the answer.
    pub update: Result<TokenUpdate, String>,
}

/// Answers jobs, `batch_size` at once, until every sender of `jobs` is gone and all is answered.
///
/// Jobs wait in the channel itself until a slot is free, so its capacity bounds the queue.
pub(crate) fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    batch_size: usize,
    jobs: mpsc::Receiver<Job>,
) {
    let mut engine = Engine {
        batcher: Batcher::new(model, tokenizer, batch_size),
        clients: HashMap::new(),
        texts: Vec::new(),
        jobs,
        model,
        tokenizer,
    };
    while engine.admit() {
        engine.drop_deserted();
        engine.score();
        engine.step();
    }
}

struct Engine<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    batcher: Batcher<'a>,
    /// To be scored in the next pass.
    texts: Vec<Score>,
    /// Index and channel of each answer under way, by the batcher's id.
    clients: HashMap<u64, (usize, mpsc::UnboundedSender<Reply>)>,
    jobs: mpsc::Receiver<Job>,
}

impl Engine<'_> {
    /// Fills the free slots; waits for a job while there is nothing to do. False at the end.
    fn admit(&mut self) -> bool {
        while self.batcher.has_free_slot() && self.tokens_to_score() < SCORED_TOKENS_PER_PASS {
            let job = if self.batcher.is_idle() && self.texts.is_empty() {
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
                Job::Answer(answer) if !answer.reply.is_closed() => self.start(answer),
                Job::Score(text) if !text.reply.is_closed() => self.texts.push(text),
                Job::Answer(_) | Job::Score(_) => {}
            }
        }
        true
    }

    fn tokens_to_score(&self) -> usize {
        self.texts.iter().map(|text| text.ids.len()).sum()
    }

    fn start(&mut self, answer: Answer) {
        match self.batcher.submit(answer.prompt, &answer.options) {
            Ok(id) => {
                self.clients.insert(id, (answer.index, answer.reply));
            }
            Err(error) => send(&answer.reply, answer.index, Err(format!("{error:#}"))),
        }
    }

    /// One forward pass over all texts that are to be scored.
    fn score(&mut self) {
        let texts = std::mem::take(&mut self.texts);
        if texts.is_empty() {
            return;
        }
        let vocabulary = self.model.config().vocab_size;
        let vocabulary = vocabulary.min(self.tokenizer.vocab_size());
        let inputs: Vec<ScoreInput> = texts
            .iter()
            .map(|text| ScoreInput {
                ids: &text.ids,
                top_k: text.top,
            })
            .collect();
        let scored = score::score(self.model, vocabulary, &inputs);
        let scored = scored.map_err(|error| format!("{error:#}"));
        if let Err(message) = &scored {
            tracing::error!("the forward pass failed: {message}");
        }
        for (at, text) in texts.into_iter().enumerate() {
            let choices = scored
                .as_ref()
                .map(|of_all| of_all[at].clone())
                .map_err(String::clone);
            let _gone = text.reply.send(choices);
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

    fn deliver(&mut self, update: TokenUpdate) {
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
fn send(reply: &mpsc::UnboundedSender<Reply>, index: usize, update: Result<TokenUpdate, String>) {
    let _gone = reply.send(Reply { index, update });
}
