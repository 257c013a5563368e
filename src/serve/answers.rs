//! Queues answers, collects them and scores texts, for both completion routes.

use tokio::sync::{mpsc, oneshot};

use super::engine::{AnswerUpdate, EngineJob, GenerateJob, ScoreJob};
use super::error::ErrorResponse;
use crate::model::batcher::{FinishReason, GenerateOptions};
use crate::model::sampling::TokenLogprobs;
use crate::serve::state::AppState;

/// An answer assembled from its updates.
#[derive(Debug, Default)]
pub(crate) struct CollectedAnswer {
    pub text: String,
    pub token_logprobs: Vec<TokenLogprobs>,
    pub finish_reason: Option<FinishReason>,
}

/// Queues `n` answers for each prompt, all of them or none. The answers to prompt i have the indices
/// i * n to i * n + n - 1.
///
/// # Errors
/// 503 if the queue is full; 400 if the answers do not fit an empty queue; 500 if the model thread has stopped.
pub(crate) fn submit(
    app: &AppState,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    n: usize,
) -> Result<mpsc::UnboundedReceiver<AnswerUpdate>, ErrorResponse> {
    let permits = reserve(app, prompts.len() * n)?;
    // When the client disconnects, the receiver is dropped: the engine drops queued answers and cancels running ones.
    let (reply, updates) = mpsc::unbounded_channel();
    for (index, permit) in permits.enumerate() {
        let prompt = &prompts[index / n];
        let sampling = options.sampling.for_prompt(prompt);
        permit.send(EngineJob::Generate(GenerateJob {
            prompt: prompt.clone(),
            options: GenerateOptions {
                sampling: sampling.for_answer(index % n),
                ..options.clone()
            },
            index,
            reply: reply.clone(),
        }));
    }
    Ok(updates)
}

/// Reserves room in the queue for `jobs` jobs, all of them or none.
///
/// # Errors
/// 503 if the queue is full; 400 if even an empty queue could not hold the jobs; 500 if the model thread has stopped.
fn reserve(
    app: &AppState,
    jobs: usize,
) -> Result<mpsc::PermitIterator<'_, EngineJob>, ErrorResponse> {
    let capacity = app.jobs.max_capacity();
    if jobs > capacity {
        return Err(ErrorResponse::bad_request(format!(
            "the request needs {jobs} places in the queue, which has {capacity}: lower `n` or the number of prompts, \
             or start the server with a larger `--queue`"
        )));
    }
    app.jobs
        .try_reserve_many(jobs)
        .map_err(|error| match error {
            mpsc::error::TrySendError::Full(()) => ErrorResponse::overloaded(),
            mpsc::error::TrySendError::Closed(()) => engine_stopped(),
        })
}

/// Waits for `count` answers. Returns the answers and the total number of their tokens.
///
/// # Errors
/// 500 if the model fails or its thread has stopped.
pub(crate) async fn collect(
    mut updates: mpsc::UnboundedReceiver<AnswerUpdate>,
    count: usize,
) -> Result<(Vec<CollectedAnswer>, usize), ErrorResponse> {
    let mut answers: Vec<CollectedAnswer> =
        (0..count).map(|_| CollectedAnswer::default()).collect();
    let mut tokens = 0;
    while let Some(AnswerUpdate { index, update }) = updates.recv().await {
        let update = update.map_err(ErrorResponse::internal)?;
        let answer = &mut answers[index];
        answer.text.push_str(&update.text);
        answer.token_logprobs.extend(update.token_logprobs);
        answer.finish_reason = update.finish_reason;
        tokens += 1;
    }
    if answers.iter().any(|answer| answer.finish_reason.is_none()) {
        return Err(engine_stopped());
    }
    Ok((answers, tokens))
}

/// Returns the logprobs of all tokens of each text except the first, with the `top_k` most likely
/// tokens at each position.
///
/// # Errors
/// 503 if the queue is full; 400 if the texts do not fit an empty queue; 500 if the model fails or its thread has
/// stopped.
pub(crate) async fn score(
    app: &AppState,
    texts: &[Vec<u32>],
    top_k: usize,
) -> Result<Vec<Vec<TokenLogprobs>>, ErrorResponse> {
    let mut receivers = Vec::with_capacity(texts.len());
    for (permit, ids) in reserve(app, texts.len())?.zip(texts) {
        let (reply, receiver) = oneshot::channel();
        permit.send(EngineJob::Score(ScoreJob {
            ids: ids.clone(),
            top_k,
            reply,
        }));
        receivers.push(receiver);
    }
    let mut logprobs = Vec::with_capacity(texts.len());
    for receiver in receivers {
        let result = receiver.await.map_err(|_| engine_stopped())?;
        logprobs.push(result.map_err(ErrorResponse::internal)?);
    }
    Ok(logprobs)
}

fn engine_stopped() -> ErrorResponse {
    ErrorResponse::internal("the model thread has stopped: restart the server")
}
