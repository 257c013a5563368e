//! What a teacher says at one position.

use std::borrow::Cow;

use crate::cache::view::LogprobsView;
use crate::data::gate::Agreement;

use super::Mismatch;

/// Logprobs at or below are no logprobs: endpoints send -100, -9999 for "too small to tell".
const SENTINEL: f32 = -100.0;
/// By how much probabilities may sum to more than 1: they are rounded.
const EXCESS: f64 = 1e-3;

/// What [`alternatives`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Known {
    /// What the listed probabilities sum to.
    pub mass: f64,
    pub drawn: Drawn,
}

/// Is the emitted token one from outside the top-k?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drawn {
    No,
    /// It is, and listed last.
    Last,
    /// It is, and its logprob is not known.
    Unknown,
}

/// Fills `listed` with the teacher's alternatives at a position that have usable logprobs, the `most` most
/// likely ones, and the emitted token where it is not among them; probabilities that sum to slightly
/// more than 1 are brought to 1.
///
/// # Errors
/// [`Mismatch::Mass`] if they sum to more than that.
pub fn alternatives<'t>(
    teacher: &'t LogprobsView,
    position: usize,
    most: usize,
    listed: &mut Vec<(&'t [u8], f32)>,
) -> Result<Known, Mismatch> {
    let emitted = teacher.token.get(position).map_or(&[][..], Cow::as_ref);
    let logprobs = teacher.top_logprob.get(position);
    let mut among = false;
    listed.clear();
    for (bytes, &logprob) in teacher.top.get(position).iter().zip(logprobs) {
        among |= **bytes == *emitted;
        if let Some(logprob) = logprob.filter(is_usable) {
            listed.push((bytes, logprob));
        }
    }
    if listed.len() > most {
        listed.sort_by(|a, b| b.1.total_cmp(&a.1));
        listed.truncate(most);
        among = listed.iter().any(|(bytes, _)| *bytes == emitted);
    }
    let own = teacher.logprob.get(position).copied().flatten();
    let drawn = match (among, own.filter(is_usable)) {
        (true, _) => Drawn::No,
        (false, None) => Drawn::Unknown,
        (false, Some(logprob)) => {
            listed.push((emitted, logprob));
            Drawn::Last
        }
    };
    let total = mass(listed.iter().map(|&(_, logprob)| logprob));
    if total > 1.0 + EXCESS {
        return Err(Mismatch::Mass);
    }
    if total > 1.0 {
        let excess = total.ln() as f32;
        for (_, logprob) in listed {
            *logprob -= excess;
        }
    }
    Ok(Known {
        mass: total.min(1.0),
        drawn,
    })
}

/// How often the most likely of the alternatives at the first `positions` positions is the token that
/// was emitted there.
pub(super) fn agreement(teacher: &LogprobsView, positions: usize) -> Agreement {
    let mut agreement = Agreement::default();
    for position in 0..positions {
        let (top, logprobs) = (teacher.top.get(position), teacher.top_logprob.get(position));
        let mut best: Option<(f32, &[u8])> = None;
        for (bytes, logprob) in top.iter().zip(logprobs) {
            let logprob = logprob.filter(is_usable);
            if let Some(logprob) = logprob.filter(|l| best.is_none_or(|(most, _)| *l > most)) {
                best = Some((logprob, bytes));
            }
        }
        if let Some((logprob, bytes)) = best {
            let hit = *bytes == *teacher.token[position];
            agreement.count(position, f64::from(logprob).exp(), hit);
        }
    }
    agreement
}

pub(super) fn is_usable(logprob: &f32) -> bool {
    logprob.is_finite() && *logprob > SENTINEL
}

/// The sum of probabilities given by their logarithms.
pub(super) fn mass(logprobs: impl Iterator<Item = f32>) -> f64 {
    logprobs.map(|logprob| f64::from(logprob).exp()).sum()
}
