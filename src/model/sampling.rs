//! From one row of logits to one token, and to its logprobs.
//!
//! A row holds V logits, one for each token of the vocabulary; a token's id is its index.

use std::cmp::Ordering;

use crate::ops::math;

/// How the next token is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the likeliest token; 1 draws from the model's own distribution.
    pub temperature: f64,
    /// Draw among the likeliest tokens that together hold this share of the probability, 0 to 1
    /// (nucleus sampling, Holtzman et al. 2020).
    pub top_p: f64,
    /// The same seed, prompt and settings give the same answer.
    pub seed: u64,
}

/// Greedy.
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
    /// The same settings for this prompt (token ids): one seed for many prompts must not draw the same
    /// numbers for all of them, or their answers are no independent samples.
    pub fn for_prompt(&self, prompt: &[u32]) -> Self {
        let mut hash = blake3::Hasher::new();
        for id in prompt {
            hash.update(&id.to_le_bytes());
        }
        let [a, b, c, d, e, f, g, h, ..] = *hash.finalize().as_bytes();
        Self {
            seed: self.seed ^ u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            ..self.clone()
        }
    }

    /// The same settings for the `index`-th answer of a family that shares one seed. Answer 0
    /// keeps the seed; the others get seeds far from any that a user would count up to.
    pub fn for_answer(&self, index: usize) -> Self {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        Self {
            seed: self.seed ^ GOLDEN.wrapping_mul(index as u64),
            ..self.clone()
        }
    }
}

/// The token chosen at one position, with its raw logprobs: those of the model's own distribution,
/// before temperature and top_p (as vLLM's default).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub id: u32,
    pub logprob: f32,
    /// The k likeliest tokens with their logprobs, best first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// The logprobs of `id` and of the `k` likeliest tokens of a row of finite logits.
    pub fn from_logits(logits: &[f32], id: u32, k: usize) -> Self {
        let log_z = log_sum_exp(logits);
        // The sum is in f64 and at least exp(max), so no logprob rounds to above 0.
        let logprob = |logit: f32| (f64::from(logit) - log_z) as f32;
        Self {
            id,
            logprob: logprob(logits[id as usize]),
            top: top_k(logits, k)
                .into_iter()
                .map(|(id, logit)| (id, logprob(logit)))
                .collect(),
        }
    }
}

/// Draws the tokens of one answer.
#[derive(Debug)]
pub struct Sampler {
    sampling: SamplingParams,
    rng: fastrand::Rng,
}

impl Sampler {
    pub fn new(sampling: &SamplingParams) -> Self {
        Self {
            sampling: sampling.clone(),
            rng: fastrand::Rng::with_seed(sampling.seed),
        }
    }

    /// The next token, given a row of finite logits.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let SamplingParams {
            temperature, top_p, ..
        } = self.sampling;
        if temperature == 0.0 {
            return argmax(logits);
        }
        let max = math::max(logits);
        let inverse = (1.0 / temperature).min(f64::from(f32::MAX)) as f32;
        let weights: Vec<f32> = logits
            .iter()
            .map(|logit| ((logit - max) * inverse).exp())
            .collect();
        let share = self.rng.f64();
        if top_p < 1.0 {
            sample_weighted(nucleus(&weights, top_p).iter().copied(), share)
        } else {
            sample_weighted((0..).zip(weights.iter().copied()), share)
        }
    }
}

/// The likeliest token; the lowest id where several tie.
fn argmax(logits: &[f32]) -> u32 {
    top_k(logits, 1).first().map_or(0, |best| best.0)
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = math::max(logits);
    let sum: f64 = logits
        .iter()
        .map(|logit| f64::from((logit - max).exp()))
        .sum();
    f64::from(max) + sum.ln()
}

