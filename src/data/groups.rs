//! Groups of answers in a cache, and the selection of answers to train on. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::fingerprint::Fingerprint;
use crate::cache::keys::KeySet;
use crate::cache::question;
use crate::cache::record::{Record, is_mock};
use crate::cache::view::RecordView;
use crate::terminal::sanitise;

/// Name that selects all groups of a mock teacher.
const MOCK: &str = "mock";
/// Prefix of an endpoint that `question::endpoint` made from a teacher's name.
const NAME_PREFIX: &str = "name:";
/// Number of hex digits in a group's id.
const ID_DIGITS: usize = 8;

/// Properties that all answers of a group share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Endpoint as in cache keys: the teacher's name, or the address.
    endpoint: String,
    /// Model of the request.
    model: String,
    /// Sampling parameters of the request as JSON.
    sampling: String,
    /// True if the answers come from a mock teacher, which is scripted.
    pub is_mock: bool,
}

impl Group {
    /// Short name, the same in every cache.
    pub fn id(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for field in [&self.endpoint, &self.model, &self.sampling] {
            hash.update(field.as_bytes()).update(b"\0");
        }
        hash.update(&[u8::from(self.is_mock)]);
        hash.finalize().to_hex()[..ID_DIGITS].to_owned()
    }

    /// Model and sampling, without the address.
    pub(crate) fn model_and_sampling(&self) -> String {
        on_one_line(&format!(
            "{}{}, {}",
            self.model,
            self.mock_note(),
            self.sampling
        ))
    }

    fn mock_note(&self) -> &'static str {
        if self.is_mock { ", a mock" } else { "" }
    }

    /// Returns true if `name` selects this group: its id, model, endpoint or teacher. A group of a mock is selected
    /// only by its id or "mock", because a mock uses the model name, and perhaps the address, of the endpoint that it
    /// replaces.
    pub(crate) fn is_named(&self, name: &str) -> bool {
        if name == self.id() {
            return true;
        }
        if self.is_mock {
            return name == MOCK;
        }
        name == self.model
            || self.endpoint.strip_prefix(NAME_PREFIX) == Some(name)
            || self.endpoint == question::endpoint("", name)
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Group {
            endpoint,
            model,
            sampling,
            is_mock: _,
        } = self;
        let endpoint = endpoint.strip_prefix(NAME_PREFIX).unwrap_or(endpoint);
        let text = format!("{model} at {endpoint}{}, {sampling}", self.mock_note());
        f.write_str(&on_one_line(&text))
    }
}

/// Makes a name safe to print: the cache may come from an untrusted source.
fn on_one_line(text: &str) -> String {
    sanitise(text).replace(['\n', '\t'], " ")
}

fn model_of(request: &Value) -> String {
    request["model"].as_str().unwrap_or_default().to_owned()
}

/// The properties of a record that decide whether it is selected.
#[derive(Debug, Clone)]
pub struct RecordProperties {
    pub group: Group,
    key: Fingerprint,
    question: Fingerprint,
    /// True if the answer was truncated at the `max_tokens` of its request.
    is_truncated: bool,
}

impl RecordProperties {
    /// Returns the properties of a borrowed record; `params` are its [`RecordView::params`].
    pub(crate) fn from_view(record: &RecordView, params: &Value) -> RecordProperties {
        let group = Group {
            endpoint: question::endpoint(&record.teacher, &record.endpoint),
            model: record.request_model().to_owned(),
            sampling: question::sampling(params),
            is_mock: is_mock(&record.fingerprint),
        };
        RecordProperties::new(group, &record.key, record.cut_at)
    }

    /// Returns the properties of an owned record.
    pub(crate) fn from_record(record: &Record) -> RecordProperties {
        let group = Group {
            endpoint: question::endpoint(&record.teacher, &record.endpoint),
            model: model_of(&record.request),
            sampling: question::sampling(&record.request),
            is_mock: is_mock(&record.fingerprint),
        };
        RecordProperties::new(group, &record.key, record.cut_at)
    }

    fn new(group: Group, key: &str, cut_at: u32) -> RecordProperties {
        RecordProperties {
            group,
            key: crate::cache::fingerprint::fingerprint(key),
            question: question::question_fingerprint(key),
            is_truncated: cut_at > 0,
        }
    }
}

/// A teacher of the config, as its requests identify it.
#[derive(Debug, Clone)]
pub struct TeacherIdentity {
    /// Endpoint by name and by address.
    endpoints: [String; 2],
    model: String,
    sampling: String,
}

