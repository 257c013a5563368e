//! Samples a token from a row of logits, and computes logprobs.
//!
//! A row has V logits, one per token of the vocabulary, at the index of the token id.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::cmp::Ordering;

use crate::ops::math;

/// Sampling parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 selects the most likely token; 1 samples from the model's own distribution.
    pub temperature: f64,
    /// The sampler chooses from the smallest set of most likely tokens with at least this probability mass, 0 to 1
    /// (nucleus sampling, Holtzman et al., arXiv 1904.09751).
    pub top_p: f64,
    /// Seed of the random numbers. The same seed, prompt and parameters give the same answer.
    pub seed: u64,
}

/// Greedy decoding.
impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Returns the parameters with a seed derived from `prompt` (token ids). With the same random numbers for
    /// many prompts, the answers would not be independent samples.
    pub(crate) fn for_prompt(&self, prompt: &[u32]) -> Self {
        let mut hash = blake3::Hasher::new();
        for id in prompt {
            hash.update(&id.to_le_bytes());
        }
        let hash = hash.finalize();
        let first_word = hash.as_bytes().first_chunk().copied().unwrap_or_default();
        Self {
            seed: self.seed ^ u64::from_le_bytes(first_word),
            ..self.clone()
        }
    }

    /// Returns the parameters for answer `index` of several answers that share the seed set by the user. Each answer
    /// gets its own seed; answer 0 keeps the user's seed. The other seeds are far from the small numbers that users
    /// choose.
    pub(crate) fn for_answer(&self, index: usize) -> Self {
        /// 2^64 divided by the golden ratio.
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        Self {
            seed: self.seed ^ GOLDEN.wrapping_mul(index as u64),
            ..self.clone()
        }
    }
}

/// A token at one position with its raw logprobs: before temperature and top_p, as vLLM reports them by
/// default.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub id: u32,
    pub logprob: f32,
    /// The K most likely tokens with their logprobs, most likely first.
    pub top: Vec<(u32, f32)>,
    /// True for the first token of an answer, whose bytes may differ: see `Tokenizer::answer_bytes`.
    pub is_first: bool,
}

impl TokenLogprobs {
    /// Computes the logprobs of `id` and of the `k` most likely tokens from a row of finite logits.
    pub(crate) fn from_logits(logits_V: &[f32], id: u32, k: usize) -> Self {
        let log_z = log_sum_exp(logits_V);
        // The sum is in f64 and at least exp(max), so that no logprob is rounded to a number above 0.
        let logprob = |logit: f32| (f64::from(logit) - log_z) as f32;
        Self {
            id,
            logprob: logprob(logits_V[id as usize]),
            top: top_k(logits_V, k)
                .into_iter()
                .map(|(id, logit)| (id, logprob(logit)))
                .collect(),
            is_first: false,
        }
    }
}

/// Samples the tokens of one answer.
#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: SamplingParams,
    rng: fastrand::Rng,
}

impl Sampler {
    /// Creates a sampler with the seed of `sampling`.
    pub(crate) fn new(sampling: &SamplingParams) -> Self {
        Self {
            sampling: sampling.clone(),
            rng: fastrand::Rng::with_seed(sampling.seed),
        }
    }

    /// Samples the next token from a row of finite logits.
    pub(crate) fn sample(&mut self, logits_V: &[f32]) -> u32 {
        let SamplingParams {
            temperature, top_p, ..
        } = self.sampling;
        if temperature == 0.0 {
            return argmax(logits_V);
        }
        let max = math::max(logits_V);
        let inverse = (1.0 / temperature).min(f64::from(f32::MAX)) as f32;
        let weights_V: Vec<f32> = logits_V
            .iter()
            .map(|logit| ((logit - max) * inverse).exp())
            .collect();
        let share = self.rng.f64();
        if top_p < 1.0 {
            sample_weighted(nucleus(&weights_V, top_p).iter().copied(), share)
        } else {
            sample_weighted((0..).zip(weights_V.iter().copied()), share)
        }
    }
}

/// Returns the id of the largest logit, and the lowest id among equal ones.
fn argmax(logits_V: &[f32]) -> u32 {
    top_k(logits_V, 1).first().map_or(0, |best| best.0)
}

/// Returns ln(sum(exp(logits))).
fn log_sum_exp(logits_V: &[f32]) -> f64 {
    let max = math::max(logits_V);
    let sum: f64 = logits_V
        .iter()
        .map(|logit| f64::from((logit - max).exp()))
        .sum();
    f64::from(max) + sum.ln()
}

/// Returns the `k` largest logits with their ids, largest first. Of equal logits, the lower id is first.
///
/// Takes one pass over the logits. Nearly all are below the k-th largest so far and cost one comparison.
fn top_k(logits_V: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
    let mut threshold = f32::NEG_INFINITY;
    for (id, &logit) in (0..).zip(logits_V) {
        if best.len() == k && logit <= threshold {
            continue;
        }
        let rank = best.partition_point(|&(_, better)| better >= logit);
        best.insert(rank, (id, logit));
        best.truncate(k);
        threshold = best.last().map_or(f32::INFINITY, |worst| worst.1);
    }
    best
}

/// Number of tokens that the first round of [`nucleus`] ranks.
const FIRST_ROUND: usize = 64;
/// Factor by which the number of ranked tokens grows with each round.
const ROUND_GROWTH: usize = 4;

