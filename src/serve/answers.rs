//! What both ways of asking share: answers are queued, collected, and texts are scored.

use tokio::sync::{mpsc, oneshot};

use super::engine::{Answer, Job, Reply, Score};
use super::error::ApiError;
use crate::model::batcher::{FinishReason, GenerateOptions};
use crate::model::sampling::TokenLogprobs;
use crate::serve::state::App;

/// One answer as far as it has come.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub text: String,
    pub choices: Vec<TokenLogprobs>,
    pub finish_reason: Option<FinishReason>,
}

/// Queues `n` answers to each prompt, all of them or none. Those of prompt i have the indices from
/// i * n on.
///
/// # Errors
/// 503 where the queue has no room.
pub(crate) fn submit(
    app: &App,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    n: usize,
) -> Result<mpsc::UnboundedReceiver<Reply>, ApiError> {
    let slots = reserve(app, prompts.len() * n)?;
    // The client's disconnection drops the receiver, and so frees the slots.
    let (reply, replies) = mpsc::unbounded_channel();
    for (index, slot) in slots.enumerate() {
        let prompt = &prompts[index / n];
        let sampling = options.sampling.for_prompt(prompt);
        slot.send(Job::Answer(Answer {
            prompt: prompt.clone(),
            options: GenerateOptions {
                sampling: sampling.for_answer(index % n),
                ..options.clone()
            },
            index,
            reply: reply.clone(),
        }));
    }
    Ok(replies)
}

fn reserve(app: &App, jobs: usize) -> Result<mpsc::PermitIterator<'_, Job>, ApiError> {
    app.jobs
        .try_reserve_many(jobs)
        .map_err(|error| match error {
            mpsc::error::TrySendError::Full(()) => ApiError::overloaded(),
            mpsc::error::TrySendError::Closed(()) => stopped(),
        })
}

/// Waits for `count` answers, and counts their tokens.
///
/// # Errors
/// 500 where the model fails.
pub(crate) async fn collect(
    mut replies: mpsc::UnboundedReceiver<Reply>,
    count: usize,
) -> Result<(Vec<Written>, usize), ApiError> {
    let mut answers: Vec<Written> = (0..count).map(|_| Written::default()).collect();
    let mut tokens = 0;
    while let Some(reply) = replies.recv().await {
        let update = reply.update.map_err(ApiError::internal)?;
        let answer = &mut answers[reply.index];
        answer.text.push_str(&update.text);
        answer.choices.extend(update.token_logprobs);
        answer.finish_reason = update.finish_reason;
        tokens += 1;
    }
    if answers.iter().any(|answer| answer.finish_reason.is_none()) {
        return Err(stopped());
    }
    Ok((answers, tokens))
}

/// The logprobs of each text's tokens but its first, with the `top` likeliest at each.
///
/// # Errors
/// 503 where the queue has no room; 500 where the model fails.
pub(crate) async fn score(
    app: &App,
    texts: &[Vec<u32>],
    top: usize,
) -> Result<Vec<Vec<TokenLogprobs>>, ApiError> {
    let mut replies = Vec::with_capacity(texts.len());
    for (slot, ids) in reserve(app, texts.len())?.zip(texts) {
        let (reply, choices) = oneshot::channel();
        slot.send(Job::Score(Score {
            ids: ids.clone(),
            top,
            reply,
        }));
        replies.push(choices);
    }
    let mut scored = Vec::with_capacity(texts.len());
    for choices in replies {
        let choices = choices.await.map_err(|_| stopped())?;
        scored.push(choices.map_err(ApiError::internal)?);
    }
    Ok(scored)
}

fn stopped() -> ApiError {
    ApiError::internal("the model has stopped")
}
