//! Groups of answers in a cache, and the selection of those to train on. Pure.

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

/// Name of all groups of a mock.
const MOCK: &str = "mock";
/// Hex digits of a group's id.
const ID_DIGITS: usize = 8;

/// Properties that all answers of a group share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// As in keys: by name or by address.
    endpoint: String,
    /// Model of the request.
    model: String,
    /// Sampling parameters of the request as JSON.
    sampling: String,
    /// The answers are scripted.
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
    pub fn model_and_sampling(&self) -> String {
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

    /// A mock has the model name and perhaps the address of what it stands for, so these do not name its groups.
    pub fn is_named(&self, name: &str) -> bool {
        if name == self.id() {
            return true;
        }
        if self.is_mock {
            return name == MOCK;
        }
        name == self.model
            || self.endpoint.strip_prefix("name:") == Some(name)
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
        let endpoint = endpoint.strip_prefix("name:").unwrap_or(endpoint);
        let text = format!("{model} at {endpoint}{}, {sampling}", self.mock_note());
        f.write_str(&on_one_line(&text))
    }
}

/// Names come from whoever wrote the cache.
fn on_one_line(text: &str) -> String {
    sanitise(text).replace(['\n', '\t'], " ")
}

fn model_of(request: &Value) -> String {
    request["model"].as_str().unwrap_or_default().to_owned()
}

/// The properties of a record that decide whether it is selected.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub group: Group,
    key: Fingerprint,
    question: Fingerprint,
    /// The answer was truncated at the `max_tokens` of its request.
    is_truncated: bool,
}

impl Candidate {
    /// `params` are those of [`RecordView::params`].
    pub fn of_view(record: &RecordView, params: &Value) -> Candidate {
        let group = Group {
            endpoint: question::endpoint(&record.teacher, &record.endpoint),
            model: record.request_model().to_owned(),
            sampling: question::sampling(params),
            is_mock: is_mock(&record.fingerprint),
        };
        Candidate::new(group, &record.key, record.cut_at)
    }

    pub fn of_record(record: &Record) -> Candidate {
        let group = Group {
            endpoint: question::endpoint(&record.teacher, &record.endpoint),
            model: model_of(&record.request),
            sampling: question::sampling(&record.request),
            is_mock: is_mock(&record.fingerprint),
        };
        Candidate::new(group, &record.key, record.cut_at)
    }

    fn new(group: Group, key: &str, cut_at: u32) -> Candidate {
        Candidate {
            group,
            key: crate::cache::fingerprint::fingerprint(key),
            question: question::question_fingerprint(key),
            is_truncated: cut_at > 0,
        }
    }
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
    /// Key of the answer to each row that has one.
    pub keys: KeySet,
    /// Questions of these.
    pub answered: KeySet,
    /// See [`question::fingerprint`].
    pub questions: KeySet,
}

/// Which records of a cache are trained on.
#[derive(Debug, Clone)]
pub enum Selection {
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
    Duplicate,
    Truncated,
    Adoptable,
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
            Difference::Duplicate => "another answer to the same question is used",
            Difference::Truncated => {
                "truncated at a smaller max_tokens; `distill harvest` requests them again"
            }
            Difference::Adoptable => {
                "from another endpoint to this config's questions; `distill cache adopt` takes them over"
            }
            Difference::Question => "other prompts, template, samples, seed, schema or tools",
        })
    }
}

impl Selection {
    /// # Errors
    /// The reason to leave the record out.
    pub fn check(&self, candidate: &Candidate) -> Result<(), Difference> {
        let group = &candidate.group;
        let (is_selected, difference) = match self {
            Selection::All => (!group.is_mock, Difference::Mock),
            Selection::Named(names) => {
                let is_named = names.iter().any(|name| group.is_named(name));
                (is_named, Difference::NotNamed)
            }
            Selection::Asked(asked) => return asked.check(candidate),
        };
        if is_selected { Ok(()) } else { Err(difference) }
    }

    /// Adds everything that decides to a hash.
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
    fn check(&self, candidate: &Candidate) -> Result<(), Difference> {
        let group = &candidate.group;
        if group.is_mock {
            return Err(Difference::Mock);
        }
        if let Some(rows) = &self.rows
            && rows.keys.contains(&candidate.key)
        {
            return Ok(());
        }
        if let Some(rows) = &self.rows
            && rows.questions.contains(&candidate.question)
        {
            return Err(if rows.answered.contains(&candidate.question) {
                Difference::Duplicate
            } else if candidate.is_truncated {
                Difference::Truncated
            } else {
                Difference::Adoptable
            });
        }
        // Which property is the first that no teacher shares?
        let mut like: Vec<&Teacher> = self.teachers.iter().collect();
        like.retain(|teacher| teacher.endpoints.contains(&group.endpoint));
        if like.is_empty() {
            return Err(Difference::Endpoint);
        }
        like.retain(|teacher| teacher.model == group.model);
        if like.is_empty() {
            return Err(Difference::Model);
        }
        like.retain(|teacher| teacher.sampling == group.sampling);
        if like.is_empty() {
            return Err(Difference::Sampling);
        }
        match &self.rows {
            None => Ok(()),
            Some(rows)
                if candidate.is_truncated && rows.questions.contains(&candidate.question) =>
            {
                Err(Difference::Truncated)
            }
            Some(_) => Err(Difference::Question),
        }
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

    pub fn left_out(&mut self, group: &Group, difference: Difference) {
        let left_out = &mut self.of(group).left_out;
        *left_out.entry(difference.to_string()).or_default() += 1;
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

    /// Groups that are used, with the number of their records.
    pub fn all_used(&self) -> impl Iterator<Item = (&Group, u64)> {
        let used = self.0.values().filter(|count| count.used > 0);
        used.map(|count| (&count.group, count.used))
    }

    /// How to use the groups that are left out, if there are any.
    pub fn advice(&self) -> Option<String> {
        let mut words = Vec::new();
        for (is_mock, word) in [(false, "\"all\""), (true, "\"mock\"")] {
            let is_left_out =
                |count: &Count| count.group.is_mock == is_mock && !count.left_out.is_empty();
            if self.0.values().any(is_left_out) {
                words.push(word);
            }
        }
        let words = words.join(" or ");
        (!words.is_empty())
            .then(|| format!("set data.groups to {words}, or to a list of groups, to use them"))
    }

    /// One line for each group: its id and properties, the number of records used, and of those left out by reason.
    pub fn lines(&self) -> Vec<String> {
        let line = |(id, count): (&String, &Count)| {
            let Count {
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
