//! Can the soft labels be trusted, and what is made of them?

use anyhow::{Result, bail};

use super::loss::divergence::Divergence;
use crate::config::{Config, KdMode, LossConfig};
use crate::data::logprob_check::Agreement;
use crate::data::report::{DataReport, NO_LOGPROBS, by_reason};
use crate::exit::Exit;
use crate::terminal::format_count;
use crate::tokenizer::Tokenizer;
use crate::train::loss::row::{End, SoftTerm};

/// At least one in 20 answers with logprobs must have soft labels.
const LEAST_USED: u64 = 20;

/// What to do with soft labels.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// The second is for answers that were sampled from the very distribution that their logprobs tell. None:
    /// cross-entropy alone.
    pub terms: Option<[SoftTerm; 2]>,
    /// The token that ends an answer; None where the soft labels tell of it as of any token.
    pub end: Option<End>,
    /// Sentences for the user.
    pub notes: Vec<String>,
}

/// Checks that soft labels of a cache can be mapped to the tokens of `tokenizer`.
///
/// # Errors
/// [`Exit::Usage`] if they are wanted, and the vocabulary does not tell the bytes of its tokens.
pub fn check_tokenizer(config: &Config, tokenizer: &Tokenizer) -> Result<()> {
    let wanted = config.loss.kd != KdMode::None && config.data.source.is_none();
    if !wanted || config.teacher.local.is_some() || tokenizer.has_token_bytes() {
        return Ok(());
    }
    bail!(Exit::Usage(format!(
        "the tokenizer in {} does not tell the bytes of its tokens (WordPiece drops the spaces between \
         words), so the teacher's tokens cannot be matched to them: choose a student with a byte-level \
         BPE or SentencePiece tokenizer, or train on the answers alone with loss.kd = \"none\"",
        config.student.path.display()
    )))
}

/// The weight of a term where `loss.kd_weight` is not set: the best of `tests/bench/softlabels.sh`.
pub fn default_weight(divergence: Divergence) -> f32 {
    match divergence {
        // The emitted token is part of it.
        Divergence::Damped(_) => 1.0,
        // Cross-entropy alone tells what the bucket holds.
        Divergence::Tail => 0.8,
        _ => 0.5,
    }
}

fn term(settings: &LossConfig, divergence: Divergence, default_weight: f32) -> SoftTerm {
    let weight = settings.kd_weight.map(|weight| weight as f32);
    SoftTerm {
        divergence,
        weight: weight.unwrap_or(default_weight),
    }
}

/// Chooses by the settings and by what the data are; `end` is the token that ends an answer.
///
/// # Errors
/// [`Exit::Usage`] where the logprobs are not those of the answers, or do not allow what the settings
/// want; not with `force`.
pub fn choose(
    settings: &LossConfig,
    report: &DataReport,
    end: Option<u32>,
    force: bool,
) -> Result<Choice> {
    let of = |divergence| term(settings, divergence, default_weight(divergence));
    let terms = Divergence::of(settings).map(|both| both.map(of));
    let is_listed = !report.misses_ends();
    let mut choice = Choice {
        terms,
        end: end.map(|token| End { token, is_listed }),
        notes: Vec::new(),
    };
    let Some([of_any, of_exact]) = terms else {
        return Ok(choice);
    };
    let refuse = |why: String| match force {
        true => {
            tracing::warn!("{why}; training all the same, as --force says");
            Ok(())
        }
        false => bail!(Exit::Usage(why)),
    };
    let mut missed = report.ce_only.clone();
    let without = missed.remove(NO_LOGPROBS).unwrap_or_default();
    let with_logprobs = report.kept.saturating_sub(without);
    if with_logprobs > 0 && report.with_soft_labels * LEAST_USED < with_logprobs {
        refuse(format!(
            "loss.kd = \"{}\" needs the teacher's logprobs, and those of {} of {} answers cannot be used: {}. Set \
             loss.kd = \"none\" to train on the answers alone, or pass --force",
            settings.kd.name(),
            format_count(with_logprobs - report.with_soft_labels),
            format_count(with_logprobs),
            by_reason(&missed)
        ))?;
    }
    if report.soft_positions == 0 {
        let name = settings.kd.name();
        choice.notes.push(format!(
            "loss.kd = \"{name}\": no answer has soft labels, so all train on cross-entropy alone"
        ));
        return Ok(choice);
    }
    if report.ends_listed < report.ends {
        choice.notes.push(format!(
            "{} of {} ends of answers are not in the logprobs: they train on cross-entropy, and the soft labels of \
             these answers do not say how likely an end is elsewhere",
            format_count(report.ends - report.ends_listed),
            format_count(report.ends)
        ));
    }
    if let Some(broken) = report.logprob_check.broken() {
        refuse(format!(
            "the teacher's logprobs do not belong to its answers: {}. They may be one position off, or \
             of another text. `loss.kd = \"none\"` trains on the answers alone; --force trains on them as \
             they are",
            told(&broken)
        ))?;
    }
    let (exact, all) = (report.exact_samples, report.with_soft_labels);
    let too_sharp = report.logprob_check.is_too_sharp();
    let misses_tail = report.logprob_check.misses_tail();
    let name = settings.kd.name();
    match settings.kd {
        KdMode::Auto if too_sharp => {
            choice.terms = Some([of_any; 2]);
            choice.notes.push(format!(
                "loss.kd = \"auto\": {of_any}, since the answers were sampled more sharply than their \
                 logprobs tell: {}",
                told(&report.logprob_check.exact)
            ));
        }
        KdMode::Auto if misses_tail => {
            choice.terms = Some([of_any; 2]);
            choice.notes.push(format!(
                "loss.kd = \"auto\": {of_any}, since tokens outside the top-k are missing: {}",
                tail_of(&report.logprob_check.in_top_k)
            ));
        }
        KdMode::Auto if exact == 0 => {
            choice.notes.push(format!(
                "loss.kd = \"auto\": {of_any}, since no answer was sampled as its logprobs tell (temperature 1, nothing \
                 cut off)"
            ));
        }
        KdMode::Auto if exact == all => {
            choice.notes.push(format!(
                "loss.kd = \"auto\": {of_exact}, since all answers were sampled at temperature 1, with nothing cut off"
            ));
        }
        KdMode::Auto => {
            choice.notes.push(format!(
                "loss.kd = \"auto\": {of_exact} for the {} answers that were sampled as their logprobs tell; \
                 {of_any} for the other {}",
                format_count(exact),
                format_count(all - exact)
            ));
        }
        KdMode::Unbiased | KdMode::Damped if exact < all => refuse(format!(
            "loss.kd = \"{name}\" needs answers that were sampled at temperature 1, with nothing cut \
             off: {} of {} were not (sampling.temperature and the like, when they were harvested). \
             \"auto\" uses \"tail\" for those",
            format_count(all - exact),
            format_count(all)
        ))?,
        KdMode::Unbiased | KdMode::Damped if too_sharp => refuse(format!(
            "loss.kd = \"{name}\" needs answers that were sampled as their logprobs tell, and these \
             were sampled more sharply: {}. Set it to \"tail\"",
            told(&report.logprob_check.exact)
        ))?,
        KdMode::Unbiased | KdMode::Damped if misses_tail => refuse(format!(
            "loss.kd = \"{name}\" needs answers with tokens from outside the top-k, and these are missing: {}. \
             The server truncates its sampling (top_k, top_p, min_p), or lists the emitted token in place of \
             another one. Set loss.kd to \"tail\"",
            tail_of(&report.logprob_check.in_top_k)
        ))?,
        _ => {}
    }
    Ok(choice)
}

