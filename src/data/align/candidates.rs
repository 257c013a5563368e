//! The tokens that a teacher lists at one position, with their logprobs.

use std::borrow::Cow;

use crate::cache::logprobs_view::LogprobsView;
use crate::cache::record::HIGHEST_SENTINEL_LOGPROB;
use crate::data::logprob_check::Agreement;

use super::run::{SpanKind, TeacherSpan};

/// Largest amount by which a sum of probabilities may exceed 1. Servers round the logprobs.
pub const EXCESS: f64 = 1e-3;

/// Properties of the list that [`list_candidates`] fills.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidates {
    /// Sum of the listed probabilities, at most 1.
    pub mass: f64,
    /// The same sum without an emitted token from outside the top-k.
    pub top_mass: f64,
    pub sampled: SampledToken,
}

/// Position of the emitted token in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampledToken {
    /// One of the top-k.
    InTopK,
    /// Outside the top-k, and listed last.
    ListedLast,
    /// Outside the top-k, with an unknown logprob.
    NotListed,
}

/// Fills `listed` with the teacher's tokens at `position`, except tokens without a usable logprob. If there are more
/// than `max_candidates`, or more than `top_logprobs` (the number in the request), only the most likely ones are kept.
/// The emitted token is appended if it is not one of them and its logprob is usable. Probabilities that sum to slightly
/// more than 1 are normalised.
///
/// Some servers append the emitted token to their list if it is outside the top-k. So a token belongs to the top-k
/// because of its rank, not because it is listed. Other servers replace the last token of the top-k with the emitted
/// token; `LogprobCheck` detects this over many answers.
///
/// Returns None if the probabilities sum to more than 1 + [`EXCESS`].
pub fn list_candidates<'t>(
    teacher: &'t LogprobsView,
    position: usize,
    max_candidates: usize,
    top_logprobs: Option<usize>,
    listed: &mut Vec<(&'t [u8], f32)>,
) -> Option<Candidates> {
    let emitted = teacher.token.get(position).map_or(&[][..], Cow::as_ref);
    let logprobs = teacher.top_logprob.get(position);
    listed.clear();
    for (bytes, &logprob) in teacher.top.get(position).iter().zip(logprobs) {
        if let Some(logprob) = logprob.filter(is_usable) {
            let is_listed = |other: &(&[u8], f32)| other.1 == logprob && *other.0 == **bytes;
            // Some servers list the emitted token twice. Two tokens without bytes may be different tokens.
            if bytes.is_empty() || !listed.iter().any(is_listed) {
                listed.push((bytes, logprob));
            }
        }
    }
    let max_candidates = max_candidates.min(top_logprobs.unwrap_or(usize::MAX));
    if listed.len() > max_candidates {
        listed.sort_by(|a, b| b.1.total_cmp(&a.1));
        listed.truncate(max_candidates);
    }
    let emitted_logprob = teacher.logprob.get(position).copied().flatten();
    let top_mass = mass(listed.iter().map(|&(_, logprob)| logprob)).min(1.0);
    let sampled = if listed.iter().any(|(bytes, _)| *bytes == emitted) {
        SampledToken::InTopK
    } else if let Some(logprob) = emitted_logprob.filter(is_usable) {
        listed.push((emitted, logprob));
        SampledToken::ListedLast
    } else {
        SampledToken::NotListed
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
    Some(Candidates {
        mass: total.min(1.0),
        top_mass,
        sampled,
    })
}

/// Counts how often the emitted token is the most likely one. `end` is the position of the token that ends the turn, if
/// the teacher lists it. Without it, positions whose most likely token ends the turn are not counted: the text of an
/// answer has only the positions at which the turn did not end, so they would never be hits.
pub(super) fn agreement(
    teacher: &LogprobsView,
    spans: &[TeacherSpan],
    end: Option<usize>,
    ends_turn: impl Fn(&[u8]) -> bool,
) -> Agreement {
    let mut agreement = Agreement::default();
    let tokens = spans.iter().filter(|span| span.kind != SpanKind::Unknown);
    let positions = tokens.map(|span| span.tokens.start).chain(end);
    for position in positions {
        let top = teacher.top.get(position);
        let logprobs = teacher.top_logprob.get(position);
        let mut best: Option<(f32, &[u8])> = None;
        for (bytes, logprob) in top.iter().zip(logprobs) {
            let logprob = logprob.filter(is_usable);
            if let Some(logprob) = logprob.filter(|l| best.is_none_or(|(max, _)| *l > max)) {
                best = Some((logprob, bytes));
            }
        }
        if let Some((logprob, bytes)) = best
            && (end.is_some() || !ends_turn(bytes))
        {
            let is_hit = *bytes == *teacher.token[position];
            agreement.count(position, f64::from(logprob).exp(), is_hit);
        }
    }
    agreement
}

/// Returns true unless the logprob is infinite, NaN or a sentinel value for a missing logprob.
pub fn is_usable(logprob: &f32) -> bool {
    logprob.is_finite() && *logprob > HIGHEST_SENTINEL_LOGPROB
}

/// Returns the sum of the probabilities of `logprobs`.
pub(super) fn mass(logprobs: impl Iterator<Item = f32>) -> f64 {
    logprobs.map(|logprob| f64::from(logprob).exp()).sum()
}
