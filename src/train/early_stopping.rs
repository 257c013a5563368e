//! Which validation was the best, and whether it is worth going on.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::config;
use crate::exit::Exit;
use crate::train::metrics::Means;

/// The validations so far; part of a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step after which the metric was best, and its value there.
    pub found: Option<(u64, f64)>,
    /// Validations since.
    pub since: u64,
}

/// Checks that the metric can be computed on `held_out` examples; `has_soft_labels` tells if these have soft labels.
///
/// # Errors
/// [`Exit::Usage`] if it cannot: every validation would count as no improvement.
pub(crate) fn check(
    metric: config::BestMetric,
    held_out: usize,
    has_soft_labels: impl FnOnce() -> bool,
) -> Result<()> {
    if metric != config::BestMetric::Last && held_out == 0 {
        bail!(Exit::Usage(
            "train.best needs held-out examples, and there are none: raise data.validation_share"
                .into()
        ));
    }
    if metric == config::BestMetric::Kl && !has_soft_labels() {
        bail!(Exit::Usage(
            "train.best = \"kl\" needs held-out examples with soft labels, and there are none: set it to \"ce\" or \
             \"token_accuracy\""
                .into()
        ));
    }
    Ok(())
}

impl Best {
    /// Takes in the validation after `step`; true if none was better. A metric that is missing or
    /// not finite is no improvement.
    pub fn is_improved_by(&mut self, metric: config::BestMetric, step: u64, means: &Means) -> bool {
        let (value, higher) = match metric {
            config::BestMetric::Last => return false,
            config::BestMetric::Ce => (means.ce, false),
            config::BestMetric::Kl => (means.kl, false),
            config::BestMetric::TokenAccuracy => (means.token_accuracy, true),
        };
        let better = |value: f64| match self.found {
            None => true,
            Some((_, best)) if higher => value > best,
            Some((_, best)) => value < best,
        };
        match value.filter(|value| value.is_finite()) {
            Some(value) if better(value) => {
                *self = Self {
                    found: Some((step, value)),
                    since: 0,
                };
                true
            }
            _ => {
                self.since += 1;
                false
            }
        }
    }

    /// Have there been `patience` validations without a better one?
    pub fn is_exhausted(&self, patience: u64) -> bool {
        patience > 0 && self.since >= patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_kept_and_patience_ends() {
        let means = |value: Option<f64>| Means {
            ce: value,
            token_accuracy: value,
            ..Means::default()
        };
        let values = [
            Some(2.0),
            Some(1.0),
            Some(1.0),
            None,
            Some(f64::NAN),
            Some(0.5),
        ];
        let (mut lowest, mut highest) = (Best::default(), Best::default());
        let mut improved = Vec::new();
        for (step, value) in values.into_iter().enumerate() {
            improved.push(lowest.is_improved_by(
                config::BestMetric::Ce,
                step as u64,
                &means(value),
            ));
            highest.is_improved_by(
                config::BestMetric::TokenAccuracy,
                step as u64,
                &means(value),
            );
            assert_eq!(lowest.is_exhausted(3), step == 4);
            assert!(!lowest.is_exhausted(0));
        }
        assert_eq!(improved, [true, true, false, false, false, true]);
        assert_eq!(lowest.found, Some((5, 0.5)));
        assert_eq!((highest.found, highest.since), (Some((0, 2.0)), 5));
    }
}
