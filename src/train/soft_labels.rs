//! Checks of the soft labels, and the choice of their loss terms.

use anyhow::{Result, bail};

use super::loss::divergence::Divergence;
use crate::config::{KdMode, LossConfig};
use crate::data::logprob_check::Agreement;
use crate::data::report::{DataReport, NO_LOGPROBS, by_reason};
use crate::exit::Exit;
use crate::terminal::format_count;
use crate::tokenizer::Tokenizer;
use crate::train::loss::position::{EndToken, SoftTerm};

/// Of the answers with logprobs, at least 1 in this number must have soft labels.
const MIN_USABLE_ONE_IN: u64 = 20;

/// Loss terms for the soft labels of a data set.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SoftLabelChoice {
    /// Indexed by [`is_exact_sample`]; None for cross-entropy alone.
    ///
    /// [`is_exact_sample`]: crate::train::loss::position::PositionTarget::is_exact_sample
    pub terms: Option<[SoftTerm; 2]>,
    /// The token that ends an answer. The teacher's logprobs may not include it. None with a local teacher.
    pub end: Option<EndToken>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// Checks that the soft labels of a cache can be mapped to the tokens of `tokenizer`.
///
/// # Errors
/// [`Exit::Usage`] if the bytes of the tokens are unknown.
pub(crate) fn check_tokenizer(tokenizer: &Tokenizer) -> Result<()> {
    if tokenizer.has_token_bytes() {
        return Ok(());
    }
    bail!(Exit::Usage(format!(
        "the tokenizer in {} does not define the bytes of its tokens (WordPiece drops the spaces between \
         words), so the teacher's tokens cannot be aligned with them: choose a student with a byte-level \
         BPE or SentencePiece tokenizer, or set `loss.kd = \"none\"` to train on the answers alone",
        tokenizer.dir().display()
    )))
}

/// Returns the weight of a term if `loss.kd_weight` is not set. For the damped and the tail term it is the best weight
/// in the measurements of `tests/bench/softlabels.sh`.
pub(crate) fn default_weight(divergence: Divergence) -> f32 {
    match divergence {
        // The damped term already trains emitted tokens outside the top-k.
        Divergence::Damped(_) => 1.0,
        // This term treats all tokens outside the top-k as one; only the cross-entropy distinguishes them.
        Divergence::Tail => 0.8,
        _ => 0.5,
    }
}

fn soft_term(settings: &LossConfig, divergence: Divergence, default_weight: f32) -> SoftTerm {
    let weight = settings.kd_weight.map(|weight| weight as f32);
    SoftTerm {
        divergence,
        weight: weight.unwrap_or(default_weight),
    }
}

