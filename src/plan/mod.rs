//! The plan of a harvest: one row for every prompt, teacher and sample, less the answers in the cache.
//!
//! A [`Plan`] is built from the prompts, the request templates of the endpoints and the status of each cache
//! key. Harvests, dry runs and the selection of training data are based on it.
//!
//! | file | content |
//! |---|---|
//! | `prepare` | loading and checks before the first request, for runs and dry runs |
//! | `prefix_order` | order of the prompts for the provider's prompt cache |
//! | `assignment` | `prompts.teachers = "share"`: the endpoint of each prompt |
//! | `shard` | `--shard I/N`: a disjoint part of the rows |
//! | `queue` | rows waiting to be sent, and retries with their earliest time |
//! | `unanswered` | `unanswered.jsonl`: paid attempts, filtered rows and failures of earlier runs |
//! | `again` | `--again`: rows that are requested a second time |
//! | `estimate` | tokens, dollars, time and disk space of the rows, for `--dry-run` |
//! | `questions` | `data.groups`: selection of the cached answers that training uses |
//! | `adopt` | `cache adopt`: new keys for answers from another endpoint or version |
//!
//! Invariants: of several rows with the same request, one is planned; the rows of an endpoint are contiguous, and
//! its suspects come last; building a plan sends nothing and writes nothing.

pub mod adopt;
pub(crate) mod again;
pub(crate) mod assignment;
pub(crate) mod estimate;
pub(crate) mod prefix_order;
pub(crate) mod prepare;
pub mod questions;
pub(crate) mod queue;
pub mod run_settings;
pub(crate) mod shard;
pub(crate) mod unanswered;

use std::collections::HashSet;
use std::ops::Range;

use anyhow::Result;
use serde_json::Value;

use crate::budget::price;
use crate::budget::price::TokenBound;
use crate::cache::fingerprint::Fingerprint;
use crate::cache::keys::KeySet;
use crate::cache::question;
use crate::cache::question::template::QuestionTemplate;
use crate::cache::question::{CacheKeys, KeyEndpoint, KeyVariants, Question};
use crate::client::request::RequestTemplate;
use crate::config;
use crate::config::{Assignment, PromptOrder};
use crate::exit::Exit;
use crate::plan::shard::RequestShard;
use crate::prompt::Prompt;
use crate::rate_limit::cost::RequestCost;
use crate::terminal::format_count;

/// A row without an answer in the cache: the request for one sample of one prompt from one endpoint.
#[derive(Debug)]
pub struct PlannedRow {
    /// Index in [`Plan::prompts`].
    pub prompt: u32,
    pub sample: u32,
    /// Cache key of the answer; see [`question`].
    pub key: String,
    /// Cache key by schema 1; `None` if the cache has no records of that schema.
    pub old_key: Option<Box<str>>,
    /// Length of the request body in bytes.
    pub bytes: u32,
}

/// Status of a row before a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowStatus {
    Open,
    /// Open, and a likely cause of failures: it ended an earlier run, or failed while other rows were answered.
    Suspect,
    /// In the cache, or refused by a content filter.
    Answered,
    /// Without an answer after `retry.max_attempts` paid attempts.
    GivenUp,
}

/// Rows to request, with their prompts and endpoints.
pub struct Plan {
    pub prompts: Vec<Prompt>,
    /// Request template of each endpoint.
    pub templates: Vec<RequestTemplate>,
    /// Rows to request, endpoint by endpoint, in sending order.
    pub rows: Vec<PlannedRow>,
    /// Range of each endpoint in `rows`.
    pub rows_by_endpoint: Vec<Range<usize>>,
    /// Number of prompts times samples over all endpoints, within the shard.
    pub total: u64,
    /// Number of rows in `total` that are answered or in `repeated`.
    pub cached: u64,
    /// Number of [`RowStatus::Answered`] rows by endpoint.
    pub answered: Vec<u64>,
    /// Number of [`RowStatus::Suspect`] rows by endpoint; they come last in its range.
    pub suspects: Vec<usize>,
    /// Rows with status [`RowStatus::GivenUp`], each with the index of its endpoint.
    pub given_up: Vec<(usize, PlannedRow)>,
    /// Number of rows with the same request as an earlier row of the plan.
    pub repeated: u64,
    /// Keys of all rows.
    pub keys: KeySet,
    /// Question halves of all rows; see [`question::question_half`].
    pub questions: KeySet,
}

/// Selection of rows that a plan considers.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlanScope<'a> {
    pub shard: Option<RequestShard>,
    /// Question halves or keys of the rows to consider; `None` for all rows.
    pub only: Option<&'a HashSet<String>>,
}

