//! Lines that a training run prints.

use std::time::Duration;

use crate::config::TrainConfig;
use crate::terminal::{format_count, format_duration};
use crate::train::device;
use crate::train::metrics::MetricMeans;
use crate::train::trainable::TrainableModel;

/// Numbers of parameters of a student.
#[derive(Clone, Copy)]
pub(super) struct ParameterCounts {
    pub all: usize,
    /// Trained parameters, including adapters.
    pub trained: usize,
}

impl ParameterCounts {
    pub(super) fn new(student: &TrainableModel) -> Self {
        Self {
            all: student.model.config().parameter_count(),
            trained: student.vars.values().map(|var| var.elem_count()).sum(),
        }
    }
}

/// Describes the run at its start.
pub(super) fn opening(
    parameters: ParameterCounts,
    examples: usize,
    total_steps: u64,
    settings: &TrainConfig,
    earlier_steps: u64,
) -> String {
    let resumed = match earlier_steps {
        0 => String::new(),
        step => format!(", from step {step}"),
    };
    let trained = if parameters.trained == parameters.all {
        String::new()
    } else {
        format!(" ({} trained)", format_count(parameters.trained as u64))
    };
    format!(
        "{} parameters{trained} in {}{}, {} examples, {total_steps} steps of {} examples{resumed}",
        format_count(parameters.all as u64),
        device::precision(settings).name(),
        device::label(settings),
        format_count(examples as u64),
        settings.batch_size,
    )
}

/// Describes a step. Leaves out the values that the step does not have.
pub(super) fn step(
    loss: Option<f64>,
    means: &MetricMeans,
    learning_rate: f64,
    tokens_per_s: f64,
    remaining: Duration,
) -> String {
    let values = [("loss", loss), ("CE", means.ce), ("KL", means.kl)];
    let values: String = values
        .iter()
        .filter_map(|(name, value)| Some(format!("{name} {:.4}, ", (*value)?)))
        .collect();
    format!(
        "{values}lr {learning_rate:.1e}, {tokens_per_s:.0} tokens/s, {} left",
        format_duration(remaining)
    )
}

/// Describes a validation.
pub(super) fn validation(step: u64, loss: Option<f64>, means: &MetricMeans) -> String {
    let format_metric = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.4}"));
    format!(
        "step {step}: loss {}; validation: CE {}, KL {}, token accuracy {}",
        format_metric(loss),
        format_metric(means.ce),
        format_metric(means.kl),
        format_metric(means.token_accuracy)
    )
}
