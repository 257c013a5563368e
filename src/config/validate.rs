//! Checks of the config beyond the types of the values.

use anyhow::Result;

use super::data::Thinking;
use super::harvest::BatchConfig;
use super::redis_url::CANNOT_SHARE;
use super::settings::Config;
use super::student::{BestMetric, KdMode, ScoredBy, StudentInit, TemplateDate};
use super::teacher::EndpointConfig;
use crate::config::error::usage;
use crate::config::request_fields::check_extra;

fn check(is_valid: bool, message: &str) -> Result<()> {
    if is_valid {
        Ok(())
    } else {
        Err(usage(message.to_string()))
    }
}

impl Config {
/// Checks ranges, and combinations of settings.
///
/// # Errors
/// [`crate::exit::Exit::Usage`] for the first mistake.
pub(crate) fn validate(&self) -> Result<()> {
    let config = self;
    let share = |value: f64| (0.0..=1.0).contains(&value);
    harvest(config)?;
    check(
        share(config.data.validation_share) && config.data.validation_share < 1.0,
        "data.validation_share must be at least 0 and below 1",
    )?;
    check(
        config.data.top_logprobs != Some(0),
        "data.top_logprobs must be at least 1; loss.kd = \"none\" trains without soft labels",
    )?;
    check(
        config.loss.kd_weight.is_none_or(share),
        "loss.kd_weight must lie between 0 and 1",
    )?;
    check(
        share(config.loss.tail_weight),
        "loss.tail_weight must lie between 0 and 1",
    )?;
    check(
        config.loss.alm_weight.is_finite() && config.loss.alm_weight >= 0.0,
        "loss.alm_weight must be finite and not negative",
    )?;
    check(
        config.loss.temperature.is_finite() && config.loss.temperature > 0.0,
        "loss.temperature must be above 0",
    )?;
    check(
        0.0 < config.loss.beta && config.loss.beta < 1.0,
        "loss.beta must be above 0 and below 1: its limits are kd = \"tail\" and \"reverse_kl\"",
    )?;
    check(
        share(config.loss.alpha) && config.loss.alpha < 1.0,
        "loss.alpha must be at least 0 and below 1",
    )?;
    check(
        share(config.loss.label_smoothing) && config.loss.label_smoothing < 1.0,
        "loss.label_smoothing must be at least 0 and below 1",
    )?;
    check(
        config.lora.alpha.is_finite() && config.lora.alpha > 0.0,
        "lora.alpha must be above 0",
    )?;
    let teacher = &config.teacher;
    check(
        teacher.local.is_some() || !teacher.cotrain,
        "teacher.cotrain trains the model in teacher.local: set teacher.local",
    )?;
    check(
        teacher.cotrain_rate.is_finite() && teacher.cotrain_rate > 0.0,
        "teacher.cotrain_rate must be above 0",
    )?;
    check(
        config
            .teachers
            .iter()
            .all(|teacher| teacher.local.is_none() && !teacher.cotrain),
        "set `local` and `cotrain` in [teacher], not in [[teachers]]: a student has one teacher on this machine",
    )?;
    check(
        !config.train.on_policy || config.data.thinking != Thinking::Context,
        "train.on_policy generates answers without the teacher's thinking: set data.thinking to \
         \"supervise\" or \"drop\"",
    )?;
    let is_of_record = config.student.template_date == Some(TemplateDate::Record);
    check(
        !is_of_record || config.data.source.is_none(),
        "student.template_date = \"record\" needs the records of a cache: set a date for the rows of data.source",
    )?;
    check(
        !is_of_record || !config.train.on_policy || config.on_policy.tokenizer.is_none(),
        "student.template_date = \"record\" has no date for on_policy.tokenizer: set a date",
    )?;
    let on_policy = &config.on_policy;
    let is_local = on_policy.judge == ScoredBy::Local;
    check(
        !config.train.on_policy || is_local == teacher.local.is_some(),
        "train.on_policy needs a teacher that scores the student's answers: set teacher.local and \
         on_policy.judge = \"local\"; or, without teacher.local, set on_policy.judge = \"prompt_logprobs\" \
         (vLLM) or \"echo\" for the endpoint in [teacher]",
    )?;
    check(
        on_policy.judge != ScoredBy::Echo || on_policy.tokenizer.is_some(),
        "on_policy.judge = \"echo\" needs the teacher's chat template: set on_policy.tokenizer to the \
         folder of its tokenizer",
    )?;
    let endpoints = config.endpoints();
    check(
        is_local || !config.train.on_policy || endpoints.len() == 1,
        "the student's answers are scored by one teacher: set it in [teacher], without [[teachers]]",
    )?;
    check(
        is_local
            || !config.train.on_policy
            || endpoints
                .iter()
                .all(|endpoint| endpoint.sampling.top_logprobs > 0),
        "on_policy.judge requests sampling.top_logprobs logprobs per token: set it to 1 or more",
    )?;
    check(
        share(on_policy.share) && on_policy.max_tokens > 0,
        "on_policy.share must lie between 0 and 1, and on_policy.max_tokens be at least 1",
    )?;
    check(
        on_policy.temperature.is_finite() && on_policy.temperature >= 0.0,
        "on_policy.temperature must be finite and not negative",
    )?;
    check(
        on_policy.kd != KdMode::None && config.loss.kd != KdMode::None || !config.train.on_policy,
        "train.on_policy trains on a divergence: neither on_policy.kd nor loss.kd may be \"none\"",
    )?;
    let train = &config.train;
    check(
        train.batch_size > 0 && train.micro_batch_size > 0,
        "train.batch_size and train.micro_batch_size must be at least 1",
    )?;
    check(
        train.steps.is_some() || (train.epochs.is_finite() && train.epochs > 0.0),
        "train.epochs must be above 0",
    )?;
    check(
        train.learning_rate.is_finite() && train.learning_rate >= 0.0,
        "train.learning_rate must be finite and not negative",
    )?;
    check(
        share(train.beta1) && share(train.beta2) && train.beta1 < 1.0 && train.beta2 < 1.0,
        "train.beta1 and train.beta2 must be at least 0 and below 1",
    )?;
    check(
        share(train.decay_share),
        "train.decay_share must lie between 0 and 1",
    )?;
    check(
        share(train.ema_decay) && train.ema_decay < 1.0,
        "train.ema_decay must be at least 0 and below 1",
    )?;
    check(
        train.patience == 0 || train.best != BestMetric::Last,
        "train.patience needs a metric: set train.best to \"ce\", \"kl\" or \"token_accuracy\"",
    )?;
    check(
        train.patience == 0 || train.eval_every > 0,
        "train.patience counts validations: set train.eval_every",
    )?;
    check(
        config.eval.batch_size > 0,
        "eval.batch_size must be at least 1",
    )?;
    let student = &config.student;
    check(
        student.init == StudentInit::Pretrained
            || (student.num_attention_heads > 0
                && student
                    .hidden_size
                    .is_multiple_of(student.num_attention_heads)),
        "student.hidden_size must be a multiple of student.num_attention_heads",
    )
}

fn harvest(config: &Config) -> Result<()> {
    check(
        (1..=1_000_000_000).contains(&config.prompts.samples),
        "prompts.samples must be between 1 and 1,000,000,000",
    )?;
    check(
        config.retry.max_attempts > 0,
        "retry.max_attempts must be at least 1",
    )?;
    check(
        config
            .budget
            .usd
            .is_none_or(|usd| usd.is_finite() && usd > 0.0),
        "budget.usd must be above 0; omit it for no limit",
    )?;
    let retry = &config.retry;
    let mut waits = vec![retry.base_s, retry.max_s, retry.max_outage_s];
    let endpoints = config.endpoints();
    for teacher in endpoints.iter().map(|endpoint| &endpoint.teacher) {
        waits.extend([teacher.timeout_s, teacher.connect_timeout_s]);
    }
    check(
        waits
            .iter()
            .all(|s| s.is_finite() && (0.0..=1e9).contains(s)),
        "times in seconds must be finite and not negative",
    )?;
    batch(&config.batch)?;
    for (index, endpoint) in endpoints.iter().enumerate() {
        self::check_endpoint(endpoint)?;
        let label = endpoint.teacher.label();
        check(
            endpoints[..index]
                .iter()
                .all(|other| other.teacher.label() != label),
            &format!("two teachers have the name {label:?}: give each a `name` of its own"),
        )?;
    }
    Ok(())
}

fn batch(batch: &BatchConfig) -> Result<()> {
    let is_above_0 = |value: f64| value.is_finite() && value > 0.0;
    check(
        batch.max_requests > 0
            && is_above_0(batch.max_megabytes)
            && is_above_0(batch.max_output_gigabytes)
            && batch.enqueued_tokens != Some(0),
        "batch.max_requests, max_megabytes, max_output_gigabytes and enqueued_tokens must be above 0",
    )?;
    check(
        is_above_0(batch.poll_s) && batch.poll_s <= 86_400.0,
        "batch.poll_s must be above 0 and at most 86,400 seconds",
    )?;
    check(
        (0.0..=1.0).contains(&batch.discount),
        "batch.discount must lie between 0 and 1: it is the price of a batch as a share of [price]",
    )
}

fn check_endpoint(endpoint: &EndpointConfig) -> Result<()> {
    endpoint.teacher.check()?;
    check_extra(&endpoint.sampling.extra)?;
    check(
        endpoint.sampling.top_logprobs <= 20,
        "sampling.top_logprobs can be up to 20, the maximum of most endpoints",
    )?;
    check(
        (endpoint.sampling.temperature).is_none_or(|value| (0.0..=100.0).contains(&value)),
        "sampling.temperature must lie between 0 and 100; most endpoints accept up to 2",
    )?;
    check(
        (endpoint.sampling.top_p).is_none_or(|value| 0.0 < value && value <= 1.0),
        "sampling.top_p must be above 0 and at most 1",
    )?;
    check(
        endpoint.sampling.max_tokens > 0,
        "sampling.max_tokens must be at least 1",
    )?;
    check(
        endpoint.limits.concurrency > 0,
        "limits.concurrency must be at least 1",
    )?;
    let limits = [
        endpoint.limits.requests_per_minute.map(u64::from),
        endpoint.limits.tokens_per_minute.map(u64::from),
        endpoint.limits.requests_per_day,
    ];
    for limit in limits {
        check(
            limit != Some(0),
            "a limit per minute or day must be at least 1; omit it for no limit",
        )?;
    }
    if endpoint.limits.shared.is_some() {
        check(cfg!(feature = "redis"), CANNOT_SHARE)?;
        check(
            limits.iter().any(Option::is_some),
            "limits.shared has no limit to share: set limits.requests_per_minute, \
             tokens_per_minute or requests_per_day",
        )?;
    }
    check(
        endpoint.teacher.share.is_finite() && endpoint.teacher.share > 0.0,
        "teacher.share must be above 0",
    )?;
    check(
        endpoint
            .price
            .as_of
            .as_ref()
            .is_none_or(|date| date.parse::<jiff::civil::Date>().is_ok()),
        "price.as_of must be a date such as \"2026-11-22\"",
    )?;
    for price in [
        endpoint.price.input,
        endpoint.price.cached_input,
        endpoint.price.output,
    ] {
        check(
            price.is_none_or(|price| price.is_finite() && price >= 0.0),
            "a price must not be negative",
        )?;
    }
    Ok(())
}