impl PlanScope<'_> {
    fn contains(&self, fingerprint: &Fingerprint, keys: &CacheKeys) -> bool {
        let is_selected = self.only.is_none_or(|only| {
            only.contains(question::question_half(&keys.key))
                || keys.iter().any(|key| only.contains(key))
        });
        is_selected && self.shard.is_none_or(|shard| shard.contains(fingerprint))
    }
}

/// Inputs of the loop that adds rows to a plan.
struct PlanBuilder<'a, S> {
    endpoints: Vec<KeyEndpoint>,
    /// Question templates of the current endpoint, by sample; empty if keys need the full request body.
    templates: Vec<QuestionTemplate>,
    scope: PlanScope<'a>,
    variants: &'a KeyVariants,
    key_status: S,
}

impl<S: Fn(&str) -> Result<RowStatus>> PlanBuilder<'_, S> {
    /// Returns the status of a row. A row is answered if one of its keys has an answer that is complete or
    /// was truncated at `max_tokens` or later.
    fn row_status(&self, keys: &CacheKeys, max_tokens: u32) -> Result<RowStatus> {
        let truncated = keys
            .iter()
            .flat_map(|key| self.variants.truncated_keys(key, max_tokens));
        let all_keys = keys.iter().map(str::to_owned).chain(truncated);
        // An answer under one key takes precedence over a failure under another.
        let mut row_status = RowStatus::Open;
        for key in all_keys {
            match (self.key_status)(&key)? {
                RowStatus::Answered => return Ok(RowStatus::Answered),
                RowStatus::Open => {}
                other if row_status != RowStatus::GivenUp => row_status = other,
                _ => {}
            }
        }
        Ok(row_status)
    }
}

/// Maximum number of rows of a plan: they take about 20 GB of memory.
const MAX_ROWS: u64 = 200_000_000;

fn check_size(rows: u64) -> Result<()> {
    if rows <= MAX_ROWS {
        return Ok(());
    }
    let message = format!(
        "the config asks for {} answers (prompts x `prompts.samples` x teachers), and at most {} fit into memory: lower \
         `prompts.samples` or `prompts.limit`, or use --shard for the harvest",
        format_count(rows),
        format_count(MAX_ROWS)
    );
    Err(Exit::Usage(message).into())
}

impl Plan {
    /// Plans the rows in `scope`. `variants` lists the truncation lengths and key schemas in the cache;
    /// `key_status` returns the status of one key.
    ///
    /// # Errors
    /// Those of `key_status`; [`Exit::Usage`] for more rows than fit into memory.
    pub fn new(
        prompts: Vec<Prompt>,
        templates: Vec<RequestTemplate>,
        settings: &config::PromptsConfig,
        scope: PlanScope<'_>,
        variants: &KeyVariants,
        key_status: impl Fn(&str) -> Result<RowStatus>,
    ) -> Result<Plan> {
        let order = match settings.order {
            PromptOrder::Source => (0..prompts.len()).collect(),
            PromptOrder::Prefix => prefix_order::by_prefix(&prompts),
        };
        let shares: Vec<f64> = templates
            .iter()
            .map(|template| template.endpoint.teacher.share)
            .collect();
        let mut plan = Plan {
            prompts,
            templates,
            rows: Vec::new(),
            rows_by_endpoint: Vec::new(),
            total: 0,
            cached: 0,
            answered: vec![0; shares.len()],
            suspects: Vec::new(),
            given_up: Vec::new(),
            repeated: 0,
            keys: KeySet::default(),
            questions: KeySet::default(),
        };
        let endpoint = |template: &RequestTemplate| {
            let teacher = &template.endpoint.teacher;
            KeyEndpoint::new(&teacher.name, crate::config::teacher::identity(teacher))
        };
        let mut builder = PlanBuilder {
            endpoints: plan.templates.iter().map(endpoint).collect(),
            templates: Vec::new(),
            scope,
            variants,
            key_status,
        };
        let rows = (order.len() as u64).saturating_mul(settings.samples.into());
        let copies = match settings.teachers {
            Assignment::All => shares.len() as u64,
            Assignment::Share => 1,
        };
        let shards = scope.shard.map_or(1, RequestShard::count);
        check_size(rows.saturating_mul(copies) / shards)?;
        if scope.shard.is_none() && scope.only.is_none() {
            let rows = rows as usize;
            plan.keys.reserve(rows);
            plan.questions.reserve(rows);
        }
        for endpoint in 0..shares.len() {
            builder.templates = plan.templates[endpoint].templates(settings.samples);
            let start = plan.rows.len();
            let mut suspects = Vec::new();
            for &prompt in &order {
                let is_assigned = match settings.teachers {
                    Assignment::All => true,
                    Assignment::Share => {
                        assignment::endpoint_of(&plan.prompts[prompt].id, &shares) == endpoint
                    }
                };
                if is_assigned {
                    suspects.extend(plan.add_prompt(
                        endpoint,
                        prompt,
                        settings.samples,
                        &mut builder,
                    )?);
                }
            }
            plan.suspects.push(suspects.len());
            plan.rows.append(&mut suspects);
            plan.rows_by_endpoint.push(start..plan.rows.len());
        }
        Ok(plan)
    }

