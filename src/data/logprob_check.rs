//! Do the teacher's logprobs belong to the tokens that it emitted?
//!
//! Where y is drawn from p, the most likely token is emitted as often as its probability says: the
//! number of hits is a sum of independent trials, with mean sum(p_1) and variance sum(p_1 (1 - p_1)).
//! Logprobs that are one position off, or that belong to another text, hit far less often; sampling
//! that was sharper than the logprobs tell (a lower temperature, a top_p that was not asked for) hits
//! far more often. It takes no student to see either.
//!
//! The trials are independent but where one seed was sent with every request: a server may draw the same
//! numbers for all answers then, position by position. So the variance is also taken between positions,
//! and the larger of the two counts.

use serde::{Deserialize, Serialize};

use crate::data::sampling::Sampling;

/// Sums are taken in these, as integers: they do not depend on the order then.
const UNIT: f64 = (1u64 << 30) as f64;

/// By how many standard deviations a rate must differ to be no accident.
const DEVIATIONS: f64 = 5.0;

/// By how much a rate must differ to matter: logprobs are rounded, and a server's are not those of
/// the very pass that sampled.
const TOLERANCE: f64 = 0.02;

/// Positions of an answer are told apart up to this many; later ones join earlier ones.
const PLACES: usize = 32;

/// What one place in the answers adds up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    positions: u64,
    /// sum(hit - p_1), in units.
    excess: i64,
}

/// How often the most likely token was emitted, and how often that was to be expected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    pub positions: u64,
    pub hits: u64,
    /// sum(p_1), in units.
    expected: u64,
    /// sum(p_1 (1 - p_1)), in units.
    variance: u64,
    places: [Place; PLACES],
}

impl Agreement {
    /// Adds position `at` of an answer, whose most likely token has the probability `p`.
    pub fn count(&mut self, at: usize, p: f64, hit: bool) {
        let p = p.clamp(0.0, 1.0);
        let place = &mut self.places[at % PLACES];
        place.positions += 1;
        place.excess += ((f64::from(u8::from(hit)) - p) * UNIT) as i64;
        self.positions += 1;
        self.hits += u64::from(hit);
        self.expected += (p * UNIT) as u64;
        self.variance += (p * (1.0 - p) * UNIT) as u64;
    }

    pub fn add(&mut self, other: Self) {
        self.positions += other.positions;
        self.hits += other.hits;
        self.expected += other.expected;
        self.variance += other.variance;
        for (place, other) in self.places.iter_mut().zip(other.places) {
            place.positions += other.positions;
            place.excess += other.excess;
        }
    }

    /// Share of positions whose most likely token was emitted.
    pub fn rate(&self) -> f64 {
        self.hits as f64 / self.positions.max(1) as f64
    }

    /// The mean of p_1, which the rate is expected to be.
    pub fn expected(&self) -> f64 {
        self.expected as f64 / UNIT / self.positions.max(1) as f64
    }

    /// The standard deviation of the rate.
    pub fn deviation(&self) -> f64 {
        let independent = self.variance as f64 / UNIT;
        independent.max(self.between_places()).sqrt() / self.positions.max(1) as f64
    }

    /// The variance of the number of hits as the places show it: of their excess around the mean.
    fn between_places(&self) -> f64 {
        let count = self
            .places
            .iter()
            .filter(|place| place.positions > 0)
            .count();
        if count < 2 {
            return 0.0;
        }
        let mean = self.rate() - self.expected();
        let squares = self.places.iter().map(|place| {
            let around = place.excess as f64 / UNIT - mean * place.positions as f64;
            around * around
        });
        squares.sum::<f64>() * count as f64 / (count - 1) as f64
    }

    pub fn verdict(&self) -> Verdict {
        let allowed = (DEVIATIONS * self.deviation()).max(TOLERANCE);
        match self.rate() - self.expected() {
            _ if self.positions == 0 => Verdict::Fits,
            difference if difference < -allowed => Verdict::Below,
            difference if difference > allowed => Verdict::Above,
            _ => Verdict::Fits,
        }
    }
}

/// What an [`Agreement`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Fits,
    /// The logprobs are not those of these tokens.
    Below,
    /// The sampling was sharper than the logprobs.
    Above,
}

/// The agreement of answers, by how they were sampled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// Drawn from the distribution that the logprobs tell: the rate must be what is expected.
    pub exact: Agreement,
    /// From a sharper one: it may be more.
    pub sharper: Agreement,
    /// How often an exactly sampled token is in the top-k, whose mass is the expected rate.
    #[serde(default)]
    pub in_top_k: Agreement,
}

impl Gate {
    /// Counts an answer.
    pub fn count(&mut self, sampling: Sampling, agreement: Agreement) {
        match sampling {
            Sampling::Exact => self.exact.add(agreement),
            Sampling::Sharper => self.sharper.add(agreement),
            Sampling::Unknown => {}
        }
    }

