//! Scores texts: computes the logprob of every token.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::sampling::TokenLogprobs;
use super::{Model, ModelInput};

/// A text to score.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScoreInput<'a> {
    /// Token ids (T).
    pub ids: &'a [u32],
    /// Number of most likely tokens (K) to report at each position.
    pub top_k: usize,
}

/// A token whose logprob is read from the logits of the position before it.
struct ScoredToken {
    id: u32,
    top_k: usize,
}

/// Returns the logprobs of the tokens of each text, without the first token, which has no context (T - 1 per
/// text). All texts share one forward pass. Ids of `vocabulary` and above are padding of the model's
/// embedding and excluded from the softmax.
///
/// # Errors
/// Where a text does not fit the model, or its logits are not finite.
pub(crate) fn score(
    model: &Model,
    vocabulary: usize,
    texts: &[ScoreInput],
) -> Result<Vec<Vec<TokenLogprobs>>> {
    let mut input_ids = Vec::new();
    let mut segments = Vec::new();
    let mut positions = Vec::new();
    let mut scored_tokens = Vec::new();
    for &ScoreInput { ids, top_k } in texts.iter().filter(|text| !text.ids.is_empty()) {
        let start = input_ids.len();
        input_ids.extend(ids);
        segments.push(Range {
            start,
            end: input_ids.len(),
        });
        positions.extend(start as u32..input_ids.len() as u32 - 1);
        scored_tokens.extend(ids[1..].iter().map(|&id| ScoredToken { id, top_k }));
    }
    let in_vocabulary = scored_tokens
        .iter()
        .all(|token| (token.id as usize) < vocabulary);
    ensure!(
        in_vocabulary,
        "the text has token ids outside the vocabulary of {vocabulary}"
    );
    if positions.is_empty() {
        return Ok(vec![Vec::new(); texts.len()]);
    }
    let input = ModelInput {
        input_ids: &input_ids,
        segments: &segments,
        positions: &positions,
    };
    let logprobs = model.map_logits(input, |index, logits| {
        let ScoredToken { id, top_k } = scored_tokens[index];
        let logits = &logits[..vocabulary];
        let is_finite = logits.iter().all(|logit| logit.is_finite());
        is_finite.then(|| TokenLogprobs::from_logits(logits, id, top_k))
    })?;
    let logprobs: Option<Vec<TokenLogprobs>> = logprobs.into_iter().collect();
    let Some(logprobs) = logprobs else {
        anyhow::bail!("the model's logits are not finite; its weights are damaged");
    };
    let mut logprobs = logprobs.into_iter();
    let take_logprobs = |text: &ScoreInput| {
        let count = text.ids.len().saturating_sub(1);
        logprobs.by_ref().take(count).collect()
    };
    Ok(texts.iter().map(take_logprobs).collect())
}
