//! Groups of answers in a cache, and the selection of those to train on. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::keys::{self, Keys};
use crate::cache::question;
use crate::cache::record::Record;
use crate::cache::view::RecordView;

/// `system_fingerprint` of `distill serve --mock`.
const MOCK_FINGERPRINT: &str = "fp_mock";
/// Name of all groups of a mock.
const MOCK: &str = "mock";
/// Hex digits of a group's id.
const ID_DIGITS: usize = 8;

/// What the answers of a group have in common.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// As in keys: by name or by address.
    endpoint: String,
    /// Model of the request.
    model: String,
    /// Sampling parameters of the request as JSON.
    sampling: String,
    /// The answers are scripted.
    is_mock: bool,
}

impl Group {
    pub fn of_view(record: &RecordView, params: &Value) -> Group {
        Group {
            endpoint: question::endpoint(&record.teacher, &record.endpoint),
            model: record.request_model().to_owned(),
            sampling: question::sampling(params),
            is_mock: record.fingerprint == MOCK_FINGERPRINT,
        }
    }

    pub fn of_record(record: &Record) -> Group {
        Group {
            endpoint: question::endpoint(&record.teacher, &record.endpoint),
            model: model_of(&record.request),
            sampling: question::sampling(&record.request),
            is_mock: record.fingerprint == MOCK_FINGERPRINT,
        }
    }

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
    pub fn model_and_sampling(&self) -> String {
        format!("{}, {}", self.model, self.sampling)
    }

    fn is_named(&self, name: &str) -> bool {
        let by_name = self.endpoint.strip_prefix("name:");
        name == self.model
            || name == self.endpoint
            || by_name == Some(name)
            || name == self.id()
            || name == MOCK && self.is_mock
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Group {
            endpoint,
            model,
            sampling,
            is_mock,
        } = self;
        let endpoint = endpoint.strip_prefix("name:").unwrap_or(endpoint);
        let mock = if *is_mock { ", a mock" } else { "" };
        write!(f, "{model} at {endpoint}{mock}, {sampling}")
    }
}

fn model_of(request: &Value) -> String {
    request["model"].as_str().unwrap_or_default().to_owned()
}

/// A teacher of the config, as its requests name it.
#[derive(Debug, Clone)]
pub struct Teacher {
    /// By name and by address.
    endpoints: [String; 2],
    model: String,
    sampling: String,
}

impl Teacher {
    /// `name` is empty if the teacher has none; `request` is one of its requests.
    pub fn new(name: &str, base_url: &str, request: &Value) -> Teacher {
        Teacher {
            endpoints: [name, ""].map(|name| question::endpoint(name, base_url)),
            model: model_of(request),
            sampling: question::sampling(request),
        }
    }
}

/// Questions of a config and the teachers that it asks.
#[derive(Debug, Clone)]
pub struct Asked {
    /// None if the prompts cannot be read.
    pub rows: Option<Rows>,
    pub teachers: Vec<Teacher>,
}

/// Rows of a plan.
#[derive(Debug, Clone, Default)]
pub struct Rows {
    /// Every key under which an answer to one of them is cached: see `cache::question::Names`.
    pub keys: Keys,
    /// See [`question::fingerprint`].
    pub questions: Keys,
}

/// What the selection needs of a record.
#[derive(Debug, Clone, Copy)]
pub struct Name<'a> {
    pub key: &'a str,
    /// See [`Record::cut_at`].
    pub cut_at: u32,
}

/// Which records of a cache are trained on.
#[derive(Debug, Clone)]
pub enum Selection {
    /// Every record.
    Any,
    /// All but those of a mock.
    All,
    /// By id, model, endpoint or teacher; "mock" names all groups of a mock.
    Named(Vec<String>),
    /// Answers to the questions of the config.
    Asked(Asked),
}

/// Reason to leave out a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    Mock,
    NotNamed,
    Endpoint,
    Model,
    Sampling,
    Truncated,
    Question,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Difference::Mock => "answers of a mock",
            Difference::NotNamed => "not in data.groups",
            Difference::Endpoint => "another endpoint",
            Difference::Model => "another model",
            Difference::Sampling => "other sampling parameters",
            Difference::Truncated => "truncated before sampling.max_tokens",
            Difference::Question => "other prompts, template, samples, seed, schema or tools",
        })
    }
}

impl Selection {
    /// Reason to leave out a record of this group.
    pub fn difference(&self, group: &Group, name: Name) -> Option<Difference> {
        match self {
            Selection::Any => None,
            Selection::All => group.is_mock.then_some(Difference::Mock),
            Selection::Named(names) => {
                let is_named = names.iter().any(|name| group.is_named(name));
                (!is_named).then_some(Difference::NotNamed)
            }
            Selection::Asked(asked) => asked.difference(group, name),
        }
    }

    /// Group of a selected record.
    ///
    /// # Errors
    /// If it is left out.
    pub fn check(&self, record: &Record) -> Result<Group, LeftOut> {
        let group = Group::of_record(record);
        let name = Name {
            key: &record.key,
            cut_at: record.cut_at,
        };
        match self.difference(&group, name) {
            Some(difference) => Err(LeftOut { group, difference }),
            None => Ok(group),
        }
    }

