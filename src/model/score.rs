//! Scores texts: computes the logprob of every token.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::ops::Range;

use anyhow::{Result, ensure};

use super::sampling::TokenLogprobs;
use super::{Model, ModelInput, SourceInput};

/// A text to score.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScoreInput<'a> {
    /// Token ids (S).
    pub ids: &'a [u32],
    /// Number of most likely tokens (K) to report at each position.
    pub top_k: usize,
}

/// A token whose logprob is read from the logits of the position before it.
struct ScoredToken {
    id: u32,
    top_k: usize,
}

/// Returns the logprobs of the tokens of each text, except the first token, which has no context (S - 1 per text). All
/// texts share one forward pass. `vocabulary` is the number of tokens. Ids from this number on are padding of the
/// model's embedding and are excluded from the softmax.
///
/// # Errors
/// If a scored token is outside the vocabulary, a text does not fit the model's context, or its logits are not finite.
pub(crate) fn score(
    model: &Model,
    vocabulary: usize,
    texts: &[ScoreInput],
) -> Result<Vec<Vec<TokenLogprobs>>> {
    let mut input_ids_T = Vec::new();
    let mut segments_B = Vec::new();
    let mut positions_N = Vec::new();
    let mut scored_tokens = Vec::new();
    for &ScoreInput { ids, top_k } in texts.iter().filter(|text| !text.ids.is_empty()) {
        let start = input_ids_T.len();
        input_ids_T.extend(ids);
        segments_B.push(Range {
            start,
            end: input_ids_T.len(),
        });
        positions_N.extend(start as u32..input_ids_T.len() as u32 - 1);
        scored_tokens.extend(ids[1..].iter().map(|&id| ScoredToken { id, top_k }));
    }
    let in_vocabulary = scored_tokens
        .iter()
        .all(|token| (token.id as usize) < vocabulary);
    ensure!(
        in_vocabulary,
        "the text has token ids outside the vocabulary of {vocabulary}"
    );
    if positions_N.is_empty() {
        return Ok(vec![Vec::new(); texts.len()]);
    }
    let input = ModelInput {
        input_ids_T: &input_ids_T,
        segments_B: &segments_B,
        positions_N: &positions_N,
        source: SourceInput::default(),
    };
    let logprobs = model.map_logits(input, |index, logits_V| {
        let ScoredToken { id, top_k } = scored_tokens[index];
        let logits_V = &logits_V[..vocabulary];
        let is_finite = logits_V.iter().all(|logit| logit.is_finite());
        is_finite.then(|| TokenLogprobs::from_logits(logits_V, id, top_k))
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