/// Is this the full KL divergence where nothing of the teacher's distribution is missing?
fn is_full(divergence: Divergence) -> bool {
    matches!(
        divergence,
        Divergence::Tail
            | Divergence::Damped(_)
            | Divergence::Renormalize
            | Divergence::RenormalizeBoth
    )
}

/// Chooses for a teacher on this machine, of whose distributions nothing is missing.
pub fn dense(settings: &LossConfig) -> Choice {
    let full = Divergence::of(settings).is_some_and(|[divergence, _]| is_full(divergence));
    let note = full.then(|| {
        format!(
            "loss.kd = \"{}\" is the full KL divergence with teacher.local",
            settings.kd.name()
        )
    });
    Choice {
        terms: Divergence::of(settings).map(|[divergence, _]| {
            // Beside the full divergence, cross-entropy adds noise alone.
            let default = if full {
                1.0
            } else {
                default_weight(divergence)
            };
            [term(settings, divergence, default); 2]
        }),
        end: None,
        notes: note.into_iter().collect(),
    }
}

impl Choice {
    /// The loss in words, for data that `report` counts.
    pub fn loss(&self, report: &DataReport, is_dense: bool) -> String {
        let has_none = !is_dense && report.soft_positions == 0;
        let Some([of_any, of_exact]) = self.terms.filter(|_| !has_none) else {
            return "cross-entropy on the answers".into();
        };
        let others = report.with_soft_labels - report.exact_samples;
        let terms = match (report.exact_samples, others) {
            _ if is_dense && is_full(of_any.divergence) => format!("KL, weight {}", of_any.weight),
            _ if of_any == of_exact => of_any.to_string(),
            (_, 0) => of_exact.to_string(),
            (0, _) => of_any.to_string(),
            _ => format!("{of_exact}; {of_any} for answers that were sampled in another way"),
        };
        let of = if is_dense { "distribution" } else { "top-k" };
        format!("cross-entropy and the teacher's {of} ({terms})")
    }
}

fn tail_of(in_top_k: &Agreement) -> String {
    format!(
        "{:.2} % of {} emitted tokens are from there, which has {:.2} % of the mass",
        100.0 * (1.0 - in_top_k.rate()),
        format_count(in_top_k.positions),
        100.0 * (1.0 - in_top_k.expected())
    )
}

fn told(agreement: &Agreement) -> String {
    format!(
        "the most likely token was emitted at {:.1} % of {} positions, where {:.1} % (standard \
         deviation {:.2}) were to be expected",
        100.0 * agreement.rate(),
        format_count(agreement.positions),
        100.0 * agreement.expected(),
        100.0 * agreement.deviation()
    )
}
