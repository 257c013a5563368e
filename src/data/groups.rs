//! Groups of answers in a cache, and the selection of those to train on. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::keys::{Fingerprint, Keys};
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
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
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
    pub questions: Option<Keys>,
    pub teachers: Vec<Teacher>,
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
            Difference::Question => "other prompts, template or samples",
        })
    }
}

impl Selection {
    /// Reason to leave out a record of this group, whose key contains this question (None for schema 1).
    pub fn difference(&self, group: &Group, question: Option<Fingerprint>) -> Option<Difference> {
        match self {
            Selection::All => group.is_mock.then_some(Difference::Mock),
            Selection::Named(names) => {
                let is_named = names.iter().any(|name| group.is_named(name));
                (!is_named).then_some(Difference::NotNamed)
            }
            Selection::Asked(asked) => asked.difference(group, question),
        }
    }

    /// Group of a selected record.
    ///
    /// # Errors
    /// If it is left out.
    pub fn check(&self, record: &Record) -> Result<Group, LeftOut> {
        let group = Group::of_record(record);
        let question = (record.v > 1).then(|| question::fingerprint(&record.key));
        match self.difference(&group, question) {
            Some(difference) => Err(LeftOut { group, difference }),
            None => Ok(group),
        }
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
                let mut questions: Vec<_> = asked.questions.iter().flatten().collect();
                questions.sort_unstable();
                for question in questions {
                    hash.update(question);
                }
            }
        }
    }
}

impl Asked {
    fn difference(&self, group: &Group, question: Option<Fingerprint>) -> Option<Difference> {
        if group.is_mock {
            return Some(Difference::Mock);
        }
        let is_there = |of: &dyn Fn(&&Teacher) -> bool| self.teachers.iter().any(|it| of(&it));
        let has_endpoint = |teacher: &&Teacher| teacher.endpoints.contains(&group.endpoint);
        let has_model = |teacher: &&Teacher| has_endpoint(teacher) && teacher.model == group.model;
        let has_sampling =
            |teacher: &&Teacher| has_model(teacher) && teacher.sampling == group.sampling;
        if !is_there(&has_endpoint) {
            return Some(Difference::Endpoint);
        }
        match (&self.questions, question) {
            (Some(questions), Some(question)) if questions.contains(&question) => None,
            _ if !is_there(&has_model) => Some(Difference::Model),
            _ if !is_there(&has_sampling) => Some(Difference::Sampling),
            (Some(_), Some(_)) => Some(Difference::Question),
            _ => None,
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
    group: String,
    used: u64,
    /// By reason.
    left_out: BTreeMap<String, u64>,
}

impl Counts {
    fn of(&mut self, group: &Group) -> &mut Count {
        self.0.entry(group.id()).or_insert_with(|| Count {
            group: group.to_string(),
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
        let is_mock = count.left_out.contains_key(&Difference::Mock.to_string());
        (!is_mock).then_some(id.as_str())
    }

    pub fn has_left_out(&self) -> bool {
        self.0.values().any(|count| !count.left_out.is_empty())
    }

    /// Groups that are used, with the number of their records.
    pub fn all_used(&self) -> impl Iterator<Item = (&str, u64)> {
        let used = self.0.values().filter(|count| count.used > 0);
        used.map(|count| (count.group.as_str(), count.used))
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
mod tests {
    use serde_json::json;

    use super::*;

    fn group(endpoint: &str, model: &str, temperature: f64) -> Group {
        Group {
            endpoint: question::endpoint("", endpoint),
            model: model.into(),
            sampling: question::sampling(&json!({"temperature": temperature})),
            is_mock: false,
        }
    }

    #[test]
    fn answers_of_the_config_are_told_from_others() {
        let request =
            json!({"model": "m", "temperature": 1.0, "seed": 7, "max_tokens": 5, "messages": []});
        let question = [7; 16];
        let asked = |questions: Option<Keys>| {
            Selection::Asked(Asked {
                questions,
                teachers: vec![Teacher::new("mine", "http://a/v1", &request)],
            })
        };
        let known = asked(Some(Keys::from_iter([question])));
        let ours = group("http://a/v1", "m", 1.0);
        let cases = [
            (ours.clone(), [7; 16], None),
            (ours.clone(), [8; 16], Some(Difference::Question)),
            (
                group("http://b/v1", "m", 1.0),
                [7; 16],
                Some(Difference::Endpoint),
            ),
            (
                group("http://a/v1", "n", 1.0),
                [8; 16],
                Some(Difference::Model),
            ),
            (
                group("http://a/v1", "m", 0.5),
                [8; 16],
                Some(Difference::Sampling),
            ),
            (
                Group {
                    endpoint: "name:mine".into(),
                    ..ours.clone()
                },
                [7; 16],
                None,
            ),
            (
                Group {
                    is_mock: true,
                    ..ours.clone()
                },
                [7; 16],
                Some(Difference::Mock),
            ),
        ];
        for (group, question, expected) in cases {
            assert_eq!(
                known.difference(&group, Some(question)),
                expected,
                "{group}"
            );
        }
        // Schema 1 has other keys, and the prompts may be gone.
        assert_eq!(known.difference(&ours, None), None);
        let unknown = asked(None);
        assert_eq!(unknown.difference(&ours, Some(question)), None);
        let other = group("http://a/v1", "n", 1.0);
        assert_eq!(
            unknown.difference(&other, Some(question)),
            Some(Difference::Model)
        );
    }

    #[test]
    fn groups_are_named_by_id_model_endpoint_and_teacher() {
        let plain = group("http://a/v1", "m", 1.0);
        let named = Group {
            endpoint: "name:mine".into(),
            ..plain.clone()
        };
        let mock = Group {
            is_mock: true,
            ..plain.clone()
        };
        let is_in = |name: &str, group| {
            Selection::Named(vec![name.into()])
                .difference(group, None)
                .is_none()
        };
        assert!(is_in(&plain.id(), &plain) && is_in("m", &plain) && is_in("http://a/v1", &plain));
        assert!(is_in("mine", &named) && !is_in("mine", &plain) && !is_in("mock", &plain));
        assert!(is_in("mock", &mock) && !is_in(&plain.id(), &mock));
        assert_eq!(
            Selection::All.difference(&mock, None),
            Some(Difference::Mock)
        );
        assert_eq!(Selection::All.difference(&named, None), None);
    }
}
