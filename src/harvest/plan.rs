//! What is to be asked: every prompt and sample that the cache does not hold.

use std::collections::HashSet;

use serde::Serialize;
use serde_json::Value;

use super::{cost, request, teacher};
use crate::cache::record::Usage;
use crate::config::Config;
use crate::prompt::Prompt;

/// One answer to ask for.
#[derive(Debug)]
pub struct Row {
    /// Index in [`Plan::prompts`].
    pub prompt: usize,
    pub sample: u32,
    /// Names the record; see [`request::key`].
    pub key: String,
    /// Estimate of what a limit on tokens will count: prompt and `sampling.max_tokens`.
    pub tokens: u64,
}

pub struct Plan {
    pub prompts: Vec<Prompt>,
    /// Still to be asked, in the order of the source.
    pub rows: Vec<Row>,
    /// Prompts times samples.
    pub total: u64,
    /// Of these, answered already.
    pub cached: u64,
    /// Of the cached ones, those that ask word for word the same as an earlier row of this run.
    pub repeated: u64,
}

/// What the remaining rows will use, before any of them is asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    pub prompt_tokens: u64,
    /// At most: every answer as long as `sampling.max_tokens`.
    pub completion_tokens: u64,
    /// US dollars for empty and for longest answers; none without prices.
    pub cost_usd: Option<(f64, f64)>,
    /// The time that the limits alone demand.
    pub minutes: f64,
}

impl Plan {
    /// `is_cached` tells whether a key has been answered.
    pub fn new(prompts: Vec<Prompt>, config: &Config, is_cached: impl Fn(&str) -> bool) -> Plan {
        let samples = config.prompts.samples;
        let mut plan = Plan {
            total: prompts.len() as u64 * u64::from(samples),
            rows: Vec::new(),
            cached: 0,
            repeated: 0,
            prompts,
        };
        let mut seen = HashSet::new();
        for prompt in 0..plan.prompts.len() {
            for sample in 0..samples {
                let body = plan.body(config, prompt, sample);
                let key = request::key(teacher::identity(&config.teacher), &body, sample);
                let is_new = seen.insert(key.clone());
                if is_new && !is_cached(&key) {
                    let bytes = body.to_string().len();
                    plan.rows.push(Row {
                        prompt,
                        sample,
                        key,
                        tokens: cost::estimate(bytes, config.sampling.max_tokens),
                    });
                } else {
                    plan.cached += 1;
                    plan.repeated += u64::from(!is_new);
                }
            }
        }
        plan
    }

    /// The request body of a row; built anew each time, since a run can have a million of them.
    pub fn body(&self, config: &Config, prompt: usize, sample: u32) -> Value {
        let messages = &self.prompts[prompt].messages;
        request::body(&config.teacher, &config.sampling, messages, sample)
    }

    /// The tokens of the largest request.
    pub fn largest(&self) -> u64 {
        self.rows.iter().map(|row| row.tokens).max().unwrap_or(0)
    }

    pub fn estimate(&self, config: &Config) -> Estimate {
        let requests = self.rows.len() as u64;
        let tokens: u64 = self.rows.iter().map(|row| row.tokens).sum();
        let completion_tokens = requests * u64::from(config.sampling.max_tokens);
        let prompt_tokens = tokens - completion_tokens;
        let cost = |completion_tokens| {
            let usage = Usage {
                prompt_tokens,
                completion_tokens,
                ..Usage::default()
            };
            cost::cost(&usage, &config.price)
        };
        let minutes = |amount: u64, limit: Option<u32>| {
            limit.map_or(0.0, |limit| amount as f64 / f64::from(limit))
        };
        Estimate {
            prompt_tokens,
            completion_tokens,
            cost_usd: cost(0).zip(cost(completion_tokens)),
            minutes: minutes(requests, config.limits.requests_per_minute)
                .max(minutes(tokens, config.limits.tokens_per_minute)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::Message;

    fn prompt(id: &str, content: &str) -> Prompt {
        Prompt {
            id: id.into(),
            messages: vec![Message {
                role: "user".into(),
                content: content.into(),
            }],
            row: Value::Null,
        }
    }

    #[test]
    fn only_what_is_new_is_planned_and_all_is_counted() {
        let mut config = Config::default();
        config.prompts.samples = 2;
        config.sampling.max_tokens = 100;
        config.price.input = Some(1.0);
        config.price.output = Some(2.0);
        config.limits.requests_per_minute = Some(2);
        let prompts = vec![prompt("a", "x"), prompt("b", "y"), prompt("c", "x")];

        let all = Plan::new(prompts.clone(), &config, |_| false);
        let rows: Vec<_> = all
            .rows
            .iter()
            .map(|row| (row.prompt, row.sample))
            .collect();
        assert_eq!(rows, [(0, 0), (0, 1), (1, 0), (1, 1)]);
        assert_eq!((all.total, all.cached, all.repeated), (6, 2, 2));

        let estimate = all.estimate(&config);
        assert_eq!(estimate.completion_tokens, 400);
        assert_eq!(estimate.minutes, 2.0);
        let input = estimate.prompt_tokens as f64;
        assert_eq!(
            estimate.cost_usd,
            Some((input / 1e6, (input + 800.0) / 1e6))
        );
        assert_eq!(all.largest() * 4, estimate.prompt_tokens + 400);

        let answered = all.rows[1].key.clone();
        let rest = Plan::new(prompts, &config, |key| key == answered);
        assert_eq!((rest.rows.len(), rest.cached), (3, 3));
    }
}