/// Chooses the loss terms for the soft labels of a cache; `end` is the token that ends an answer.
///
/// # Errors
/// [`Exit::Usage`] if too few logprobs can be used, or the logprobs do not belong to the answers or do not support
/// `loss.kd`. With `force` these errors are warnings.
pub fn choose(
    settings: &LossConfig,
    report: &DataReport,
    end: Option<u32>,
    force: bool,
) -> Result<SoftLabelChoice> {
    let with_weight = |divergence| soft_term(settings, divergence, default_weight(divergence));
    let terms = Divergence::from_config(settings).map(|both| both.map(with_weight));
    let is_listed = !report.misses_ends();
    let mut choice = SoftLabelChoice {
        terms,
        end: end.map(|token| EndToken { token, is_listed }),
        notes: Vec::new(),
    };
    let Some([inexact_term, exact_term]) = terms else {
        return Ok(choice);
    };
    let refuse = |reason: String| {
        if !force {
            bail!(Exit::Usage(reason));
        }
        tracing::warn!("{reason}; training anyway because of --force");
        Ok(())
    };
    let mut unusable = report.ce_only.clone();
    let without_logprobs = unusable.remove(NO_LOGPROBS).unwrap_or_default();
    let with_logprobs = report.kept.saturating_sub(without_logprobs);
    if with_logprobs > 0 && report.with_soft_labels * MIN_USABLE_ONE_IN < with_logprobs {
        refuse(format!(
            "`loss.kd = \"{}\"` needs the teacher's logprobs, and those of {} of {} answers cannot be used: {}. Set \
             `loss.kd = \"none\"` to train on the answers alone, or pass --force",
            settings.kd.name(),
            format_count(with_logprobs - report.with_soft_labels),
            format_count(with_logprobs),
            by_reason(&unusable)
        ))?;
    }
    if report.soft_positions == 0 {
        let name = settings.kd.name();
        choice.notes.push(format!(
            "`loss.kd = \"{name}\"`: no answer has soft labels; training on cross-entropy alone"
        ));
        return Ok(choice);
    }
    if report.ends_listed < report.ends {
        choice.notes.push(format!(
            "{} of {} end tokens of answers have no logprobs: they are trained by cross-entropy, and the soft \
             labels of other positions are compared without them",
            format_count(report.ends - report.ends_listed),
            format_count(report.ends)
        ));
    }
    if let Some(broken) = report.logprob_check.broken() {
        refuse(format!(
            "the teacher's logprobs do not belong to its answers: {}. They may be shifted by one position, or belong \
             to another text. Set `loss.kd = \"none\"` to train on the answers alone, or pass --force to use them \
             anyway",
            top1_evidence(&broken)
        ))?;
    }
    let exact_samples = report.exact_samples;
    let with_soft_labels = report.with_soft_labels;
    let is_too_sharp = report.logprob_check.is_too_sharp();
    let misses_tail = report.logprob_check.misses_tail();
    let name = settings.kd.name();
    match settings.kd {
        KdMode::Auto if is_too_sharp => {
            choice.terms = Some([inexact_term; 2]);
            choice.notes.push(format!(
                "`loss.kd = \"auto\"`: {inexact_term}, because the answers were sampled from a sharper distribution than their \
                 logprobs show, at a lower temperature or with a top_p: {}",
                top1_evidence(&report.logprob_check.exact)
            ));
        }
        KdMode::Auto if misses_tail => {
            choice.terms = Some([inexact_term; 2]);
            choice.notes.push(format!(
                "`loss.kd = \"auto\"`: {inexact_term}, because tokens outside the top-k are missing: {}",
                tail_evidence(&report.logprob_check.in_top_k)
            ));
        }
        KdMode::Auto if exact_samples == 0 => {
            choice.notes.push(format!(
                "`loss.kd = \"auto\"`: {inexact_term}, because no answer is an exact sample of its logprobs (temperature 1, \
                 no truncation)"
            ));
        }
        KdMode::Auto if exact_samples == with_soft_labels => {
            choice.notes.push(format!(
                "`loss.kd = \"auto\"`: {exact_term}, because all answers were sampled at temperature 1 without truncation"
            ));
        }
        KdMode::Auto => {
            choice.notes.push(format!(
                "`loss.kd = \"auto\"`: {exact_term} for the {} answers that are exact samples of their logprobs; \
                 {inexact_term} for the other {}",
                format_count(exact_samples),
                format_count(with_soft_labels - exact_samples)
            ));
        }
        KdMode::Unbiased | KdMode::Damped if exact_samples < with_soft_labels => refuse(format!(
            "`loss.kd = \"{name}\"` needs answers sampled at temperature 1 without truncation: {} of {} were not \
             (see the [sampling] settings of their harvest). Set `loss.kd = \"auto\"`, which uses \"tail\" for those \
             answers",
            format_count(with_soft_labels - exact_samples),
            format_count(with_soft_labels)
        ))?,
        KdMode::Unbiased | KdMode::Damped if is_too_sharp => refuse(format!(
            "`loss.kd = \"{name}\"` needs exact samples of the logprobs, but these answers were sampled from a sharper \
             distribution, at a lower temperature or with a top_p: {}. Set `loss.kd` to \"tail\"",
            top1_evidence(&report.logprob_check.exact)
        ))?,
        KdMode::Unbiased | KdMode::Damped if misses_tail => refuse(format!(
            "`loss.kd = \"{name}\"` needs answers with tokens from outside the top-k, and these are missing: {}. \
             The server truncates its sampling (top_k, top_p, min_p), or replaces a token of the top-k by the \
             emitted token. Set `loss.kd` to \"tail\"",
            tail_evidence(&report.logprob_check.in_top_k)
        ))?,
        _ => {}
    }
    Ok(choice)
}

