//! Do the teacher's logprobs belong to the tokens that it emitted?
//!
//! Where y is drawn from p, the most likely token is emitted as often as its probability says: the
//! number of hits is a sum of independent trials, with mean sum(p_1) and variance sum(p_1 (1 - p_1)).
//! Logprobs that are one position off, or that belong to another text, hit far less often; sampling
//! that was sharper than the logprobs tell (a lower temperature, a top_p that was not asked for) hits
//! far more often. It takes no student to see either.

use serde::{Deserialize, Serialize};

use super::sampling::Sampling;

/// Sums are taken in these, as integers: they do not depend on the order then.
const UNIT: f64 = (1u64 << 30) as f64;

/// By how many standard deviations a rate must differ to be no accident.
const DEVIATIONS: f64 = 5.0;

/// By how much a rate must differ to matter: logprobs are rounded, and a server's are not those of
/// the very pass that sampled.
const TOLERANCE: f64 = 0.02;

/// How often the most likely token was emitted, and how often that was to be expected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    pub positions: u64,
    pub hits: u64,
    /// sum(p_1), in units.
    expected: u64,
    /// sum(p_1 (1 - p_1)), in units.
    variance: u64,
}

impl Agreement {
    /// Adds a position whose most likely token has the probability `p`.
    pub fn count(&mut self, p: f64, hit: bool) {
        let p = p.clamp(0.0, 1.0);
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
        (self.variance as f64 / UNIT).sqrt() / self.positions.max(1) as f64
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

    pub fn add(&mut self, other: Self) {
        self.exact.add(other.exact);
        self.sharper.add(other.sharper);
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
            agreement.count(p, emitted[at] == top);
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
}
