//! Checks of the config beyond the types of the values.

use std::time::Duration;

use super::address;
use super::check::{check, check_with};
use super::data::Thinking;
use super::error::Mistake;
use super::harvest::BatchConfig;
use super::redis_url::CANNOT_SHARE;
use super::request_fields::check_extra;
use super::settings::Config;
use super::student::{BestMetric, KdMode, ScoredBy, TemplateDate};
use super::teacher::EndpointConfig;
use super::validate_student::validate_student;

impl Config {
    /// Checks the ranges of the values, and combinations of settings.
    ///
    /// # Errors
    /// The first mistake.
    pub(crate) fn validate(&self) -> Result<(), Mistake> {
        let is_share = |value: f64| (0.0..=1.0).contains(&value);
        self.validate_harvest()?;
        check(
            is_share(self.data.validation_share) && self.data.validation_share < 1.0,
            "data.validation_share",
            "must be at least 0 and below 1",
        )?;
        check(
            self.data.max_length > 0,
            "data.max_length",
            "must be at least 1",
        )?;
        check(
            self.data.max_source_length > 0,
            "data.max_source_length",
            "must be at least 1",
        )?;
        check(
            self.data.top_logprobs != Some(0),
            "data.top_logprobs",
            "must be at least 1; `loss.kd = \"none\"` trains without soft labels",
        )?;
        check(
            self.loss.kd_weight.is_none_or(is_share),
            "loss.kd_weight",
            "must lie between 0 and 1",
        )?;
        check(
            is_share(self.loss.tail_weight),
            "loss.tail_weight",
            "must lie between 0 and 1",
        )?;
        check(
            self.loss.alm_weight.is_finite() && self.loss.alm_weight >= 0.0,
            "loss.alm_weight",
            "must be finite and not negative",
        )?;
        check(
            self.loss.temperature.is_finite() && self.loss.temperature > 0.0,
            "loss.temperature",
            "must be finite and above 0",
        )?;
        check(
            0.0 < self.loss.beta && self.loss.beta < 1.0,
            "loss.beta",
            "must be above 0 and below 1: for its limits 0 and 1, set `loss.kd` to \"tail\" or \"reverse_kl\"",
        )?;
        check(
            is_share(self.loss.alpha) && self.loss.alpha < 1.0,
            "loss.alpha",
            "must be at least 0 and below 1",
        )?;
        check(
            is_share(self.loss.label_smoothing) && self.loss.label_smoothing < 1.0,
            "loss.label_smoothing",
            "must be at least 0 and below 1",
        )?;
        check(
            self.lora.alpha.is_finite() && self.lora.alpha > 0.0,
            "lora.alpha",
            "must be finite and above 0",
        )?;
        check(
            self.lora.rank == 0 || !self.train.scale_parameter,
            "train.scale_parameter",
            "does not work with `lora.rank`: half of LoRA's weights start at 0, so their learning rate would stay near 0",
        )?;
        let teacher = &self.teacher;
        check(
            teacher.local.is_some() || !teacher.cotrain,
            "teacher.cotrain",
            "trains the model in `teacher.local`, which is not set: set it, or remove `teacher.cotrain`",
        )?;
        check(
            teacher.cotrain_rate.is_finite() && teacher.cotrain_rate > 0.0,
            "teacher.cotrain_rate",
            "must be finite and above 0",
        )?;
        check(
            self.teachers
                .iter()
                .all(|teacher| teacher.local.is_none() && !teacher.cotrain),
            "teachers",
            "must not set `local` or `cotrain`: set them in `[teacher]`, since a student has at most one local teacher",
        )?;
        check(
            !self.train.on_policy || self.data.thinking != Thinking::Context,
            "train.on_policy",
            "generates answers without the teacher's thinking: set `data.thinking` to \
         \"supervise\" or \"drop\"",
        )?;
        let uses_record_date = self.student.template_date == Some(TemplateDate::Record);
        check(
            !uses_record_date || self.data.source.is_none(),
            "student.template_date",
            "= \"record\" needs the records of a cache: set a date for the rows of `data.source`",
        )?;
        check(
            !uses_record_date || !self.train.on_policy || self.on_policy.tokenizer.is_none(),
            "student.template_date",
            "= \"record\" has no date for `on_policy.tokenizer`: set a date",
        )?;
        let on_policy = &self.on_policy;
        let is_judge_local = on_policy.judge == ScoredBy::Local;
        check(
            !self.train.on_policy || is_judge_local == teacher.local.is_some(),
            "train.on_policy",
            "needs a teacher that scores the student's answers: set `teacher.local` and \
         `on_policy.judge = \"local\"`; or, without `teacher.local`, set `on_policy.judge = \"prompt_logprobs\"` \
         (vLLM) or \"echo\" for the endpoint in `[teacher]`",
        )?;
        check(
            on_policy.judge != ScoredBy::Echo || on_policy.tokenizer.is_some(),
            "on_policy.judge",
            "= \"echo\" needs the teacher's chat template: set `on_policy.tokenizer` to the \
         folder of its tokenizer",
        )?;
        let endpoints = self.endpoints();
        check(
            is_judge_local || !self.train.on_policy || endpoints.len() == 1,
            "teachers",
            "must have at most one entry with `train.on_policy`: the student's answers are scored by one teacher",
        )?;
        check(
            is_judge_local
                || !self.train.on_policy
                || endpoints
                    .iter()
                    .all(|endpoint| endpoint.sampling.top_logprobs > 0),
            "on_policy.judge",
            "requests `sampling.top_logprobs` logprobs per token: set it to 1 or more",
        )?;
        check(
            is_share(on_policy.share),
            "on_policy.share",
            "must lie between 0 and 1",
        )?;
        check(
            on_policy.max_tokens > 0,
            "on_policy.max_tokens",
            "must be at least 1",
        )?;
        check(
            on_policy.temperature.is_finite() && on_policy.temperature >= 0.0,
            "on_policy.temperature",
            "must be finite and not negative",
        )?;
        check(
            on_policy.kd != KdMode::None && self.loss.kd != KdMode::None || !self.train.on_policy,
            "train.on_policy",
            "trains on a divergence: neither `on_policy.kd` nor `loss.kd` may be \"none\"",
        )?;
        let train = &self.train;
        check(
            train.batch_size > 0,
            "train.batch_size",
            "must be at least 1",
        )?;
        check(
            train.micro_batch_size > 0,
            "train.micro_batch_size",
            "must be at least 1",
        )?;
        check(
            train.steps.is_some() || (train.epochs.is_finite() && train.epochs > 0.0),
            "train.epochs",
            "must be finite and above 0",
        )?;
        check(
            train.learning_rate.is_finite() && train.learning_rate >= 0.0,
            "train.learning_rate",
            "must be finite and not negative",
        )?;
        check(
            is_share(train.min_learning_rate_ratio),
            "train.min_learning_rate_ratio",
            "must lie between 0 and 1: it is a share of `train.learning_rate`",
        )?;
        check(
            train.weight_decay.is_finite() && train.weight_decay >= 0.0,
            "train.weight_decay",
            "must be finite and not negative",
        )?;
        check(
            is_share(train.beta1) && train.beta1 < 1.0,
            "train.beta1",
            "must be at least 0 and below 1",
        )?;
        check(
            is_share(train.beta2) && train.beta2 < 1.0,
            "train.beta2",
            "must be at least 0 and below 1",
        )?;
        check(
            train.epsilon.is_finite() && train.epsilon > 0.0,
            "train.epsilon",
            "must be finite and above 0",
        )?;
        check(
            train.max_grad_norm.is_finite() && train.max_grad_norm >= 0.0,
            "train.max_grad_norm",
            "must be finite and not negative; 0 turns clipping off",
        )?;
        check(
            train.keep_checkpoints > 0,
            "train.keep_checkpoints",
            "must be at least 1",
        )?;
        check(
            is_share(train.decay_share),
            "train.decay_share",
            "must lie between 0 and 1",
        )?;
        check(
            is_share(train.ema_decay) && train.ema_decay < 1.0,
            "train.ema_decay",
            "must be at least 0 and below 1",
        )?;
        check(
            train.best != BestMetric::Kl || !self.teacher.cotrain,
            "train.best",
            "must not be \"kl\" with `teacher.cotrain`, because the distance to a teacher that changes has no best step: \
             set it to \"ce\" or \"token_accuracy\"",
        )?;
        check(
            train.patience == 0 || train.best != BestMetric::Last,
            "train.patience",
            "needs a metric: set `train.best` to \"ce\", \"kl\" or \"token_accuracy\"",
        )?;
        check(
            train.patience == 0 || train.eval_every > 0,
            "train.patience",
            "counts validations: set `train.eval_every`",
        )?;
        check(
            self.eval.batch_size > 0,
            "eval.batch_size",
            "must be at least 1",
        )?;
        check(
            self.eval.max_tokens > 0,
            "eval.max_tokens",
            "must be at least 1",
        )?;
        check(
            self.eval.limit != Some(0),
            "eval.limit",
            "must be at least 1; omit it to use all rows",
        )?;
        validate_student(&self.student)
    }
}