    /// Adds the rows of a prompt. Returns its suspects, which the caller adds after the rows of all prompts.
    fn add_prompt(
        &mut self,
        endpoint: usize,
        prompt: usize,
        samples: u32,
        builder: &mut PlanBuilder<'_, impl Fn(&str) -> Result<RowStatus>>,
    ) -> Result<Vec<PlannedRow>> {
        let mut suspects = Vec::new();
        for sample in 0..samples {
            let max_tokens = self.templates[endpoint].endpoint.sampling.max_tokens;
            let with_schema_1 = builder.variants.has_schema_1 || builder.scope.only.is_some();
            let planned_prompt = &self.prompts[prompt];
            let template = builder.templates.get(sample as usize);
            let template = template.filter(|_| planned_prompt.raw.is_none() && !with_schema_1);
            let identity = &builder.endpoints[endpoint];
            let (question, keys) = match template {
                Some(template) => {
                    let question = template.question(&planned_prompt.messages);
                    (question, CacheKeys::new(&question, identity, None))
                }
                None => {
                    let body = self.body(endpoint, prompt, sample);
                    let question = Question::new(&body, sample);
                    let schema_1 = with_schema_1.then_some((&body, sample));
                    (question, CacheKeys::new(&question, identity, schema_1))
                }
            };
            let fingerprint = crate::cache::fingerprint::fingerprint(&keys.key);
            if !builder.scope.contains(&fingerprint, &keys) {
                continue;
            }
            self.total += 1;
            self.questions.insert(question.question_fingerprint());
            if !self.keys.insert(fingerprint) {
                self.cached += 1;
                self.repeated += 1;
                continue;
            }
            let status = builder.row_status(&keys, max_tokens)?;
            let row = PlannedRow {
                prompt: prompt as u32,
                sample,
                key: keys.key,
                old_key: keys.schema_1.map(String::into_boxed_str),
                bytes: question.bytes as u32,
            };
            match status {
                RowStatus::Answered => {
                    self.cached += 1;
                    self.answered[endpoint] += 1;
                }
                RowStatus::GivenUp => self.given_up.push((endpoint, row)),
                RowStatus::Suspect => suspects.push(row),
                RowStatus::Open => self.rows.push(row),
            }
        }
        Ok(suspects)
    }

    /// Returns a warning if rows have identical requests.
    pub fn repeats_warning(&self) -> Option<String> {
        (self.repeated > 0).then(|| {
            format!(
                "{} requests are identical to an earlier one and are not sent: to get several answers to a prompt, raise \
                 `prompts.samples`",
                self.repeated
            )
        })
    }

    /// Builds the request body of a row. Bodies are not kept: a run can have a million of them.
    pub fn body(&self, endpoint: usize, prompt: usize, sample: u32) -> Value {
        self.templates[endpoint].body_for_prompt(&self.prompts[prompt], sample)
    }

    /// Returns the estimated tokens of the row, which rate limits count before the answer arrives.
    pub fn cost(&self, endpoint: usize, row: usize) -> RequestCost {
        RequestCost {
            input_tokens: price::estimate_prompt(self.rows[row].bytes as usize),
            output_tokens: self.templates[endpoint].endpoint.sampling.max_tokens.into(),
        }
    }

    /// Returns the upper bound of the tokens of the row.
    pub fn bound(&self, endpoint: usize, row: usize) -> TokenBound {
        let row = &self.rows[row];
        let messages = self.prompts[row.prompt as usize].messages.len();
        let max_tokens = self.templates[endpoint].endpoint.sampling.max_tokens;
        TokenBound::for_request(row.bytes as usize, messages, max_tokens)
    }

    /// Returns the largest estimated tokens of a row of this endpoint; 0 without rows.
    pub fn largest(&self, endpoint: usize) -> RequestCost {
        let rows = self.rows_by_endpoint[endpoint].clone();
        let costs = rows.map(|row| self.cost(endpoint, row));
        costs.max_by_key(RequestCost::tokens).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, TeacherConfig};
    use crate::prompt::message::Message;

    fn prompt(id: &str, content: &str) -> Prompt {
        Prompt::plain(id, vec![Message::new("user", content)])
    }