    /// Counts how often the emitted tokens of an answer were in the top-k.
    pub fn count_top_k(&mut self, sampling: Sampling, in_top_k: Agreement) {
        if sampling == Sampling::Exact {
            self.in_top_k.add(in_top_k);
        }
    }

    /// Returns true if tokens outside the top-k are emitted less than half as often as the mass there says: the
    /// server truncates its sampling (top_k, top_p, min_p), or lists the emitted token in place of another one.
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

    /// The agreement that shows that logprobs and answers do not belong together, if one does.
    pub fn broken(&self) -> Option<Agreement> {
        let below = |agreement: &Agreement| agreement.verdict() == Verdict::Below;
        [self.exact, self.sharper].into_iter().find(below)
    }

    /// Was what calls itself plain sampling sharper than that?
    pub fn is_too_sharp(&self) -> bool {
        self.exact.verdict() == Verdict::Above
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positions whose most likely token has a random probability: hits by chance of another
    /// `sharpness`, from the distribution `shift` positions later.
    fn sampled(positions: usize, sharpness: f64, shift: usize) -> Agreement {
        let mut random = fastrand::Rng::with_seed(positions as u64);
        let tops: Vec<(f64, u32)> = (0..positions + shift)
            .map(|_| (0.3 + 0.7 * random.f64(), random.u32(..50)))
            .collect();
        let emitted: Vec<u32> = tops
            .iter()
            .map(|(p, top)| match random.f64() < p.powf(sharpness) {
                true => *top,
                false => 99,
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
    fn plain_sampling_passes_and_shifts_and_sharper_sampling_do_not() {
        for positions in [30, 300, 3_000, 100_000] {
            assert_eq!(sampled(positions, 1.0, 0).verdict(), Verdict::Fits);
            assert_eq!(sampled(positions, 1.0, 1).verdict(), Verdict::Below);
        }
        assert_eq!(sampled(3_000, 0.5, 0).verdict(), Verdict::Above);
        assert_eq!(sampled(0, 1.0, 0).verdict(), Verdict::Fits);
    }

    /// A server that draws the same numbers for every answer, as one seed may make it do.
    #[test]
    fn answers_that_share_their_random_numbers_are_no_independent_trials() {
        let mut shifted = 0;
        for seed in 0..40 {
            let mut random = fastrand::Rng::with_seed(seed);
            let drawn: Vec<f64> = (0..30).map(|_| random.f64()).collect();
            let (mut right, mut wrong) = (Agreement::default(), Agreement::default());
            for _ in 0..500 {
                let tops: Vec<(f64, u32)> = (0..31)
                    .map(|_| (0.3 + 0.4 * random.f64(), random.u32(..50)))
                    .collect();
                for (at, drawn) in drawn.iter().enumerate() {
                    let hit = *drawn < tops[at].0;
                    right.count(at, tops[at].0, hit);
                    wrong.count(at, tops[at + 1].0, hit && tops[at].1 == tops[at + 1].1);
                }
            }
            assert_eq!(right.verdict(), Verdict::Fits, "seed {seed}: {right:?}");
            shifted += u32::from(wrong.verdict() == Verdict::Below);
        }
        assert_eq!(shifted, 40);
    }

    #[test]
    fn what_is_sharper_may_hit_more_often_but_not_less() {
        let mut gate = Gate::default();
        gate.count(Sampling::Sharper, sampled(3_000, 0.5, 0));
        gate.count(Sampling::Exact, sampled(3_000, 1.0, 0));
        gate.count(Sampling::Unknown, sampled(3_000, 1.0, 1));
        assert!(gate.broken().is_none() && !gate.is_too_sharp());
        gate.count(Sampling::Sharper, sampled(30_000, 1.0, 1));
        assert!(gate.broken().is_some());
    }

    #[test]
    fn missing_tail_is_detected_even_if_it_is_small() {
        let sampled = |share: f64, positions: usize| {
            let mut random = fastrand::Rng::with_seed(3);
            let mut gate = Gate::default();
            let mut in_top_k = Agreement::default();
            for at in 0..positions {
                let mass = 0.98 + 0.02 * random.f64();
                in_top_k.count(at, mass, random.f64() >= share * (1.0 - mass));
            }
            gate.count_top_k(Sampling::Exact, in_top_k);
            gate.misses_tail()
        };
        assert!(!sampled(1.0, 20_000) && !sampled(1.0, 200) && !sampled(1.0, 0));
        assert!(sampled(0.0, 20_000) && sampled(0.2, 20_000));
        assert!(!sampled(0.0, 200), "too few positions to tell");
    }
}