impl Config {
    /// Checks the settings of `distill harvest`.
    fn validate_harvest(&self) -> Result<(), Mistake> {
        check(
            (1..=1_000_000_000).contains(&self.prompts.samples),
            "prompts.samples",
            "must be between 1 and 1,000,000,000",
        )?;
        check(
            self.prompts.limit != Some(0),
            "prompts.limit",
            "must be at least 1; omit it to use all prompts",
        )?;
        check(
            self.retry.max_attempts > 0,
            "retry.max_attempts",
            "must be at least 1",
        )?;
        check(
            self.budget
                .usd
                .is_none_or(|usd| usd.is_finite() && usd > 0.0),
            "budget.usd",
            "must be finite and above 0; omit it for no limit",
        )?;
        let endpoints = self.endpoints();
        check_batch(&self.batch)?;
        for (index, endpoint) in endpoints.iter().enumerate() {
            let list_index = (!self.teachers.is_empty()).then_some(index);
            let label = endpoint.teacher.label();
            let is_unique = endpoints[..index]
                .iter()
                .all(|other| other.teacher.label() != label);
            let name_key = if endpoint.teacher.name.is_empty() {
                "teacher.model"
            } else {
                "teacher.name"
            };
            check_endpoint(endpoint)
                .and_then(|()| {
                    check_with(is_unique, name_key, || {
                        format!(
                            "two teachers have the name {label:?}: give each a `name` of its own"
                        )
                    })
                })
                .map_err(|mistake| Mistake {
                    teacher: list_index,
                    ..mistake
                })?;
        }
        Ok(())
    }
}

