//! What a teacher says at one position.

use std::borrow::Cow;

use crate::cache::logprobs_view::LogprobsView;
use crate::cache::record::HIGHEST_SENTINEL_LOGPROB;
use crate::data::logprob_check::Agreement;

use super::run::{Unit, UnitKind};

/// By how much probabilities may sum to more than 1: they are rounded.
pub const EXCESS: f64 = 1e-3;

/// What [`alternatives`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Known {
    /// What the listed probabilities sum to.
    pub mass: f64,
    /// Same without an emitted token from outside the top-k.
    pub top_mass: f64,
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

/// Fills `listed` with the most likely alternatives at a position that have usable logprobs: at most `most`, and
/// at most the `asked` ones of the request. The emitted token is appended if it is not among them. Probabilities
/// that sum to slightly more than 1 are normalised.
///
/// Some servers append an emitted token from outside the top-k, so its rank by logprob decides whether it
/// belongs to the top-k. Others replace the last of the top-k, which `Gate` detects over many answers.
///
/// Returns None if the probabilities sum to more than that.
pub fn alternatives<'t>(
    teacher: &'t LogprobsView,
    position: usize,
    most: usize,
    asked: Option<usize>,
    listed: &mut Vec<(&'t [u8], f32)>,
) -> Option<Known> {
    let emitted = teacher.token.get(position).map_or(&[][..], Cow::as_ref);
    let logprobs = teacher.top_logprob.get(position);
    listed.clear();
    for (bytes, &logprob) in teacher.top.get(position).iter().zip(logprobs) {
        if let Some(logprob) = logprob.filter(is_usable) {
            let is_known = |known: &(&[u8], f32)| known.1 == logprob && *known.0 == **bytes;
            // Some servers list the emitted token twice. Tokens without bytes may differ.
            if bytes.is_empty() || !listed.iter().any(is_known) {
                listed.push((bytes, logprob));
            }
        }
    }
    let most = most.min(asked.unwrap_or(usize::MAX));
    if listed.len() > most {
        listed.sort_by(|a, b| b.1.total_cmp(&a.1));
        listed.truncate(most);
    }
    let among = listed.iter().any(|(bytes, _)| *bytes == emitted);
    let own = teacher.logprob.get(position).copied().flatten();
    let top_mass = mass(listed.iter().map(|&(_, logprob)| logprob)).min(1.0);
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
        return None;
    }
    if total > 1.0 {
        let excess = total.ln() as f32;
        for (_, logprob) in listed {
            *logprob -= excess;
        }
    }
    Some(Known {
        mass: total.min(1.0),
        top_mass,
        drawn,
    })
}

/// Counts how often the emitted token is the most likely alternative.
pub(super) fn agreement(teacher: &LogprobsView, units: &[Unit]) -> Agreement {
    let mut agreement = Agreement::default();
    let tokens = units.iter().filter(|unit| unit.kind != UnitKind::Unknown);
    for position in tokens.map(|unit| unit.tokens.start) {
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

pub fn is_usable(logprob: &f32) -> bool {
    logprob.is_finite() && *logprob > HIGHEST_SENTINEL_LOGPROB
}

/// The sum of probabilities given by their logarithms.
pub(super) fn mass(logprobs: impl Iterator<Item = f32>) -> f64 {
    logprobs.map(|logprob| f64::from(logprob).exp()).sum()
}