/// The `k` largest logits with their ids, largest first, the lower id first where two tie.
///
/// One pass: nearly all of a vocabulary falls below the k-th best so far, and costs a comparison.
fn top_k(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
    let mut threshold = f32::NEG_INFINITY;
    for (id, &logit) in (0..).zip(logits) {
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

/// The smallest set of heaviest tokens that holds `top_p` of the weight, heaviest first. At least
/// one token.
fn nucleus(weights: &[f32], top_p: f64) -> Vec<(u32, f32)> {
    let heavier =
        |a: &(u32, f32), b: &(u32, f32)| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
    let total: f64 = weights.iter().copied().map(f64::from).sum();
    let mut ranked: Vec<(u32, f32)> = (0..).zip(weights.iter().copied()).collect();
    let (mut start, mut size, mut mass) = (0, 64, 0.0);
    // The nucleus is small as a rule: rank the next few in each round, not the whole vocabulary.
    while start < ranked.len() {
        let end = (start + size).min(ranked.len());
        if end < ranked.len() {
            ranked[start..].select_nth_unstable_by(end - start, heavier);
        }
        ranked[start..end].sort_unstable_by(heavier);
        for index in start..end {
            mass += f64::from(ranked[index].1);
            if mass >= top_p * total {
                ranked.truncate(index + 1);
                return ranked;
            }
        }
        (start, size) = (end, size * 4);
    }
    ranked
}

/// The token at `share` (0 to 1) of the cumulated weight.
fn sample_weighted(weights: impl Iterator<Item = (u32, f32)> + Clone, share: f64) -> u32 {
    let total: f64 = weights.clone().map(|token| f64::from(token.1)).sum();
    let mut left = share * total;
    let mut last = 0;
    for (id, weight) in weights.filter(|token| token.1 > 0.0) {
        left -= f64::from(weight);
        // Rounding can leave a crumb at the end; it belongs to the last token.
        last = id;
        if left < 0.0 {
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
    fn temperature_0_takes_the_lowest_id_of_the_likeliest() {
        assert_eq!(sampler(0.0, 1.0).sample(&LOGITS), 1);
    }

    #[test]
    fn logprobs_are_the_log_softmax_best_first() {
        let choice = TokenLogprobs::from_logits(&LOGITS, 2, 3);
        assert!((choice.logprob - LOGPROBS[2]).abs() < 1e-4);
        assert_eq!(
            choice.top.iter().map(|t| t.0).collect::<Vec<_>>(),
            [1, 3, 2]
        );
        for (id, logprob) in choice.top {
            assert!((logprob - LOGPROBS[id as usize]).abs() < 1e-4);
        }
        assert!(TokenLogprobs::from_logits(&LOGITS, 0, 0).top.is_empty());
        assert_eq!(TokenLogprobs::from_logits(&LOGITS, 0, 20).top.len(), 5);
    }

    #[test]
    fn a_certain_token_has_no_positive_logprob() {
        let choice = TokenLogprobs::from_logits(&[0.0, 80.0, -3.0], 1, 1);
        assert!(choice.logprob <= 0.0 && choice.logprob > -1e-6);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let mut sampler = sampler(1.0, 1.0);
        let mut counts = [0; 5];
        for _ in 0..20_000 {
            counts[sampler.sample(&LOGITS) as usize] += 1;
        }
        for (count, logprob) in counts.iter().zip(LOGPROBS) {
            let (p, n) = (f64::from(logprob.exp()), 20_000.0);
            let deviation = (n * p * (1.0 - p)).sqrt();
            assert!((f64::from(*count) - n * p).abs() < 4.0 * deviation);
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_holds_the_share() {
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
    fn the_nucleus_of_a_flat_distribution_spans_rounds() {
        let weights = vec![1.0; 1000];
        let ranked = nucleus(&weights, 0.7);
        assert!(ranked.iter().map(|token| token.0).eq(0..700));
    }

    #[test]
    fn a_seed_repeats_and_answers_of_a_family_differ() {
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
    fn a_tiny_temperature_is_greedy() {
        assert_eq!(sampler(1e-300, 1.0).sample(&[0.0, 0.1, 0.05]), 1);
    }
}
