//! What is to be asked: every prompt, teacher and sample that the cache does not hold.

pub mod adopt;
pub(crate) mod again;
pub(crate) mod estimate;
pub(crate) mod prepare;
pub mod questions;
pub(crate) mod queue;
pub(crate) mod shard;
pub(crate) mod unanswered;
use std::collections::{HashMap, HashSet};
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
use crate::plan::shard::Shard;
use crate::prompt::Prompt;
use crate::rate_limit::cost::RequestCost;

/// Prompts that begin with the same so many bytes share a provider's prompt cache: OpenAI's begins
/// at 1,024 tokens.
const SHARED_PREFIX: usize = 4_096;

/// One answer to ask for.
#[derive(Debug)]
pub struct PlannedRow {
    /// Index in [`Plan::prompts`].
    pub prompt: u32,
    pub sample: u32,
    /// Names the record; see [`question`].
    pub key: String,
    /// The name that versions up to schema 1 would have given it, where there may be such records.
    pub old_key: Option<Box<str>>,
    /// Length of the request body.
    pub bytes: u32,
}

/// How a request stands before a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowStatus {
    Open,
    /// Open; an earlier run ended because of it, or it failed while other rows were answered.
    Suspect,
    /// In the cache, or refused by a filter.
    Answered,
    /// All its attempts have been spent.
    GivenUp,
}

pub struct Plan {
    pub prompts: Vec<Prompt>,
    /// What is asked of each teacher.
    pub templates: Vec<RequestTemplate>,
    /// Still to be asked, teacher by teacher, in the order in which they are sent.
    pub rows: Vec<PlannedRow>,
    /// The rows of each teacher.
    pub rows_by_endpoint: Vec<Range<usize>>,
    /// Prompts times samples, for every teacher that is asked; of a shard, those in it.
    pub total: u64,
    /// Of these, answered already.
    pub cached: u64,
    /// Of these, by teacher.
    pub answered: Vec<u64>,
    /// The last rows of each teacher that are [`Standing::Suspect`].
    pub suspects: Vec<usize>,
    /// Rows whose attempts have been spent by earlier runs, with their teacher.
    pub given_up: Vec<(usize, PlannedRow)>,
    /// Of the cached ones, those that ask word for word the same as an earlier row of this run.
    pub repeated: u64,
    /// Keys of all its rows.
    pub keys: KeySet,
    /// Question halves of all its rows; see [`question::half`].
    pub questions: KeySet,
}

/// Selection of rows that a plan considers.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlanScope<'a> {
    pub shard: Option<Shard>,
    /// Only rows of these question halves or keys.
    pub only: Option<&'a HashSet<String>>,
}

impl PlanScope<'_> {
    fn holds(&self, fingerprint: &Fingerprint, names: &CacheKeys) -> bool {
        let is_wanted = self.only.is_none_or(|only| {
            only.contains(question::question_half(&names.key))
                || names.iter().any(|name| only.contains(name))
        });
        is_wanted && self.shard.is_none_or(|shard| shard.holds(fingerprint))
    }
}

/// Inputs of the loop that adds rows to a plan.
struct PlanBuilder<'a, S> {
    endpoints: Vec<KeyEndpoint>,
    /// By sample, for the current teacher; empty if the full request is needed.
    templates: Vec<QuestionTemplate>,
    scope: PlanScope<'a>,
    past: &'a KeyVariants,
    standing: S,
}

impl<S: Fn(&str) -> Result<RowStatus>> PlanBuilder<'_, S> {
    /// State of a row: answered if the answer is under any of its names, complete or truncated no earlier than
    /// at `max_tokens`.
    fn standing(&self, names: &CacheKeys, max_tokens: u32) -> Result<RowStatus> {
        let cut = names
            .iter()
            .flat_map(|name| self.past.truncated_keys(name, max_tokens));
        let all = names.iter().map(str::to_owned).chain(cut);
        // An answer under another name counts more than a failure.
        let mut found = RowStatus::Open;
        for name in all {
            match (self.standing)(&name)? {
                RowStatus::Answered => return Ok(RowStatus::Answered),
                RowStatus::Open => {}
                other if found != RowStatus::GivenUp => found = other,
                _ => {}
            }
        }
        Ok(found)
    }
}

