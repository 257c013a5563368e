//! Checks that the teacher's logprobs belong to the tokens that it emitted.
//!
//! A hit is a position at which the teacher emitted its most likely token. If tokens are sampled from p, hits are as
//! frequent as the probability p_1 of the most likely token predicts: the number of hits is a sum of independent
//! trials, with mean sum(p_1) and variance sum(p_1 (1 - p_1)). If the logprobs are one position off, or belong to
//! another text, hits are far rarer. If the sampling was sharper than the logprobs (a lower temperature, a top_p that
//! was not requested), hits are far more frequent. The check needs no student.
//!
//! The trials are not independent if one seed was sent with every request: a server may then sample all answers with
//! the same random numbers, position by position. So the variance is also estimated between positions, and the
//! larger of the two estimates is used.

use serde::{Deserialize, Serialize};

use crate::data::sampling::SamplingKind;

/// Fixed-point scale of the sums: 1 is stored as this number of units. A sum of integers does not depend on the order
/// of its terms.
const UNIT: f64 = (1u64 << 30) as f64;

/// Minimum difference of a rate from the expected one, in standard deviations.
const DEVIATIONS: f64 = 5.0;

/// Minimum difference of a rate from the expected one. Smaller differences are ignored: logprobs are rounded, and
/// servers may compute them in another forward pass than the one that sampled.
const TOLERANCE: f64 = 0.02;

/// Number of sums by position. Position n of an answer is counted in sum n modulo this number.
const POSITION_SUMS: usize = 32;

/// Sums over one position of all answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PositionSum {
    positions: u64,
    /// sum(hit - p_1), in units.
    excess: i64,
}

/// Number of hits at the positions of answers, and the number that the teacher's probabilities predict. A hit is a
/// position whose emitted token is the most likely one, or, for [`LogprobCheck::in_top_k`], one of the top-k.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    pub positions: u64,
    pub hits: u64,
    /// sum(p_1), in units.
    expected: u64,
    /// sum(p_1 (1 - p_1)), in units.
    variance: u64,
    #[serde(rename = "places")]
    by_position: [PositionSum; POSITION_SUMS],
}

impl Agreement {
    /// Adds position `position` of an answer, where the probability of a hit is `p`.
    pub fn count(&mut self, position: usize, p: f64, is_hit: bool) {
        let p = p.clamp(0.0, 1.0);
        let sum = &mut self.by_position[position % POSITION_SUMS];
        sum.positions += 1;
        sum.excess += ((f64::from(u8::from(is_hit)) - p) * UNIT) as i64;
        self.positions += 1;
        self.hits += u64::from(is_hit);
        self.expected += (p * UNIT) as u64;
        self.variance += (p * (1.0 - p) * UNIT) as u64;
    }

    pub fn add(&mut self, other: Self) {
        self.positions += other.positions;
        self.hits += other.hits;
        self.expected += other.expected;
        self.variance += other.variance;
        for (sum, other) in self.by_position.iter_mut().zip(other.by_position) {
            sum.positions += other.positions;
            sum.excess += other.excess;
        }
    }

    /// Returns the share of positions with a hit.
    pub fn rate(&self) -> f64 {
        self.hits as f64 / self.positions.max(1) as f64
    }

    /// Returns the expected rate: the mean of p_1.
    pub fn expected(&self) -> f64 {
        self.expected as f64 / UNIT / self.positions.max(1) as f64
    }

    /// Returns the standard deviation of the rate.
    pub fn deviation(&self) -> f64 {
        let independent = self.variance as f64 / UNIT;
        independent.max(self.variance_between_positions()).sqrt() / self.positions.max(1) as f64
    }

    /// Returns the variance of the number of hits, estimated from the differences between positions: from the excess of
    /// hits at each position, compared with the mean excess.
    fn variance_between_positions(&self) -> f64 {
        let count = self
            .by_position
            .iter()
            .filter(|sum| sum.positions > 0)
            .count();
        if count < 2 {
            return 0.0;
        }
        let mean = self.rate() - self.expected();
        let squares = self.by_position.iter().map(|sum| {
            let deviation = sum.excess as f64 / UNIT - mean * sum.positions as f64;
            deviation * deviation
        });
        squares.sum::<f64>() * count as f64 / (count - 1) as f64
    }

    /// Compares the rate with the expected one.
    pub fn verdict(&self) -> AgreementVerdict {
        let allowed = (DEVIATIONS * self.deviation()).max(TOLERANCE);
        match self.rate() - self.expected() {
            _ if self.positions == 0 => AgreementVerdict::Fits,
            difference if difference < -allowed => AgreementVerdict::Below,
            difference if difference > allowed => AgreementVerdict::Above,
            _ => AgreementVerdict::Fits,
        }
    }
}

/// Result of a comparison of an [`Agreement`] with its expected rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgreementVerdict {
    Fits,
    /// The logprobs belong to other tokens.
    Below,
    /// The sampling was sharper than the logprobs.
    Above,
}

/// Agreement of the answers, by how they were sampled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogprobCheck {
    /// Answers sampled from the distribution of their logprobs: the rate must be the expected one.
    pub exact: Agreement,
    /// Answers sampled from a sharper distribution: the rate may be higher.
    pub sharper: Agreement,
    /// Positions of exact samples whose emitted token is in the top-k; the expected rate is the probability mass of the
    /// top-k.
    #[serde(default)]
    pub in_top_k: Agreement,
}

impl LogprobCheck {
    /// Counts an answer.
    pub fn count(&mut self, sampling: SamplingKind, agreement: Agreement) {
        match sampling {
            SamplingKind::Exact => self.exact.add(agreement),
            SamplingKind::Sharper => self.sharper.add(agreement),
            SamplingKind::Unknown => {}
        }
    }

