//! Estimate of the tokens, dollars, time and disk space of the open rows, for `--dry-run`. Pure.

use serde::Serialize;

use crate::budget::price;
use crate::cache::stats::CacheStats;
use crate::cache::unused_answers::UnusedAnswers;
use crate::cache::usage::Usage;
use crate::plan::Plan;

/// Minimum number of cached records for an estimate of the answer length or the disk space.
const MIN_RECORDS: u64 = 20;

const MINUTES_PER_DAY: f64 = 1_440.0;

/// Estimated consumption of the open rows of a plan.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Estimate {
    pub requests: u64,
    pub prompt_tokens: u64,
    /// Upper bound of the completion tokens: `sampling.max_tokens` for every answer.
    pub completion_tokens: u64,
    /// Completion tokens if the new answers have the mean length of the cached ones; `None` below [`MIN_RECORDS`]
    /// cached answers with usage.
    pub likely_completion_tokens: Option<u64>,
    /// Least and greatest cost in US dollars: if all answers are empty, and if all have `sampling.max_tokens` tokens;
    /// `None` without a price.
    pub cost_usd: Option<(f64, f64)>,
    /// Cost in US dollars with `likely_completion_tokens`; `None` without them or without a price.
    pub likely_cost_usd: Option<f64>,
    /// Minimum number of minutes under the configured limits, which count `sampling.max_tokens` for every answer; 0
    /// without limits, and for batches.
    pub minutes: f64,
    /// Estimated batches; `None` except in batch mode.
    pub batches: Option<BatchEstimate>,
    /// Number of bytes by which the cache will grow, at the mean size of its records; `None` below [`MIN_RECORDS`]
    /// records.
    pub disk_bytes: Option<u64>,
    /// Cached answers that this run does not use.
    pub cached: UnusedAnswers,
    /// Body of the request that would be sent first.
    pub first_request: Option<serde_json::Value>,
}

impl Estimate {
    /// Estimates the open rows of `plan`. `stats` counts a sample of the cache's records, whose mean size is
    /// `bytes_per_record`.
    pub fn new(plan: &Plan, stats: &CacheStats, bytes_per_record: f64) -> Estimate {
        let mut estimate = Estimate {
            cost_usd: Some((0.0, 0.0)),
            likely_cost_usd: Some(0.0),
            ..Estimate::default()
        };
        let answered = stats.records - stats.without_usage;
        let likely_length = (answered >= MIN_RECORDS)
            .then(|| stats.usage.completion_tokens as f64 / answered as f64);
        if likely_length.is_some() {
            estimate.likely_completion_tokens = Some(0);
        }
        for (endpoint, template) in plan.templates.iter().enumerate() {
            let requests = plan.rows_by_endpoint[endpoint].len() as u64;
            let prompt_tokens: u64 = plan.rows_by_endpoint[endpoint]
                .clone()
                .map(|row| plan.cost(endpoint, row).input_tokens)
                .sum();
            let max_completion_tokens = requests * u64::from(template.endpoint.sampling.max_tokens);
            let likely_completion_tokens = likely_length
                .map(|length| ((length * requests as f64) as u64).min(max_completion_tokens));
            let cost_usd = |completion_tokens| {
                let usage = Usage {
                    prompt_tokens,
                    completion_tokens,
                    ..Usage::default()
                };
                price::cost(&usage, &template.endpoint.price)
            };
            estimate.requests += requests;
            estimate.prompt_tokens += prompt_tokens;
            estimate.completion_tokens += max_completion_tokens;
            estimate.likely_completion_tokens = estimate
                .likely_completion_tokens
                .zip(likely_completion_tokens)
                .map(|(sum, tokens)| sum + tokens);
            estimate.cost_usd = estimate
                .cost_usd
                .zip(cost_usd(0).zip(cost_usd(max_completion_tokens)))
                .map(|(sum, cost)| (sum.0 + cost.0, sum.1 + cost.1));
            estimate.likely_cost_usd = estimate
                .likely_cost_usd
                .zip(likely_completion_tokens.and_then(cost_usd))
                .map(|(sum, cost)| sum + cost);
            let limits = &template.endpoint.limits;
            let minutes = |amount: u64, limit: Option<u32>| {
                limit.map_or(0.0, |limit| amount as f64 / f64::from(limit))
            };
            // The requests of the first day need no wait.
            let days = limits
                .requests_per_day
                .map_or(0, |limit| requests.saturating_sub(1) / limit);
            // The endpoints are used in parallel.
            estimate.minutes = estimate
                .minutes
                .max(minutes(requests, limits.requests_per_minute))
                .max(minutes(
                    prompt_tokens + max_completion_tokens,
                    limits.tokens_per_minute,
                ))
                .max(days as f64 * MINUTES_PER_DAY);
        }
        estimate.disk_bytes = (stats.records >= MIN_RECORDS)
            .then_some((bytes_per_record * estimate.requests as f64) as u64);
        estimate
    }
}

/// Estimated batches of a dry run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BatchEstimate {
    /// Number of batches to submit.
    pub batches: u64,
    /// Number of batches of earlier runs that have not been collected.
    pub under_way: u64,
    /// Number of rows of this plan in batches of earlier runs.
    pub rows_under_way: u64,
    /// Number of consecutive rounds of batches under `batch.enqueued_tokens`, for the endpoint with the most.
    pub rounds: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::question::KeyVariants;
    use crate::client::request::RequestTemplate;
    use crate::config::Config;
    use crate::plan::PlanScope;
    use crate::plan::RowStatus;
    use crate::prompt::Prompt;
    use crate::prompt::message::Message;

    #[test]
    fn estimate_ranges_follow_max_tokens_and_likely_values_follow_cached_answers() {
        let mut config = Config::default();
        config.sampling.max_tokens = 100;
        config.price.input = Some(1.0);
        config.price.output = Some(2.0);
        config.limits.requests_per_minute = Some(2);
        let templates = config
            .endpoints()
            .into_iter()
            .map(RequestTemplate::plain)
            .collect();
        let prompts = (0..4).map(|number| {
            Prompt::plain(
                number.to_string(),
                vec![Message::new("user", number.to_string())],
            )
        });
        let plan = Plan::new(
            prompts.collect(),
            templates,
            &config.prompts,
            PlanScope::default(),
            &KeyVariants::default(),
            |_| Ok(RowStatus::Open),
        );
        let plan = plan.unwrap();
        let estimate = Estimate::new(&plan, &CacheStats::default(), 0.0);
        assert_eq!((estimate.requests, estimate.completion_tokens), (4, 400));
        assert_eq!((estimate.minutes, estimate.disk_bytes), (2.0, None));
        let input = estimate.prompt_tokens as f64 / 1e6;
        let (least, most) = estimate.cost_usd.unwrap();
        assert!((least - input).abs() < 1e-12 && (most - input - 800e-6).abs() < 1e-12);
        assert_eq!(estimate.likely_cost_usd, None);

        let mut stats = CacheStats {
            records: 30,
            ..CacheStats::default()
        };
        stats.usage.completion_tokens = 300;
        let estimate = Estimate::new(&plan, &stats, 100.0);
        assert_eq!(estimate.likely_completion_tokens, Some(40));
        assert!((estimate.likely_cost_usd.unwrap() - input - 80e-6).abs() < 1e-12);
        assert_eq!(estimate.disk_bytes, Some(400));
    }
}