/// Returns the smallest set of tokens that holds a share of `top_p` of the total weight, heaviest first. The
/// set has at least one token.
fn nucleus(weights_V: &[f32], top_p: f64) -> Vec<(u32, f32)> {
    let heaviest_first =
        |a: &(u32, f32), b: &(u32, f32)| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
    let total: f64 = weights_V.iter().copied().map(f64::from).sum();
    let mut ranked: Vec<(u32, f32)> = (0..).zip(weights_V.iter().copied()).collect();
    let mut start = 0;
    let mut size = FIRST_ROUND;
    let mut mass = 0.0;
    // The nucleus is usually small, so each round ranks a few more tokens, not the whole vocabulary.
    while start < ranked.len() {
        let end = (start + size).min(ranked.len());
        if end < ranked.len() {
            ranked[start..].select_nth_unstable_by(end - start, heaviest_first);
        }
        ranked[start..end].sort_unstable_by(heaviest_first);
        for index in start..end {
            mass += f64::from(ranked[index].1);
            if mass >= top_p * total {
                ranked.truncate(index + 1);
                return ranked;
            }
        }
        start = end;
        size *= ROUND_GROWTH;
    }
    ranked
}

/// Returns the first token at which the cumulative weight exceeds `share` (0 to 1) of the total weight.
fn sample_weighted(weights: impl Iterator<Item = (u32, f32)> + Clone, share: f64) -> u32 {
    let total: f64 = weights.clone().map(|token| f64::from(token.1)).sum();
    let mut remaining = share * total;
    let mut last = 0;
    for (id, weight) in weights.filter(|token| token.1 > 0.0) {
        remaining -= f64::from(weight);
        // If rounding leaves a remainder after the last token, that token is returned.
        last = id;
        if remaining < 0.0 {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `torch.tensor([1., 3., 2., 3., -1.]).log_softmax(-1)`
    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];
    const LOGPROBS: [f32; 5] = [-2.9249, -0.9249, -1.9249, -0.9249, -4.9249];

    fn sampler(temperature: f64, top_p: f64) -> Sampler {
        Sampler::new(&SamplingParams {
            temperature,
            top_p,
            seed: 7,
        })
    }

    #[test]
    fn temperature_0_selects_lowest_id_of_most_likely_tokens() {
        assert_eq!(sampler(0.0, 1.0).sample(&LOGITS), 1);
    }

    #[test]
    fn logprobs_are_log_softmax_most_likely_first() {
        let token = TokenLogprobs::from_logits(&LOGITS, 2, 3);
        assert!((token.logprob - LOGPROBS[2]).abs() < 1e-4);
        assert_eq!(token.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 2]);
        for (id, logprob) in token.top {
            assert!((logprob - LOGPROBS[id as usize]).abs() < 1e-4);
        }
        assert!(TokenLogprobs::from_logits(&LOGITS, 0, 0).top.is_empty());
        assert_eq!(TokenLogprobs::from_logits(&LOGITS, 0, 20).top.len(), 5);
    }

    #[test]
    fn logprob_of_certain_token_is_not_positive() {
        let token = TokenLogprobs::from_logits(&[0.0, 80.0, -3.0], 1, 1);
        assert!(token.logprob <= 0.0 && token.logprob > -1e-6);
    }

    #[test]
    fn samples_follow_distribution() {
        let mut sampler = sampler(1.0, 1.0);
        let mut counts = [0; 5];
        for _ in 0..20_000 {
            counts[sampler.sample(&LOGITS) as usize] += 1;
        }
        for (count, logprob) in counts.iter().zip(LOGPROBS) {
            let p = f64::from(logprob.exp());
            let n = 20_000.0;
            let deviation = (n * p * (1.0 - p)).sqrt();
            assert!((f64::from(*count) - n * p).abs() < 4.0 * deviation);
        }
    }

    #[test]
    fn top_p_keeps_smallest_set_with_that_mass() {
        // Probabilities: 0.397 (ids 1 and 3), 0.146, 0.054, 0.007.
        let weights = LOGITS.map(f32::exp);
        let ids = |top_p| -> Vec<u32> {
            let ranked = nucleus(&weights, top_p);
            ranked.into_iter().map(|token| token.0).collect()
        };
        assert_eq!(ids(0.0), [1]);
        assert_eq!(ids(0.5), [1, 3]);
        assert_eq!(ids(0.9), [1, 3, 2]);
        assert_eq!(ids(0.999), [1, 3, 2, 0, 4]);
        let mut sampler = sampler(1.0, 0.5);
        assert!((0..1000).all(|_| [1, 3].contains(&sampler.sample(&LOGITS))));
    }

    #[test]
    fn nucleus_of_flat_distribution_takes_several_rounds() {
        let weights = vec![1.0; 1000];
        let ranked = nucleus(&weights, 0.7);
        assert!(ranked.iter().map(|token| token.0).eq(0..700));
    }

    #[test]
    fn seed_is_reproducible_and_differs_between_answers() {
        let draws = |sampling: SamplingParams| -> Vec<u32> {
            let mut sampler = Sampler::new(&sampling);
            (0..32).map(|_| sampler.sample(&LOGITS)).collect()
        };
        let sampling = SamplingParams {
            temperature: 1.0,
            ..SamplingParams::default()
        };
        assert_eq!(draws(sampling.clone()), draws(sampling.for_answer(0)));
        assert_ne!(draws(sampling.clone()), draws(sampling.for_answer(1)));
    }

    #[test]
    fn tiny_temperature_is_greedy() {
        assert_eq!(sampler(1e-300, 1.0).sample(&[0.0, 0.1, 0.05]), 1);
    }
}