    /// Counts how often the emitted tokens of an answer were in the top-k.
    pub fn count_top_k(&mut self, sampling: SamplingKind, in_top_k: Agreement) {
        if sampling == SamplingKind::Exact {
            self.in_top_k.add(in_top_k);
        }
    }

    /// Returns true if tokens outside the top-k are emitted less than half as often as their mass predicts: the server
    /// truncates its sampling (top_k, top_p, min_p), or lists the emitted token in place of another one.
    pub fn misses_tail(&self) -> bool {
        let tail = 1.0 - self.in_top_k.expected();
        let emitted = 1.0 - self.in_top_k.rate();
        self.in_top_k.positions > 0
            && emitted < tail / 2.0
            && tail - emitted > DEVIATIONS * self.in_top_k.deviation()
    }

    pub fn add(&mut self, other: Self) {
        self.exact.add(other.exact);
        self.sharper.add(other.sharper);
        self.in_top_k.add(other.in_top_k);
    }

    /// Returns an agreement below its expected rate, if there is one: the logprobs do not belong to the answers.
    pub fn broken(&self) -> Option<Agreement> {
        let below = |agreement: &Agreement| agreement.verdict() == AgreementVerdict::Below;
        [self.exact, self.sharper].into_iter().find(below)
    }

    /// Returns true if answers to requests for plain sampling were sampled from a sharper distribution than their
    /// logprobs.
    pub fn is_too_sharp(&self) -> bool {
        self.exact.verdict() == AgreementVerdict::Above
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positions whose most likely token has a random probability p. It is emitted with probability p^sharpness, and
    /// the logprobs are those of the position `shift` later.
    fn sampled(positions: usize, sharpness: f64, shift: usize) -> Agreement {
        let mut random = fastrand::Rng::with_seed(positions as u64);
        let tops: Vec<(f64, u32)> = (0..positions + shift)
            .map(|_| (0.3 + 0.7 * random.f64(), random.u32(..50)))
            .collect();
        let emitted: Vec<u32> = tops
            .iter()
            .map(|(p, top)| {
                if random.f64() < p.powf(sharpness) {
                    *top
                } else {
                    99
                }
            })
            .collect();
        let mut agreement = Agreement::default();
        for at in 0..positions {
            let (p, top) = tops[at + shift];
            agreement.count(at, p, emitted[at] == top);
        }
        agreement
    }

    #[test]
    fn agreement_detects_shifted_logprobs_and_sharper_sampling() {
        for positions in [30, 300, 3_000, 100_000] {
            assert_eq!(sampled(positions, 1.0, 0).verdict(), AgreementVerdict::Fits);
            assert_eq!(
                sampled(positions, 1.0, 1).verdict(),
                AgreementVerdict::Below
            );
        }
        assert_eq!(sampled(3_000, 0.5, 0).verdict(), AgreementVerdict::Above);
        assert_eq!(sampled(0, 1.0, 0).verdict(), AgreementVerdict::Fits);
    }

    /// A server that uses the same random numbers for every answer, as with one seed.
    #[test]
    fn agreement_tolerates_answers_with_shared_random_numbers() {
        let mut shifted = 0;
        for seed in 0..40 {
            let mut random = fastrand::Rng::with_seed(seed);
            let random_numbers: Vec<f64> = (0..30).map(|_| random.f64()).collect();
            let mut right = Agreement::default();
            let mut wrong = Agreement::default();
            for _ in 0..500 {
                let tops: Vec<(f64, u32)> = (0..31)
                    .map(|_| (0.3 + 0.4 * random.f64(), random.u32(..50)))
                    .collect();
                for (at, number) in random_numbers.iter().enumerate() {
                    let is_hit = *number < tops[at].0;
                    right.count(at, tops[at].0, is_hit);
                    wrong.count(at, tops[at + 1].0, is_hit && tops[at].1 == tops[at + 1].1);
                }
            }
            assert_eq!(
                right.verdict(),
                AgreementVerdict::Fits,
                "seed {seed}: {right:?}"
            );
            shifted += u32::from(wrong.verdict() == AgreementVerdict::Below);
        }
        assert_eq!(shifted, 40);
    }

    #[test]
    fn sharper_sampling_may_hit_more_often_but_not_less() {
        let mut check = LogprobCheck::default();
        check.count(SamplingKind::Sharper, sampled(3_000, 0.5, 0));
        check.count(SamplingKind::Exact, sampled(3_000, 1.0, 0));
        check.count(SamplingKind::Unknown, sampled(3_000, 1.0, 1));
        assert!(check.broken().is_none() && !check.is_too_sharp());
        check.count(SamplingKind::Sharper, sampled(30_000, 1.0, 1));
        assert!(check.broken().is_some());
    }

    #[test]
    fn small_missing_tail_is_detected() {
        let sampled = |share: f64, positions: usize| {
            let mut random = fastrand::Rng::with_seed(3);
            let mut check = LogprobCheck::default();
            let mut in_top_k = Agreement::default();
            for at in 0..positions {
                let mass = 0.98 + 0.02 * random.f64();
                in_top_k.count(at, mass, random.f64() >= share * (1.0 - mass));
            }
            check.count_top_k(SamplingKind::Exact, in_top_k);
            check.misses_tail()
        };
        assert!(!sampled(1.0, 20_000) && !sampled(1.0, 200) && !sampled(1.0, 0));
        assert!(sampled(0.0, 20_000) && sampled(0.2, 20_000));
        assert!(!sampled(0.0, 200), "too few positions");
    }
}
