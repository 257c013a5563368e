//! Soft labels from several answers to one prompt, merged into a trie of their tokens.
//!
//! A teacher without logprobs still shows its distribution in its answers. Of n answers that share a prefix, the share
//! that continues with a token is a Monte-Carlo estimate of the token's probability. In a trie of the answers, the
//! shares come from the counts at each node. A node of a single answer gives no estimate.

use std::collections::HashMap;

use crate::data::align::aligned::Aligned;

/// Answers as student tokens, by a hash of the tokens of their prompts.
#[derive(Debug, Default)]
pub(crate) struct SampleTrie {
    by_prompt: HashMap<blake3::Hash, Vec<Box<[u32]>>>,
}

impl SampleTrie {
    /// Adds an answer, with the token that ends it unless it was truncated.
    pub(crate) fn add(&mut self, prompt: &[u32], answer: &[u32]) {
        let answers = self.by_prompt.entry(hash(prompt)).or_default();
        answers.push(answer.into());
    }

    /// Adds the answers of another trie, which has read other rows.
    pub(crate) fn merge(&mut self, other: Self) {
        for (prompt, answers) in other.by_prompt {
            self.by_prompt.entry(prompt).or_default().extend(answers);
        }
    }

    /// Returns soft labels for `answer`: at each position, the shares of the next tokens among the answers that agree
    /// with `answer` up to this position. None if the prompt has fewer than two answers.
    pub(crate) fn soft_labels(&self, prompt: &[u32], answer: &[u32]) -> Option<Aligned> {
        let answers = self.by_prompt.get(&hash(prompt))?;
        let mut with_prefix: Vec<&[u32]> = answers.iter().map(|answer| &**answer).collect();
        if with_prefix.len() < 2 {
            return None;
        }
        let mut aligned = Aligned::default();
        for (position, token) in answer.iter().enumerate() {
            if with_prefix.len() < 2 {
                break;
            }
            aligned.push(&shares(
                with_prefix.iter().filter_map(|answer| answer.get(position)),
            ));
            with_prefix.retain(|answer| answer.get(position) == Some(token));
        }
        Some(aligned)
    }
}

fn hash(prompt: &[u32]) -> blake3::Hash {
    let mut hash = blake3::Hasher::new();
    prompt.iter().for_each(|id| {
        hash.update(&id.to_le_bytes());
    });
    hash.finalize()
}

/// Share of each token among `tokens` as its natural logarithm, the most frequent first.
fn shares<'a>(tokens: impl Iterator<Item = &'a u32>) -> Vec<(u32, f32)> {
    let mut tokens: Vec<u32> = tokens.copied().collect();
    tokens.sort_unstable();
    let total = tokens.len() as f32;
    let runs = tokens.chunk_by(|a, b| a == b);
    let mut shares: Vec<(u32, f32)> = runs
        .map(|equal| (equal[0], (equal.len() as f32 / total).ln()))
        .collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_labels_are_token_shares_after_shared_prefixes() {
        let mut samples = SampleTrie::default();
        let answers: [&[u32]; 4] = [&[1, 2, 9], &[1, 2, 3, 9], &[1, 4, 9], &[5, 9]];
        samples.add(&[7], answers[0]);
        let mut others = SampleTrie::default();
        for answer in &answers[1..] {
            others.add(&[7], answer);
        }
        others.add(&[8], answers[0]);
        samples.merge(others);
        let labels = samples.soft_labels(&[7], answers[1]).unwrap();
        let labels_at = |position: usize| {
            let (ids, logprobs) = labels.soft(position);
            let shares = logprobs.iter().map(|l| l.exp());
            ids.iter().copied().zip(shares).collect::<Vec<_>>()
        };
        let assert_close = |found: Vec<(u32, f32)>, expected: &[(u32, f32)]| {
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-6);
            }
        };
        assert_close(labels_at(0), &[(1, 0.75), (5, 0.25)]);
        assert_close(labels_at(1), &[(2, 2.0 / 3.0), (4, 1.0 / 3.0)]);
        assert_close(labels_at(2), &[(3, 0.5), (9, 0.5)]);
        assert!(!labels.is_soft(3), "a single answer gives no soft labels");
        assert!(samples.soft_labels(&[8], answers[0]).is_none());
        assert!(samples.soft_labels(&[9], answers[0]).is_none());
    }
}
