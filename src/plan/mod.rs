//! The plan of a harvest: one row for every prompt, teacher and sample, less the answers in the cache.
//!
//! A [`Plan`] is built from the prompts, the request templates of the endpoints and the status of each cache
//! key. Harvests, dry runs and the selection of training data are based on it.
//!
//! | file | content |
//! |---|---|
//! | `builder` | construction of a [`Plan`]: keys, status and order of the rows |
//! | `prepare` | loading and checks before the first request, for runs and dry runs |
//! | `run_settings` | settings of a harvest run, built once from the config |
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
//! Invariants: of several rows with the same request, one is planned; the rows of an endpoint are contiguous, with
//! the suspect rows last; building a plan sends nothing and writes nothing.

pub mod adopt;
pub(crate) mod again;
pub(crate) mod assignment;
pub(crate) mod builder;
pub(crate) mod estimate;
pub(crate) mod prefix_order;
pub(crate) mod prepare;
pub mod questions;
pub(crate) mod queue;
pub(crate) mod run_settings;
pub(crate) mod shard;
pub(crate) mod unanswered;

use std::collections::HashSet;
use std::ops::Range;

use serde_json::Value;

use crate::budget::price;
use crate::budget::price::TokenBound;
use crate::cache::fingerprint::Fingerprint;
use crate::cache::keys::KeySet;
use crate::cache::question;
use crate::cache::question::CacheKeys;
use crate::client::request::RequestTemplate;
use crate::plan::shard::RequestShard;
use crate::prompt::Prompt;
use crate::rate_limit::cost::RequestCost;

/// A row without an answer in the cache: the request for one sample of one prompt from one endpoint.
#[derive(Debug)]
pub struct PlannedRow {
    /// Index in [`Plan::prompts`].
    pub prompt: u32,
    /// Index of the sample, from 0 to `prompts.samples` - 1.
    pub sample: u32,
    /// Cache key of the answer; see [`question`].
    pub key: String,
    /// Cache key by schema 1. Set only if the cache has records of that schema, or if [`PlanScope::only`] selects rows.
    pub old_key: Option<Box<str>>,
    /// Length of the request body in bytes.
    pub bytes: u32,
}

/// Status of a row before a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowStatus {
    Open,
    /// Open, and a possible cause of failures in an earlier run: see `unanswered::Kind`.
    Suspect,
    /// Answered in the cache, or refused by a content filter in an earlier run.
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
    /// Range of each endpoint's rows in `rows`.
    pub rows_by_endpoint: Vec<Range<usize>>,
    /// Number of rows in the scope of the plan, answered, given-up and repeated rows included.
    pub total: u64,
    /// Number of rows in `total` that are answered or repeated.
    pub cached: u64,
    /// Number of [`RowStatus::Answered`] rows by endpoint.
    pub answered: Vec<u64>,
    /// Number of [`RowStatus::Suspect`] rows by endpoint, the last ones in the endpoint's range.
    pub suspects: Vec<usize>,
    /// Rows with status [`RowStatus::GivenUp`], each with the index of its endpoint.
    pub given_up: Vec<(usize, PlannedRow)>,
    /// Number of rows with the same request as an earlier row of the plan.
    pub repeated: u64,
    /// Fingerprints of the keys of all rows in `total`.
    pub keys: KeySet,
    /// Fingerprints of the questions of all rows in `total`; see `question::question_fingerprint`.
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
    /// Returns true if the row with these keys is in the scope. `fingerprint` is the fingerprint of its current key.
    fn contains(&self, fingerprint: &Fingerprint, keys: &CacheKeys) -> bool {
        let is_selected = self.only.is_none_or(|only| {
            only.contains(question::question_half(&keys.key))
                || keys.iter().any(|key| only.contains(key))
        });
        is_selected && self.shard.is_none_or(|shard| shard.contains(fingerprint))
    }
}

impl Plan {
    /// Returns a warning if rows have identical requests.
    pub(crate) fn repeats_warning(&self) -> Option<String> {
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

    /// Estimates the tokens of a row as rate limits count them before the answer. `row` is an index in `rows`.
    pub fn cost(&self, endpoint: usize, row: usize) -> RequestCost {
        RequestCost {
            input_tokens: price::estimate_prompt(self.rows[row].bytes as usize),
            output_tokens: self.templates[endpoint].endpoint.sampling.max_tokens.into(),
        }
    }

    /// Returns an upper bound of the tokens of a row, for the budget. `row` is an index in `rows`.
    pub fn bound(&self, endpoint: usize, row: usize) -> TokenBound {
        let row = &self.rows[row];
        let messages = self.prompts[row.prompt as usize].messages.len();
        let max_tokens = self.templates[endpoint].endpoint.sampling.max_tokens;
        TokenBound::for_request(row.bytes as usize, messages, max_tokens)
    }

    /// Returns the largest [`Plan::cost`] of the endpoint's rows; 0 without rows.
    pub fn largest(&self, endpoint: usize) -> RequestCost {
        let rows = self.rows_by_endpoint[endpoint].clone();
        let costs = rows.map(|row| self.cost(endpoint, row));
        costs.max_by_key(RequestCost::tokens).unwrap_or_default()
    }
}