fn check_batch(batch: &BatchConfig) -> Result<(), Mistake> {
    let is_above_0 = |value: f64| value.is_finite() && value > 0.0;
    check(
        batch.max_requests > 0,
        "batch.max_requests",
        "must be above 0",
    )?;
    check(
        is_above_0(batch.max_megabytes),
        "batch.max_megabytes",
        "must be finite and above 0",
    )?;
    check(
        is_above_0(batch.max_output_gigabytes),
        "batch.max_output_gigabytes",
        "must be finite and above 0",
    )?;
    check(
        batch.enqueued_tokens != Some(0),
        "batch.enqueued_tokens",
        "must be above 0",
    )?;
    check(
        !batch.poll.is_zero() && batch.poll <= Duration::from_secs(86_400),
        "batch.poll_s",
        "must be above 0 and at most 86,400 seconds",
    )?;
    check(
        (0.0..=1.0).contains(&batch.discount),
        "batch.discount",
        "must lie between 0 and 1: it is the price of a batch as a share of `[price]`",
    )
}

fn check_endpoint(endpoint: &EndpointConfig) -> Result<(), Mistake> {
    let teacher = &endpoint.teacher;
    teacher.check()?;
    address::check(teacher)?;
    check(
        !teacher.timeout.is_zero(),
        "teacher.timeout_s",
        "must be greater than 0 seconds",
    )?;
    check(
        !teacher.connect_timeout.is_zero(),
        "teacher.connect_timeout_s",
        "must be greater than 0 seconds",
    )?;
    check_extra(&endpoint.sampling.extra)?;
    check(
        endpoint.sampling.top_logprobs <= 20,
        "sampling.top_logprobs",
        "must be at most 20, the maximum of most endpoints",
    )?;
    check(
        (endpoint.sampling.temperature).is_none_or(|value| (0.0..=100.0).contains(&value)),
        "sampling.temperature",
        "must lie between 0 and 100; most endpoints accept up to 2",
    )?;
    check(
        (endpoint.sampling.top_p).is_none_or(|value| 0.0 < value && value <= 1.0),
        "sampling.top_p",
        "must be above 0 and at most 1",
    )?;
    check(
        endpoint.sampling.max_tokens > 0,
        "sampling.max_tokens",
        "must be at least 1",
    )?;
    check(
        endpoint.limits.concurrency > 0,
        "limits.concurrency",
        "must be at least 1",
    )?;
    let limits = &endpoint.limits;
    for (key, limit) in [
        (
            "limits.requests_per_minute",
            limits.requests_per_minute.map(u64::from),
        ),
        (
            "limits.tokens_per_minute",
            limits.tokens_per_minute.map(u64::from),
        ),
        ("limits.requests_per_day", limits.requests_per_day),
    ] {
        check(
            limit != Some(0),
            key,
            "must be at least 1; omit it for no limit",
        )?;
    }
    if endpoint.limits.shared.is_some() {
        check_with(cfg!(feature = "redis"), "limits.shared", || {
            CANNOT_SHARE.into()
        })?;
        check(
            limits.requests_per_minute.is_some()
                || limits.tokens_per_minute.is_some()
                || limits.requests_per_day.is_some(),
            "limits.shared",
            "has no limit to share: set `limits.requests_per_minute`, \
             `limits.tokens_per_minute` or `limits.requests_per_day`",
        )?;
    }
    check(
        endpoint.teacher.share.is_finite() && endpoint.teacher.share > 0.0,
        "teacher.share",
        "must be finite and above 0",
    )?;
    let price = &endpoint.price;
    for (key, price) in [
        ("price.input", price.input),
        ("price.cached_input", price.cached_input),
        ("price.output", price.output),
    ] {
        let is_valid = price.is_none_or(|price| price.is_finite() && price >= 0.0);
        check(is_valid, key, "must be finite and not negative")?;
    }
    Ok(())
}