    /// Adds everything that decides to a hash.
    pub fn update(&self, hash: &mut blake3::Hasher) {
        match self {
            Selection::Any => {
                hash.update(b"any");
            }
            Selection::All => {
                hash.update(b"all");
            }
            Selection::Named(names) => {
                for name in names {
                    hash.update(name.as_bytes()).update(b"\n");
                }
            }
            Selection::Asked(asked) => {
                for teacher in &asked.teachers {
                    let fields = [&teacher.model, &teacher.sampling];
                    for field in teacher.endpoints.iter().chain(fields) {
                        hash.update(field.as_bytes()).update(b"\n");
                    }
                }
                let rows = asked.rows.iter();
                let mut keys: Vec<_> = rows.flat_map(|rows| &rows.keys).collect();
                keys.sort_unstable();
                for key in keys {
                    hash.update(key);
                }
            }
        }
    }
}

impl Asked {
    fn difference(&self, group: &Group, name: Name) -> Option<Difference> {
        if group.is_mock {
            return Some(Difference::Mock);
        }
        if let Some(rows) = &self.rows
            && rows.keys.contains(&keys::fingerprint(name.key))
        {
            return None;
        }
        let is_there = |of: &dyn Fn(&&Teacher) -> bool| self.teachers.iter().any(|it| of(&it));
        let has_endpoint = |teacher: &&Teacher| teacher.endpoints.contains(&group.endpoint);
        let has_model = |teacher: &&Teacher| has_endpoint(teacher) && teacher.model == group.model;
        let has_sampling =
            |teacher: &&Teacher| has_model(teacher) && teacher.sampling == group.sampling;
        if !is_there(&has_endpoint) {
            return Some(Difference::Endpoint);
        }
        if !is_there(&has_model) {
            return Some(Difference::Model);
        }
        if !is_there(&has_sampling) {
            return Some(Difference::Sampling);
        }
        let rows = self.rows.as_ref()?;
        let is_asked = rows.questions.contains(&question::fingerprint(name.key));
        if is_asked && name.cut_at > 0 {
            Some(Difference::Truncated)
        } else {
            Some(Difference::Question)
        }
    }
}

/// A record that is left out because of its group.
#[derive(Debug, Clone)]
pub struct LeftOut {
    pub group: Group,
    pub difference: Difference,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LeftOut { group, difference } = self;
        write!(f, "{difference}: group {} ({group})", group.id())
    }
}

/// Number of records of each group, by id.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts(BTreeMap<String, Count>);

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Count {
    group: Group,
    used: u64,
    /// By reason.
    left_out: BTreeMap<String, u64>,
}

impl Counts {
    fn of(&mut self, group: &Group) -> &mut Count {
        self.0.entry(group.id()).or_insert_with(|| Count {
            group: group.clone(),
            ..Count::default()
        })
    }

    pub fn used(&mut self, group: &Group) {
        self.of(group).used += 1;
    }

    pub fn left_out(&mut self, left: &LeftOut) {
        let count = self.of(&left.group);
        *count
            .left_out
            .entry(left.difference.to_string())
            .or_default() += 1;
    }

    pub fn add(&mut self, other: Counts) {
        for (id, count) in other.0 {
            let mine = self.0.entry(id).or_default();
            mine.group = count.group;
            mine.used += count.used;
            for (reason, count) in count.left_out {
                *mine.left_out.entry(reason).or_default() += count;
            }
        }
    }

    /// Id of the only group, unless it is a mock's.
    pub fn only(&self) -> Option<&str> {
        let (id, count) = self.0.first_key_value().filter(|_| self.0.len() == 1)?;
        (!count.group.is_mock).then_some(id.as_str())
    }

    /// Groups that are used, with the number of their records.
    pub fn all_used(&self) -> impl Iterator<Item = (&Group, u64)> {
        let used = self.0.values().filter(|count| count.used > 0);
        used.map(|count| (&count.group, count.used))
    }

    /// A name of the selection that no group has.
    pub fn unknown_name<'n>(&self, selection: &'n Selection) -> Option<&'n str> {
        let Selection::Named(names) = selection else {
            return None;
        };
        let is_known = |name: &&String| self.0.values().any(|count| count.group.is_named(name));
        let unknown = names.iter().find(|name| !is_known(name));
        unknown.map(String::as_str)
    }

    /// How to use the groups that are left out; empty if there are none.
    pub fn advice(&self) -> String {
        let left_out = self.0.values().filter(|count| !count.left_out.is_empty());
        let names: Vec<&str> = left_out
            .map(|count| match count.group.is_mock {
                true => "\"mock\"",
                false => "\"all\"",
            })
            .collect();
        let mut words: Vec<String> = ["\"all\"", "\"mock\""]
            .into_iter()
            .filter(|name| names.contains(name))
            .map(str::to_owned)
            .collect();
        if words.is_empty() {
            return String::new();
        }
        words.push("a list of groups".into());
        format!("set data.groups to {} to use them", words.join(" or "))
    }

    /// One line for each group and reason: number of records, id, group, and the reason to leave them out.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (id, count) in &self.0 {
            let Count {
                group,
                used,
                left_out,
            } = count;
            if *used > 0 {
                lines.push(format!("{used} records of group {id} ({group})"));
            }
            for (reason, count) in left_out {
                lines.push(format!(
                    "{count} records of group {id} ({group}) left out: {reason}"
                ));
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests;