impl Plan {
    /// Everything, or the part of it in `shard`. `past` is what the cache holds under other keys than plain
    /// ones, and `standing` tells how a key stands.
    ///
    /// # Errors
    /// Those of `standing`.
    pub fn new(
        prompts: Vec<Prompt>,
        askings: Vec<RequestTemplate>,
        settings: &config::PromptsConfig,
        scope: PlanScope<'_>,
        past: &KeyVariants,
        standing: impl Fn(&str) -> Result<RowStatus>,
    ) -> Result<Plan> {
        let order = match settings.order {
            PromptOrder::Source => (0..prompts.len()).collect(),
            PromptOrder::Prefix => by_prefix(&prompts),
        };
        let shares: Vec<f64> = askings
            .iter()
            .map(|asking| asking.endpoint.teacher.share)
            .collect();
        let mut plan = Plan {
            prompts,
            templates: askings,
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
        let endpoint = |asking: &RequestTemplate| {
            let teacher = &asking.endpoint.teacher;
            KeyEndpoint::new(&teacher.name, crate::config::teacher::identity(teacher))
        };
        let mut adding = PlanBuilder {
            endpoints: plan.templates.iter().map(endpoint).collect(),
            templates: Vec::new(),
            scope,
            past,
            standing,
        };
        if scope.shard.is_none() && scope.only.is_none() {
            let rows = order.len() * settings.samples as usize;
            plan.keys.reserve(rows);
            plan.questions.reserve(rows);
        }
        for endpoint in 0..shares.len() {
            adding.templates = plan.templates[endpoint].templates(settings.samples);
            let start = plan.rows.len();
            let mut suspects = Vec::new();
            for &prompt in &order {
                let is_asked = match settings.teachers {
                    Assignment::All => true,
                    Assignment::Share => chosen(&plan.prompts[prompt].id, &shares) == endpoint,
                };
                if is_asked {
                    let found = plan.add(endpoint, prompt, settings.samples, &mut adding)?;
                    suspects.extend(found);
                }
            }
            plan.suspects.push(suspects.len());
            plan.rows.append(&mut suspects);
            plan.rows_by_endpoint.push(start..plan.rows.len());
        }
        Ok(plan)
    }

    /// Adds the rows of a prompt, but for those that are returned as suspects.
    fn add(
        &mut self,
        endpoint: usize,
        prompt: usize,
        samples: u32,
        adding: &mut PlanBuilder<'_, impl Fn(&str) -> Result<RowStatus>>,
    ) -> Result<Vec<PlannedRow>> {
        let mut suspects = Vec::new();
        for sample in 0..samples {
            let max_tokens = self.templates[endpoint].endpoint.sampling.max_tokens;
            let with_old = adding.past.has_schema_1 || adding.scope.only.is_some();
            let asked = &self.prompts[prompt];
            let template = adding.templates.get(sample as usize);
            let template = template.filter(|_| asked.raw.is_none() && !with_old);
            let identity = &adding.endpoints[endpoint];
            let (question, names) = match template {
                Some(template) => {
                    let question = template.question(&asked.messages);
                    (question, CacheKeys::new(&question, identity, None))
                }
                None => {
                    let body = self.body(endpoint, prompt, sample);
                    let question = Question::new(&body, sample);
                    let old = with_old.then_some((&body, sample));
                    (question, CacheKeys::new(&question, identity, old))
                }
            };
            let fingerprint = crate::cache::fingerprint::fingerprint(&names.key);
            if !adding.scope.holds(&fingerprint, &names) {
                continue;
            }
            self.total += 1;
            self.questions.insert(question.question_fingerprint());
            if !self.keys.insert(fingerprint) {
                self.cached += 1;
                self.repeated += 1;
                continue;
            }
            let standing = adding.standing(&names, max_tokens)?;
            let row = PlannedRow {
                prompt: prompt as u32,
                sample,
                key: names.key,
                old_key: names.schema_1.map(String::into_boxed_str),
                bytes: question.bytes as u32,
            };
            match standing {
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

    /// Warning about rows with identical requests.
    pub fn repeats_warning(&self) -> Option<String> {
        (self.repeated > 0).then(|| {
            format!(
                "{} requests ask word for word what another one asks: each such answer is bought once; \
                 `prompts.samples` asks for several",
                self.repeated
            )
        })
    }

    /// The request body of a row; built anew each time, since a run can have a million of them.
    pub fn body(&self, endpoint: usize, prompt: usize, sample: u32) -> Value {
        self.templates[endpoint].body_for_prompt(&self.prompts[prompt], sample)
    }

    /// What a limit will count for the row before it is answered.
    pub fn cost(&self, endpoint: usize, row: usize) -> RequestCost {
        RequestCost {
            input_tokens: price::estimate_prompt(self.rows[row].bytes as usize),
            output_tokens: self.templates[endpoint].endpoint.sampling.max_tokens.into(),
        }
    }

    /// The most that the row can use.
    pub fn bound(&self, endpoint: usize, row: usize) -> TokenBound {
        let row = &self.rows[row];
        let messages = self.prompts[row.prompt as usize].messages.len();
        let max_tokens = self.templates[endpoint].endpoint.sampling.max_tokens;
        TokenBound::for_request(row.bytes as usize, messages, max_tokens)
    }

    /// The most that a request to this teacher will use.
    pub fn largest(&self, endpoint: usize) -> RequestCost {
        let rows = self.rows_by_endpoint[endpoint].clone();
        let costs = rows.map(|row| self.cost(endpoint, row));
        costs.max_by_key(RequestCost::tokens).unwrap_or_default()
    }
}

/// The teacher whose turn it is for this prompt: the same one each time, and each as often as its
/// share says.
fn chosen(prompt_id: &str, shares: &[f64]) -> usize {
    let hash = blake3::hash(prompt_id.as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    let total: f64 = shares.iter().sum();
    let mut point = u64::from_le_bytes(bytes) as f64 / u64::MAX as f64 * total;
    for (endpoint, share) in shares.iter().enumerate() {
        point -= share;
        if point < 0.0 {
            return endpoint;
        }
    }
    shares.len().saturating_sub(1)
}

/// The prompts in an order that lets a provider's prompt cache hit: those that begin alike, over a
/// length that such a cache looks at, follow the first of them, sorted. All others stay where they
/// are, so that a run that ends early has not asked the beginning of the alphabet.
fn by_prefix(prompts: &[Prompt]) -> Vec<usize> {
    let text = |prompt: &Prompt| -> Vec<u8> {
        let parts = prompt.messages.iter().flat_map(|message| {
            [
                message.role.as_bytes(),
                b"\n",
                message.content.as_bytes(),
                b"\n",
            ]
        });
        parts.flatten().copied().collect()
    };
    let mut first_of = HashMap::new();
    let mut keys: Vec<(usize, Vec<u8>, usize)> = Vec::with_capacity(prompts.len());
    for (index, prompt) in prompts.iter().enumerate() {
        let text = text(prompt);
        match text.get(..SHARED_PREFIX) {
            None => keys.push((index, Vec::new(), index)),
            Some(prefix) => {
                let group = *first_of
                    .entry(*blake3::hash(prefix).as_bytes())
                    .or_insert(index);
                keys.push((group, text, index));
            }
        }
    }
    keys.sort();
    keys.into_iter().map(|(_, _, index)| index).collect()
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
        let askings = config
            .endpoints()
            .into_iter()
            .map(RequestTemplate::plain)
            .collect();
        let standing = |key: &str| {
            if is_cached(key) {
                Ok(RowStatus::Answered)
            } else {
                Ok(RowStatus::Open)
            }
        };
        Plan::new(
            prompts,
            askings,
            &config.prompts,
            PlanScope::default(),
            &KeyVariants::default(),
            standing,
        )
        .unwrap()
    }

    #[test]
    fn only_what_is_new_is_planned_and_all_is_counted() {
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
        let rest = plan(prompts, &config, |key| key == answered);
        assert_eq!((rest.rows.len(), rest.cached), (3, 3));
    }

    #[test]
    fn answer_under_another_name_beats_a_failure() {
        let config = Config::default();
        let key = plan(vec![prompt("a", "x")], &config, |_| false).rows[0]
            .key
            .clone();
        let mut past = KeyVariants::default();
        past.insert(2, config.sampling.max_tokens);
        for failure in [RowStatus::GivenUp, RowStatus::Suspect] {
            let standing = |name: &str| {
                Ok(if name == key {
                    failure
                } else {
                    RowStatus::Answered
                })
            };
            let askings = config
                .endpoints()
                .into_iter()
                .map(RequestTemplate::plain)
                .collect();
            let plan = Plan::new(
                vec![prompt("a", "x")],
                askings,
                &config.prompts,
                PlanScope::default(),
                &past,
                standing,
            )
            .unwrap();
            assert_eq!((plan.cached, plan.rows.len()), (1, 0), "{failure:?}");
        }
    }

    #[test]
    fn teachers_share_the_prompts_or_all_get_all() {
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
    fn prompts_that_share_a_long_beginning_follow_each_other() {
        let long = |start: char, end: &str| format!("{}{end}", start.to_string().repeat(5_000));
        let prompts = [
            prompt("0", &long('z', "2")),
            prompt("1", "short"),
            prompt("2", &long('a', "1")),
            prompt("3", &long('z', "1")),
            prompt("4", "also short"),
        ];
        assert_eq!(by_prefix(&prompts), [3, 0, 1, 2, 4]);
    }
}
