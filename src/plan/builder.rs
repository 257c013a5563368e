//! Builds a [`Plan`] from prompts, request templates and the status of each cache key.

use anyhow::Result;

use crate::cache::fingerprint::fingerprint;
use crate::cache::keys::KeySet;
use crate::cache::question::template::QuestionTemplate;
use crate::cache::question::{CacheKeys, KeyEndpoint, KeyVariants, Question};
use crate::client::request::RequestTemplate;
use crate::config::{Assignment, PromptOrder, PromptsConfig};
use crate::exit::Exit;
use crate::plan::shard::RequestShard;
use crate::plan::{Plan, PlanScope, PlannedRow, RowStatus, assignment, prefix_order};
use crate::prompt::Prompt;
use crate::terminal::format_count;

/// Inputs of the loop that adds rows to a plan.
struct PlanInputs<'a, S> {
    endpoints: Vec<KeyEndpoint>,
    /// Question templates of the current endpoint, by sample. A sample without a template needs the full request body
    /// for its keys.
    templates: Vec<QuestionTemplate>,
    scope: PlanScope<'a>,
    /// Truncation lengths and key schemas in the cache.
    variants: &'a KeyVariants,
    /// Returns the status of one key.
    key_status: S,
}

impl<S: Fn(&str) -> Result<RowStatus>> PlanInputs<'_, S> {
    /// Returns the status of a row: answered if one of its keys has an answer that is complete or was truncated at
    /// `max_tokens` or later.
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
                RowStatus::GivenUp => row_status = RowStatus::GivenUp,
                RowStatus::Suspect if row_status == RowStatus::Open => {
                    row_status = RowStatus::Suspect;
                }
                RowStatus::Suspect | RowStatus::Open => {}
            }
        }
        Ok(row_status)
    }
}

/// Maximum number of rows of a plan. A row takes more than 100 bytes of memory.
const MAX_ROWS: u64 = 200_000_000;

/// Returns [`Exit::Usage`] if a plan of `rows` rows does not fit into memory.
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
    /// If `key_status` fails; [`Exit::Usage`] for more rows than fit into memory.
    pub fn new(
        prompts: Vec<Prompt>,
        templates: Vec<RequestTemplate>,
        settings: &PromptsConfig,
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
        let key_endpoint = |template: &RequestTemplate| {
            let teacher = &template.endpoint.teacher;
            KeyEndpoint::new(&teacher.name, crate::config::teacher::identity(teacher))
        };
        let mut inputs = PlanInputs {
            endpoints: plan.templates.iter().map(key_endpoint).collect(),
            templates: Vec::new(),
            scope,
            variants,
            key_status,
        };
        let rows_per_endpoint = (order.len() as u64).saturating_mul(settings.samples.into());
        let endpoints_per_prompt = match settings.teachers {
            Assignment::All => shares.len() as u64,
            Assignment::Share => 1,
        };
        let shards = scope.shard.map_or(1, RequestShard::count);
        check_size(rows_per_endpoint.saturating_mul(endpoints_per_prompt) / shards)?;
        if scope.shard.is_none() && scope.only.is_none() {
            plan.keys.reserve(rows_per_endpoint as usize);
            plan.questions.reserve(rows_per_endpoint as usize);
        }
        for endpoint in 0..shares.len() {
            inputs.templates = plan.templates[endpoint].templates(settings.samples);
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
                        &mut inputs,
                    )?);
                }
            }
            plan.suspects.push(suspects.len());
            plan.rows.append(&mut suspects);
            plan.rows_by_endpoint.push(start..plan.rows.len());
        }
        Ok(plan)
    }

    /// Adds the rows of a prompt. Returns the suspect rows, which the caller adds after the rows of all prompts.
    fn add_prompt(
        &mut self,
        endpoint: usize,
        prompt: usize,
        samples: u32,
        inputs: &mut PlanInputs<'_, impl Fn(&str) -> Result<RowStatus>>,
    ) -> Result<Vec<PlannedRow>> {
        let mut suspects = Vec::new();
        for sample in 0..samples {
            let max_tokens = self.templates[endpoint].endpoint.sampling.max_tokens;
            let with_schema_1 = inputs.variants.has_schema_1 || inputs.scope.only.is_some();
            let planned_prompt = &self.prompts[prompt];
            let template = inputs.templates.get(sample as usize);
            let template = template.filter(|_| planned_prompt.raw.is_none() && !with_schema_1);
            let identity = &inputs.endpoints[endpoint];
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
            let key_fingerprint = fingerprint(&keys.key);
            if !inputs.scope.contains(&key_fingerprint, &keys) {
                continue;
            }
            self.total += 1;
            self.questions.insert(question.question_fingerprint());
            if !self.keys.insert(key_fingerprint) {
                self.cached += 1;
                self.repeated += 1;
                continue;
            }
            let status = inputs.row_status(&keys, max_tokens)?;
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