    fn plan(prompts: Vec<Prompt>, config: &Config, is_cached: impl Fn(&str) -> bool) -> Plan {
        let templates = config
            .endpoints()
            .into_iter()
            .map(RequestTemplate::plain)
            .collect();
        let key_status = |key: &str| {
            if is_cached(key) {
                Ok(RowStatus::Answered)
            } else {
                Ok(RowStatus::Open)
            }
        };
        Plan::new(
            prompts,
            templates,
            &config.prompts,
            PlanScope::default(),
            &KeyVariants::default(),
            key_status,
        )
        .unwrap()
    }

    #[test]
    fn plan_has_uncached_rows_and_counts_all() {
        let mut config = Config::default();
        config.prompts.samples = 2;
        config.sampling.max_tokens = 100;
        let prompts = vec![prompt("a", "x"), prompt("b", "y"), prompt("c", "x")];

        let all = plan(prompts.clone(), &config, |_| false);
        let rows: Vec<_> = all
            .rows
            .iter()
            .map(|row| (row.prompt, row.sample))
            .collect();
        assert_eq!(rows, [(0, 0), (0, 1), (1, 0), (1, 1)]);
        assert_eq!((all.total, all.cached, all.repeated), (6, 2, 2));
        assert_eq!(
            (all.rows_by_endpoint.len(), all.rows_by_endpoint[0].clone()),
            (1, 0..4)
        );
        let cost = all.cost(0, 0);
        assert_eq!((cost.output_tokens, all.largest(0)), (100, cost));
        let bound = all.bound(0, 0);
        assert!(bound.input_tokens > 3 * cost.input_tokens && bound.output_tokens == 100);

        let answered = all.rows[1].key.clone();
        let open = plan(prompts, &config, |key| key == answered);
        assert_eq!((open.rows.len(), open.cached), (3, 3));
    }

    #[test]
    fn row_status_prefers_an_answer_under_another_key_to_a_failure() {
        let config = Config::default();
        let key = plan(vec![prompt("a", "x")], &config, |_| false).rows[0]
            .key
            .clone();
        let mut variants = KeyVariants::default();
        variants.insert(2, config.sampling.max_tokens);
        for failure in [RowStatus::GivenUp, RowStatus::Suspect] {
            let key_status = |other: &str| {
                Ok(if other == key {
                    failure
                } else {
                    RowStatus::Answered
                })
            };
            let templates = config
                .endpoints()
                .into_iter()
                .map(RequestTemplate::plain)
                .collect();
            let plan = Plan::new(
                vec![prompt("a", "x")],
                templates,
                &config.prompts,
                PlanScope::default(),
                &variants,
                key_status,
            )
            .unwrap();
            assert_eq!((plan.cached, plan.rows.len()), (1, 0), "{failure:?}");
        }
    }

    #[test]
    fn assignment_splits_prompts_by_share_or_sends_all_to_every_teacher() {
        let teacher = |name: &str, share| TeacherConfig {
            name: name.into(),
            model: name.into(),
            share,
            ..TeacherConfig::default()
        };
        let mut config = Config {
            teachers: vec![teacher("a", 3.0), teacher("b", 1.0)],
            ..Config::default()
        };
        let prompts: Vec<_> = (0..400)
            .map(|number| prompt(&number.to_string(), &number.to_string()))
            .collect();
        let shared = plan(prompts.clone(), &config, |_| false);
        assert_eq!((shared.total, shared.rows.len()), (400, 400));
        assert!(
            (270..330).contains(&shared.rows_by_endpoint[0].len()),
            "{:?}",
            shared.rows_by_endpoint
        );
        assert_eq!(
            shared.rows_by_endpoint[0].end,
            shared.rows_by_endpoint[1].start
        );

        config.prompts.teachers = Assignment::All;
        let all = plan(prompts, &config, |_| false);
        assert_eq!(
            (all.total, all.rows_by_endpoint),
            (800, vec![0..400, 400..800])
        );
    }

    #[test]
    fn more_rows_than_fit_into_memory_are_refused() {
        let plan = |samples: u32, shard: Option<&str>| {
            let mut config = Config::default();
            config.prompts.samples = samples;
            let scope = PlanScope {
                shard: shard.map(|text| text.parse().unwrap()),
                only: None,
            };
            let templates = vec![RequestTemplate::plain(config.endpoints().remove(0))];
            let prompts = vec![Prompt::plain("p".to_owned(), Vec::new())];
            let open = |_: &str| Ok(RowStatus::Open);
            Plan::new(
                prompts,
                templates,
                &config.prompts,
                scope,
                &KeyVariants::default(),
                open,
            )
        };
        let error = plan(1_000_000_000, None).err().unwrap();
        assert_eq!(Exit::code_of(&error), 2, "{error}");
        assert!(plan(1_000_000_000, Some("1/4")).is_err());
        assert_eq!(plan(1_000, Some("1/1")).unwrap().rows.len(), 1_000);
    }
}
