//! Early stopping: remembers the best validation, and decides when to stop because no later validation was better.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::config;
use crate::exit::Exit;
use crate::train::metrics::MetricMeans;

/// Progress of the validation metric; part of a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopping {
    /// Step and value of the best validation.
    #[serde(rename = "found")]
    pub best: Option<(u64, f64)>,
    /// Number of validations since the best one.
    #[serde(rename = "since")]
    pub validations_since_best: u64,
}

/// Checks that `metric` can be computed on the held-out examples, whose number is `held_out`.
///
/// # Errors
/// [`Exit::Usage`] if the metric cannot be computed.
pub(crate) fn check(
    metric: config::BestMetric,
    held_out: usize,
    has_soft_labels: impl FnOnce() -> bool,
) -> Result<()> {
    if metric != config::BestMetric::Last && held_out == 0 {
        bail!(Exit::Usage(
            "`train.best` needs held-out examples, and there are none: raise `data.validation_share`"
                .into()
        ));
    }
    if metric == config::BestMetric::Kl && !has_soft_labels() {
        bail!(Exit::Usage(
            "`train.best = \"kl\"` needs held-out examples with soft labels, and there are none: set it to \"ce\" or \
             \"token_accuracy\""
                .into()
        ));
    }
    Ok(())
}

impl EarlyStopping {
    /// Records the validation after `step`. Returns true if it is the best one so far. A validation whose
    /// metric is missing or not finite is not an improvement. With [`config::BestMetric::Last`], records nothing.
    pub fn record(&mut self, metric: config::BestMetric, step: u64, means: &MetricMeans) -> bool {
        let (value, higher_is_better) = match metric {
            config::BestMetric::Last => return false,
            config::BestMetric::Ce => (means.ce, false),
            config::BestMetric::Kl => (means.kl, false),
            config::BestMetric::TokenAccuracy => (means.token_accuracy, true),
        };
        let is_better = |value: f64| match self.best {
            None => true,
            Some((_, best)) if higher_is_better => value > best,
            Some((_, best)) => value < best,
        };
        match value.filter(|value| value.is_finite()) {
            Some(value) if is_better(value) => {
                *self = Self {
                    best: Some((step, value)),
                    validations_since_best: 0,
                };
                true
            }
            _ => {
                self.validations_since_best += 1;
                false
            }
        }
    }

    /// Returns true if the last `patience` validations brought no improvement. With a patience of 0, always false.
    pub fn is_exhausted(&self, patience: u64) -> bool {
        patience > 0 && self.validations_since_best >= patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn early_stopping_keeps_the_best_validation_and_counts_patience() {
        let means = |value: Option<f64>| MetricMeans {
            ce: value,
            token_accuracy: value,
            ..MetricMeans::default()
        };
        let values = [
            Some(2.0),
            Some(1.0),
            Some(1.0),
            None,
            Some(f64::NAN),
            Some(0.5),
        ];
        let mut lowest = EarlyStopping::default();
        let mut highest = EarlyStopping::default();
        let mut improved = Vec::new();
        for (step, value) in values.into_iter().enumerate() {
            improved.push(lowest.record(config::BestMetric::Ce, step as u64, &means(value)));
            highest.record(
                config::BestMetric::TokenAccuracy,
                step as u64,
                &means(value),
            );
            assert_eq!(lowest.is_exhausted(3), step == 4);
            assert!(!lowest.is_exhausted(0));
        }
        assert_eq!(improved, [true, true, false, false, false, true]);
        assert_eq!(lowest.best, Some((5, 0.5)));
        assert_eq!(highest.best, Some((0, 2.0)));
        assert_eq!(highest.validations_since_best, 5);
    }

    #[test]
    fn early_stopping_keeps_its_serialized_names() {
        let state = EarlyStopping {
            best: Some((3, 0.5)),
            validations_since_best: 2,
        };
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(text, r#"{"found":[3,0.5],"since":2}"#);
    }
}