/// Returns true if the divergence equals the KL divergence when the teacher's whole distribution is known: without a
/// tail, its treatment of the tail has no effect.
fn is_full_kl(divergence: Divergence) -> bool {
    matches!(
        divergence,
        Divergence::Tail
            | Divergence::Damped(_)
            | Divergence::Renormalize
            | Divergence::RenormalizeBoth
    )
}

/// Chooses the loss terms for a local teacher.
pub(crate) fn choose_for_local_teacher(settings: &LossConfig) -> SoftLabelChoice {
    let is_full =
        Divergence::from_config(settings).is_some_and(|[divergence, _]| is_full_kl(divergence));
    let note = is_full.then(|| {
        format!(
            "`loss.kd = \"{}\"` is the full KL divergence with `teacher.local`",
            settings.kd.name()
        )
    });
    SoftLabelChoice {
        terms: Divergence::from_config(settings).map(|[divergence, _]| {
            // Cross-entropy would only add noise to the KL divergence over the whole vocabulary.
            let weight = if is_full {
                1.0
            } else {
                default_weight(divergence)
            };
            [soft_term(settings, divergence, weight); 2]
        }),
        end: None,
        notes: note.into_iter().collect(),
    }
}

impl SoftLabelChoice {
    /// Describes the loss for the data of `report`.
    pub(crate) fn describe(&self, report: &DataReport, has_local_teacher: bool) -> String {
        let has_no_soft_labels = !has_local_teacher && report.soft_positions == 0;
        let Some([inexact_term, exact_term]) = self.terms.filter(|_| !has_no_soft_labels) else {
            return "cross-entropy on the answers".into();
        };
        let inexact_samples = report.with_soft_labels - report.exact_samples;
        let terms = match (report.exact_samples, inexact_samples) {
            _ if has_local_teacher && is_full_kl(inexact_term.divergence) => {
                format!("KL, weight {}", inexact_term.weight)
            }
            _ if inexact_term == exact_term => inexact_term.to_string(),
            (_, 0) => exact_term.to_string(),
            (0, _) => inexact_term.to_string(),
            _ => format!("{exact_term}; {inexact_term} for answers that are not exact samples"),
        };
        let labels = if has_local_teacher {
            "distribution"
        } else {
            "top-k"
        };
        if has_local_teacher && inexact_term.weight == 1.0 {
            return format!("the teacher's {labels} ({terms})");
        }
        format!("cross-entropy and the teacher's {labels} ({terms})")
    }
}

fn tail_evidence(in_top_k: &Agreement) -> String {
    format!(
        "{:.2} % of {} emitted tokens are outside the top-k, where {:.2} % are expected",
        100.0 * (1.0 - in_top_k.rate()),
        format_count(in_top_k.positions),
        100.0 * (1.0 - in_top_k.expected())
    )
}

fn top1_evidence(agreement: &Agreement) -> String {
    format!(
        "the most likely token was emitted at {:.1} % of {} positions, where {:.1} % (standard \
         deviation {:.2}) are expected",
        100.0 * agreement.rate(),
        format_count(agreement.positions),
        100.0 * agreement.expected(),
        100.0 * agreement.deviation()
    )
}
