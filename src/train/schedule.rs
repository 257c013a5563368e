//! Learning rate schedules.

use crate::config::{LrSchedule, TrainConfig};

/// Returns the learning rate of step `step` (from 1) of `total`: a linear warmup to `train.learning_rate`, then the
/// schedule. All schedules but `constant` end at `min_learning_rate_ratio` times `train.learning_rate`.
pub(crate) fn learning_rate(train: &TrainConfig, step: u64, total: u64) -> f64 {
    let peak = train.learning_rate;
    let warmup = train.warmup_steps.min(total);
    if step <= warmup {
        return peak * step as f64 / warmup as f64;
    }
    if train.schedule == LrSchedule::Wsd {
        return peak * wsd_factor(train, step, total);
    }
    let progress = (step - warmup) as f64 / (total - warmup).max(1) as f64;
    // Share of the distance between the lowest and the highest rate.
    let share = match train.schedule {
        LrSchedule::Constant | LrSchedule::Wsd => 1.0,
        LrSchedule::Linear => 1.0 - progress,
        LrSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
    };
    let floor = train.min_learning_rate_ratio;
    peak * (floor + (1.0 - floor) * share)
}

/// Returns a note for the user if the warmup is at least as long as the run.
pub(crate) fn warmup_note(train: &TrainConfig, total: u64) -> Option<String> {
    (total > 0 && train.warmup_steps >= total).then(|| {
        format!(
            "`train.warmup_steps` = {} is not less than the {total} steps of this run: the learning rate rises until the \
             last step",
            train.warmup_steps
        )
    })
}

/// Returns the factor of the warmup-stable-decay schedule (Hu et al., arXiv 2404.06395): 1, then linear to
/// `min_learning_rate_ratio` over the last `decay_share` of the steps.
fn wsd_factor(train: &TrainConfig, step: u64, total: u64) -> f64 {
    let decay_steps = (train.decay_share * total as f64).max(1.0);
    let share = ((total - step) as f64 / decay_steps).min(1.0);
    let floor = train.min_learning_rate_ratio;
    floor + (1.0 - floor) * share
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(schedule: LrSchedule) -> TrainConfig {
        TrainConfig {
            learning_rate: 1.0,
            min_learning_rate_ratio: 0.1,
            warmup_steps: 10,
            schedule,
            ..TrainConfig::default()
        }
    }

    #[test]
    fn schedule_warms_up_and_ends_at_the_floor() {
        for schedule in [LrSchedule::Linear, LrSchedule::Cosine] {
            let rate = |step| learning_rate(&train(schedule), step, 110);
            assert!((rate(1) - 0.1).abs() < 1e-12);
            assert!((rate(10) - 1.0).abs() < 1e-12);
            assert!(
                (rate(60) - 0.55).abs() < 1e-12,
                "half way through the decay"
            );
            assert!((rate(110) - 0.1).abs() < 1e-12);
        }
        assert_eq!(learning_rate(&train(LrSchedule::Constant), 110, 110), 1.0);
    }

    #[test]
    fn wsd_is_constant_until_the_decay() {
        let rate = |step| learning_rate(&train(LrSchedule::Wsd), step, 110);
        assert!((rate(5) - 0.5).abs() < 1e-12);
        assert_eq!((rate(10), rate(88)), (1.0, 1.0));
        assert!((rate(99) - 0.55).abs() < 1e-12, "half way down");
        assert!((rate(110) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn learning_rate_is_finite_when_the_warmup_fills_the_run() {
        assert!((learning_rate(&train(LrSchedule::Cosine), 5, 5) - 1.0).abs() < 1e-12);
    }
}