impl TeacherIdentity {
    /// Creates an identity. `name` is empty for a teacher without a name; `request` is one of its requests.
    pub fn new(name: &str, base_url: &str, request: &Value) -> TeacherIdentity {
        TeacherIdentity {
            endpoints: [name, ""].map(|name| question::endpoint(name, base_url)),
            model: model_of(request),
            sampling: question::sampling(request),
        }
    }
}

/// Questions and teachers of a config.
#[derive(Debug, Clone)]
pub struct ConfigSelection {
    /// None if the prompts cannot be read.
    pub rows: Option<PlannedRows>,
    pub teachers: Vec<TeacherIdentity>,
}

/// Cache keys and questions of the rows of a plan.
#[derive(Debug, Clone, Default)]
pub struct PlannedRows {
    /// Cache key of the answer to each answered row.
    pub keys: KeySet,
    /// Questions of the answered rows.
    pub answered: KeySet,
    /// Questions of all rows; see `cache::question::question_fingerprint`.
    pub questions: KeySet,
}

/// Selection of the records to train on.
#[derive(Debug, Clone)]
pub enum Selection {
    /// All records except those of a mock.
    All,
    /// Groups by id, model, endpoint or teacher; "mock" selects all groups of a mock.
    Named(Vec<String>),
    /// Answers to the questions of the config.
    Config(ConfigSelection),
}

/// Reason to leave out a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExclusionReason {
    Mock,
    NotNamed,
    Endpoint,
    Model,
    Sampling,
    Duplicate,
    Truncated,
    Adoptable,
    Question,
}

impl fmt::Display for ExclusionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExclusionReason::Mock => "answers of a mock",
            ExclusionReason::NotNamed => "not in `data.groups`",
            ExclusionReason::Endpoint => "another endpoint",
            ExclusionReason::Model => "another model",
            ExclusionReason::Sampling => "other sampling parameters",
            ExclusionReason::Duplicate => "another answer to the same question is used",
            ExclusionReason::Truncated => {
                "truncated at a smaller max_tokens; `distill harvest` requests them again"
            }
            ExclusionReason::Adoptable => {
                "from another endpoint to this config's questions; `distill cache adopt` takes them over"
            }
            ExclusionReason::Question => "other prompts, template, samples, seed, schema or tools",
        })
    }
}

impl Selection {
    /// Checks whether a record is selected.
    ///
    /// # Errors
    /// The reason why the record is not selected.
    pub fn check(&self, record: &RecordProperties) -> Result<(), ExclusionReason> {
        let group = &record.group;
        match self {
            Selection::All if group.is_mock => Err(ExclusionReason::Mock),
            Selection::All => Ok(()),
            Selection::Named(names) if names.iter().any(|name| group.is_named(name)) => Ok(()),
            Selection::Named(_) => Err(ExclusionReason::NotNamed),
            Selection::Config(config) => config.check(record),
        }
    }

    /// Adds the settings and keys that the selection depends on to a hash.
    pub fn update(&self, hash: &mut blake3::Hasher) {
        match self {
            Selection::All => {
                hash.update(b"all");
            }
            Selection::Named(names) => {
                for name in names {
                    hash.update(name.as_bytes()).update(b"\n");
                }
            }
            Selection::Config(config) => {
                for teacher in &config.teachers {
                    let fields = [&teacher.model, &teacher.sampling];
                    for field in teacher.endpoints.iter().chain(fields) {
                        hash.update(field.as_bytes()).update(b"\n");
                    }
                }
                match &config.rows {
                    None => {
                        hash.update(b"no prompts");
                    }
                    Some(rows) => {
                        for keys in [&rows.keys, &rows.answered, &rows.questions] {
                            update_keys(keys, hash);
                        }
                    }
                }
            }
        }
    }
}

/// Adds the number of keys and the keys, in a fixed order, to a hash.
fn update_keys(keys: &KeySet, hash: &mut blake3::Hasher) {
    let mut keys: Vec<_> = keys.iter().collect();
    keys.sort_unstable();
    hash.update(&(keys.len() as u64).to_le_bytes());
    for key in keys {
        hash.update(key);
    }
}

