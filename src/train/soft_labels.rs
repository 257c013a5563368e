//! Can the soft labels be trusted, and what is made of them?

use anyhow::{Result, bail};

use super::loss::divergence::Divergence;
use crate::config::{Config, Kd, Loss};
use crate::data::dataset::{NO_LOGPROBS, Report, by_reason};
use crate::data::gate::Agreement;
use crate::data::tokenizer::Tokenizer;
use crate::exit::Exit;
use crate::terminal::format_count;

/// At least one in 20 answers with logprobs must have soft labels.
const LEAST_USED: u64 = 20;

/// What to do with soft labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// See [`Divergence::of`].
    pub divergence: Option<[Divergence; 2]>,
    /// What the user may want to know of it.
    pub note: Option<String>,
}

/// Checks that soft labels of a cache can be mapped to the tokens of `tokenizer`.
///
/// # Errors
/// [`Exit::Usage`] if they are wanted, and the vocabulary does not tell the bytes of its tokens.
pub fn check_tokenizer(config: &Config, tokenizer: &Tokenizer) -> Result<()> {
    let wanted = config.loss.kd != Kd::None && config.data.source.is_none();
    if !wanted || config.teacher.local.is_some() || tokenizer.tells_bytes() {
        return Ok(());
    }
    bail!(Exit::Usage(format!(
        "the tokenizer in {} does not tell the bytes of its tokens (WordPiece drops the spaces between \
         words), so the teacher's tokens cannot be matched to them: choose a student with a byte-level \
         BPE or SentencePiece tokenizer, or train on the answers alone with loss.kd = \"none\"",
        config.student.path.display()
    )))
}

/// Chooses by the settings and by what the data are.
///
/// # Errors
/// [`Exit::Usage`] where the logprobs are not those of the answers, or do not allow what the settings
/// want; not with `force`.
pub fn choose(settings: &Loss, report: &Report, force: bool) -> Result<Choice> {
    let divergence = Divergence::of(settings);
    let mut choice = Choice {
        divergence,
        note: None,
    };
    if divergence.is_none() {
        return Ok(choice);
    }
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
        return Ok(choice);
    }
    if let Some(broken) = report.gate.broken() {
        refuse(format!(
            "the teacher's logprobs do not belong to its answers: {}. They may be one position off, or \
             of another text. `loss.kd = \"none\"` trains on the answers alone; --force trains on them as \
             they are",
            told(&broken)
        ))?;
    }
    let (exact, all) = (report.exact, report.with_soft_labels);
    let too_sharp = report.gate.is_too_sharp();
    let misses_tail = report.gate.misses_tail();
    match settings.kd {
        Kd::Auto if too_sharp => {
            choice.divergence = Some([Divergence::Tail; 2]);
            choice.note = Some(format!(
                "loss.kd = \"auto\": tail, since the answers were sampled more sharply than their \
                 logprobs tell: {}",
                told(&report.gate.exact)
            ));
        }
        Kd::Auto if misses_tail => {
            choice.divergence = Some([Divergence::Tail; 2]);
            choice.note = Some(format!(
                "loss.kd = \"auto\": tail, since tokens outside the top-k are missing: {}",
                tail_of(&report.gate.in_top_k)
            ));
        }
        Kd::Auto => {
            choice.note = Some(format!(
                "loss.kd = \"auto\": unbiased for the {} answers that were sampled as their logprobs tell, \
                 tail for the other {}",
                format_count(exact),
                format_count(all - exact)
            ));
        }
        Kd::Unbiased if exact < all => refuse(format!(
            "loss.kd = \"unbiased\" needs answers that were sampled at temperature 1, with nothing cut \
             off: {} of {} were not (sampling.temperature and the like, when they were harvested). \
             \"auto\" uses \"tail\" for those",
            format_count(all - exact),
            format_count(all)
        ))?,
        Kd::Unbiased if too_sharp => refuse(format!(
            "loss.kd = \"unbiased\" needs answers that were sampled as their logprobs tell, and these \
             were sampled more sharply: {}. Set it to \"tail\"",
            told(&report.gate.exact)
        ))?,
        Kd::Unbiased if misses_tail => refuse(format!(
            "loss.kd = \"unbiased\" needs answers with tokens from outside the top-k, and these are missing: {}. \
             The server truncates its sampling (top_k, top_p, min_p), or lists the emitted token in place of \
             another one. Set loss.kd to \"tail\"",
            tail_of(&report.gate.in_top_k)
        ))?,
        _ => {}
    }
    Ok(choice)
}

/// Chooses for a teacher on this machine, of whose distributions nothing is missing.
pub fn dense(settings: &Loss) -> Choice {
    let full = matches!(
        settings.kd,
        Kd::Auto | Kd::Tail | Kd::Unbiased | Kd::Renormalize | Kd::RenormalizeBoth
    );
    let note = full.then(|| {
        format!(
            "loss.kd = \"{}\" is the full KL divergence with teacher.local",
            settings.kd.name()
        )
    });
    Choice {
        divergence: Divergence::of(settings).map(|[of_any, _]| [of_any; 2]),
        note,
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
