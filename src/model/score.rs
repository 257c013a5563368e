//! How likely a given text is, token by token.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::sampling::Choice;
use super::{Input, Model};

/// A text to score: its token ids (T), and how many of the likeliest tokens to tell at each.
pub(crate) type Text<'a> = (&'a [u32], usize);

/// The logprobs of every token of each text but its first, which nothing comes before (T - 1 each),
/// in one forward pass. Ids from `vocabulary` on are padding of the model's embedding.
///
/// # Errors
/// Where a text does not fit the model, or its logits are no numbers.
pub(crate) fn score(model: &Model, vocabulary: usize, texts: &[Text]) -> Result<Vec<Vec<Choice>>> {
    let (mut input_ids, mut segments) = (Vec::new(), Vec::new());
    // Of each position whose logits are looked at: it, the token that follows, and how many to tell.
    let (mut positions, mut following) = (Vec::new(), Vec::new());
    for &(ids, top) in texts.iter().filter(|text| !text.0.is_empty()) {
        let start = input_ids.len();
        input_ids.extend(ids);
        segments.push(Range {
            start,
            end: input_ids.len(),
        });
        positions.extend(start as u32..input_ids.len() as u32 - 1);
        following.extend(ids[1..].iter().map(|&id| (id, top)));
    }
    let known = following.iter().all(|&(id, _)| (id as usize) < vocabulary);
    ensure!(known, "the text has token ids past the vocabulary");
    if positions.is_empty() {
        return Ok(vec![Vec::new(); texts.len()]);
    }
    let input = Input {
        input_ids: &input_ids,
        segments: &segments,
        positions: &positions,
    };
    let choices = model.map_logits(input, |at, logits| {
        let (id, top) = following[at];
        let logits = &logits[..vocabulary];
        let finite = logits.iter().all(|logit| logit.is_finite());
        finite.then(|| Choice::of(logits, id, top))
    })?;
    let choices: Option<Vec<Choice>> = choices.into_iter().collect();
    let Some(choices) = choices else {
        anyhow::bail!("the model's logits are no numbers; its weights are damaged");
    };
    let mut choices = choices.into_iter();
    let of_text = |text: &Text| {
        let count = text.0.len().saturating_sub(1);
        choices.by_ref().take(count).collect()
    };
    Ok(texts.iter().map(of_text).collect())
}