impl ConfigSelection {
    fn check(&self, record: &RecordProperties) -> Result<(), ExclusionReason> {
        let group = &record.group;
        if group.is_mock {
            return Err(ExclusionReason::Mock);
        }
        if let Some(rows) = &self.rows
            && rows.keys.contains(&record.key)
        {
            return Ok(());
        }
        if let Some(rows) = &self.rows
            && rows.questions.contains(&record.question)
        {
            return Err(if rows.answered.contains(&record.question) {
                ExclusionReason::Duplicate
            } else if record.is_truncated {
                ExclusionReason::Truncated
            } else {
                ExclusionReason::Adoptable
            });
        }
        // Report the first property that differs from all teachers.
        let mut similar: Vec<&TeacherIdentity> = self.teachers.iter().collect();
        similar.retain(|teacher| teacher.endpoints.contains(&group.endpoint));
        if similar.is_empty() {
            return Err(ExclusionReason::Endpoint);
        }
        similar.retain(|teacher| teacher.model == group.model);
        if similar.is_empty() {
            return Err(ExclusionReason::Model);
        }
        similar.retain(|teacher| teacher.sampling == group.sampling);
        if similar.is_empty() {
            return Err(ExclusionReason::Sampling);
        }
        match &self.rows {
            None => Ok(()),
            Some(_) => Err(ExclusionReason::Question),
        }
    }
}

/// Number of records of each group, by id.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupCounts(BTreeMap<String, GroupCount>);

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct GroupCount {
    group: Group,
    used: u64,
    /// Records that are left out, by reason.
    left_out: BTreeMap<String, u64>,
}

impl GroupCounts {
    fn entry(&mut self, group: &Group) -> &mut GroupCount {
        self.0.entry(group.id()).or_insert_with(|| GroupCount {
            group: group.clone(),
            ..GroupCount::default()
        })
    }

    /// Counts a record that is used.
    pub(crate) fn count_used(&mut self, group: &Group) {
        self.entry(group).used += 1;
    }

    /// Counts a record that is left out.
    pub(crate) fn count_left_out(&mut self, group: &Group, reason: ExclusionReason) {
        let left_out = &mut self.entry(group).left_out;
        *left_out.entry(reason.to_string()).or_default() += 1;
    }

    /// Adds the counts of further records.
    pub fn add(&mut self, other: GroupCounts) {
        for (id, count) in other.0 {
            let total = self.0.entry(id).or_default();
            total.group = count.group;
            total.used += count.used;
            for (reason, count) in count.left_out {
                *total.left_out.entry(reason).or_default() += count;
            }
        }
    }

    /// Returns the groups that have used records, each with the number of these records.
    pub(crate) fn all_used(&self) -> impl Iterator<Item = (&Group, u64)> {
        let used = self.0.values().filter(|count| count.used > 0);
        used.map(|count| (&count.group, count.used))
    }

    /// Returns true if there are groups, and all are of a mock.
    pub(crate) fn has_only_mocks(&self) -> bool {
        !self.0.is_empty() && self.0.values().all(|count| count.group.is_mock)
    }

    /// Returns advice on how to use the groups that are left out, if there are any.
    pub fn advice(&self) -> Option<String> {
        if self.has_only_mocks() {
            let is_left_out = self.0.values().any(|count| !count.left_out.is_empty());
            let advice = "set `data.groups` to \"mock\" to use the answers of the mock";
            return is_left_out.then(|| advice.into());
        }
        let mut settings = Vec::new();
        for (is_mock, setting) in [(false, "\"all\""), (true, "\"mock\"")] {
            let is_left_out =
                |count: &GroupCount| count.group.is_mock == is_mock && !count.left_out.is_empty();
            if self.0.values().any(is_left_out) {
                settings.push(setting);
            }
        }
        let settings = settings.join(" or ");
        (!settings.is_empty()).then(|| {
            format!("set `data.groups` to {settings}, or to a list of groups, to use them")
        })
    }

    /// Returns one line for each group: its id and properties, the number of used records, and the number of records
    /// that are left out, by reason.
    pub fn lines(&self) -> Vec<String> {
        let line = |(id, count): (&String, &GroupCount)| {
            let GroupCount {
                group,
                used,
                left_out,
            } = count;
            let used = (*used > 0).then(|| format!("{used} used"));
            let left_out = left_out.iter();
            let left_out = left_out.map(|(reason, count)| format!("{count} left out: {reason}"));
            let parts: Vec<String> = used.into_iter().chain(left_out).collect();
            format!("group {id} ({group}): {}", parts.join("; "))
        };
        self.0.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests;
