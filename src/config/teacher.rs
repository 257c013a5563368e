//! The endpoint that is asked, and how it is reached.

use crate::config::error::SHORTEST_KEY;
use crate::config::error::hide_keys;
use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::harvest::{LimitsConfig, Price, SamplingConfig};
use crate::config;
use crate::config::error::usage;

const DEFAULT_VARIABLE: &str = "OPENAI_API_KEY";

/// The endpoint that is asked, or the model on this machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TeacherConfig {
    /// How the summary and the config's own messages call it; empty for the model's name.
    pub name: String,
    /// Its part of the prompts, relative to the other teachers' shares.
    pub share: f64,
    pub base_url: String,
    pub model: String,
    /// Name of the environment variable that holds the key; empty for an endpoint without one.
    pub api_key_env: String,
    /// A file that holds the key, in place of a variable; read again when the endpoint refuses the key.
    pub api_key_file: Option<PathBuf>,
    /// A command that prints the key, by the shell; run again when the endpoint refuses the key.
    pub api_key_command: Option<String>,
    /// The header that carries the key; `Authorization` carries it as `Bearer`.
    pub api_key_header: String,
    /// Further headers of every request; `${NAME}` stands for an environment variable.
    pub headers: BTreeMap<String, String>,
    /// The query of every request's address; `${NAME}` likewise.
    pub query: BTreeMap<String, String>,
    /// Value of the `OpenAI-Organization` header; empty to leave it out.
    pub organization: String,
    pub project: String,
    /// Plain http to another machine than this one.
    pub allow_http: AllowHttp,
    /// Certificates, in PEM, of who signs the endpoint's, beside those that this machine trusts.
    pub ca_file: Option<PathBuf>,
    /// A certificate with its key, in PEM, for an endpoint that asks for one.
    pub client_certificate: Option<PathBuf>,
    pub connect_timeout_s: f64,
    /// For the whole answer. Generous, since a request that timed out may have been billed.
    pub timeout_s: f64,
    /// A model folder: a teacher on this machine for `distill train`, whose whole distributions are the
    /// soft labels, in place of those of the cache.
    pub local: Option<PathBuf>,
    /// Train that one along, by cross-entropy on the same examples.
    pub cotrain: bool,
    /// Its learning rate, as a share of `train.learning_rate`.
    pub cotrain_rate: f64,
    /// What is this teacher's own; a key that is missing here has the value of the section.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplingConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
}

/// One endpoint with everything that holds for it.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointConfig {
    pub teacher: TeacherConfig,
    pub sampling: SamplingConfig,
    pub limits: LimitsConfig,
    pub price: Price,
}

impl TeacherConfig {
    /// The name that people know it by.
    pub fn label(&self) -> &str {
        match self.name.as_str() {
            "" => &self.model,
            name => name,
        }
    }
}

impl Default for TeacherConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            share: 1.0,
            base_url: "https://api.openai.com/v1".into(),
            model: String::new(),
            api_key_env: DEFAULT_VARIABLE.into(),
            api_key_file: None,
            api_key_command: None,
            api_key_header: "Authorization".into(),
            headers: BTreeMap::new(),
            query: BTreeMap::new(),
            organization: String::new(),
            project: String::new(),
            allow_http: AllowHttp::No,
            ca_file: None,
            client_certificate: None,
            connect_timeout_s: 10.0,
            timeout_s: 600.0,
            local: None,
            cotrain: false,
            cotrain_rate: 1.0,
            sampling: None,
            limits: None,
            price: None,
        }
    }
}

/// Permission to send prompts, and the key, over unencrypted http to another machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value", into = "serde_json::Value")]
pub enum AllowHttp {
    #[default]
    No,
    /// To an endpoint that has no key.
    WithoutKey,
    /// Insisted upon.
    WithKey,
}

impl TryFrom<serde_json::Value> for AllowHttp {
    type Error = &'static str;

    fn try_from(value: serde_json::Value) -> Result<Self, Self::Error> {
        match (value.as_bool(), value.as_str()) {
            (Some(false), _) => Ok(AllowHttp::No),
            (Some(true), _) => Ok(AllowHttp::WithoutKey),
            (_, Some("with_key")) => Ok(AllowHttp::WithKey),
            _ => Err("teacher.allow_http is true, false or \"with_key\""),
        }
    }
}

impl From<AllowHttp> for serde_json::Value {
    fn from(allow: AllowHttp) -> Self {
        match allow {
            AllowHttp::No => false.into(),
            AllowHttp::WithoutKey => true.into(),
            AllowHttp::WithKey => "with_key".into(),
        }
    }
}

/// Source of the API key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KeySource<'a> {
    None,
    Variable(&'a str),
    File(&'a PathBuf),
    Command(&'a str),
}

impl TeacherConfig {
    pub fn key_source(&self) -> KeySource<'_> {
        match (&self.api_key_command, &self.api_key_file) {
            (Some(command), _) => KeySource::Command(command),
            (_, Some(file)) => KeySource::File(file),
            _ if self.api_key_env.is_empty() => KeySource::None,
            _ => KeySource::Variable(&self.api_key_env),
        }
    }

    /// Refuses what cannot be meant, without repeating what may be a key.
    pub fn check(&self) -> Result<()> {
        let sources = [
            self.api_key_command.is_some(),
            self.api_key_file.is_some(),
            !self.api_key_env.is_empty() && self.api_key_env != DEFAULT_VARIABLE,
        ];
        if sources.into_iter().filter(|is_set| *is_set).count() > 1 {
            return Err(usage(
                "the key comes from one place: set one of teacher.api_key_env, api_key_file and \
                 api_key_command"
                    .into(),
            ));
        }
        if !self.api_key_env.is_empty() && !is_name(&self.api_key_env) {
            return Err(usage(
                "teacher.api_key_env takes the name of the environment variable that holds the key, and \
                 what stands there is none (it is not repeated here, as it may be the key itself): run \
                 `export TEACHER_KEY=...` and set teacher.api_key_env = \"TEACHER_KEY\""
                    .into(),
            ));
        }
        for (name, value) in &self.headers {
            let lower = name.to_lowercase();
            let is_secret = ["auth", "key", "token", "secret", "cookie"];
            let is_secret = is_secret.iter().any(|part| lower.contains(part));
            if (is_secret && value.len() >= SHORTEST_KEY || looks_like_key(value))
                && !value.contains("${")
            {
                return Err(usage(format!(
                    "teacher.headers.{name} holds what looks like a key (it is not repeated here): put it \
                     into an environment variable and write ${{NAME}} in its place"
                )));
            }
        }
        let in_query = self.query.values().find(|value| looks_like_key(value));
        if in_query.is_some() || looks_like_key(&self.base_url) {
            return Err(usage(
                "teacher.base_url or teacher.query holds what looks like a key (it is not repeated here): \
                 put it into an environment variable and write ${NAME} in its place"
                    .into(),
            ));
        }
        Ok(())
    }
}

/// Returns true if the text is a plausible variable name and not a key.
fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    let first = bytes.next().unwrap_or(b'0');
    let is_identifier = (first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    // Names are words; in keys, digits and letters are mixed.
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    let has_lower_case = text.bytes().any(|byte| byte.is_ascii_lowercase());
    let most_digits = if has_lower_case { 0 } else { 3 };
    let is_mixed = text.len() >= 16 && !text.contains('_') && digits > most_digits;
    is_identifier && !is_mixed && !looks_like_key(text)
}

/// Returns true if the text contains a key of a well-known provider.
fn looks_like_key(text: &str) -> bool {
    hide_keys(text) != text
}

/// The base URL as records name it: as the config has it, without a slash at the end.
pub fn identity(settings: &config::TeacherConfig) -> &str {
    settings.base_url.trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_a_key_is_never_repeated() {
        for value in [
            "sk-realkey0123456789abcdef",
            "gsk_0123456789abcdefghij",
            "hf_0123456789abcdefghijkl",
            "a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d6",
            "AKey with spaces",
            "SKABCDEF0123456789ABCDEF",
            "Bearer sk-realkey0123456789abcdef",
        ] {
            let teacher = TeacherConfig {
                api_key_env: value.into(),
                ..TeacherConfig::default()
            };
            let error = teacher.check().unwrap_err().to_string();
            assert!(
                !error.contains(value) && error.contains("export"),
                "{error}"
            );
        }
        for name in [
            "OPENAI_API_KEY",
            "my_key",
            "KEY_2",
            "OPENROUTER_API_KEY_FOR_THE_2ND_ACCOUNT",
        ] {
            let teacher = TeacherConfig {
                api_key_env: name.into(),
                ..TeacherConfig::default()
            };
            assert!(teacher.check().is_ok(), "{name}");
        }
        assert_eq!(
            hide_keys("unknown key \"sk-0123456789abcdef\", sk-learn and sk-sentence-pair-model"),
            "unknown key \"[key]\", sk-learn and sk-sentence-pair-model"
        );
    }

    #[test]
    fn a_key_belongs_into_a_variable_wherever_it_is_written() {
        let with = |change: fn(&mut TeacherConfig)| {
            let mut teacher = TeacherConfig::default();
            change(&mut teacher);
            teacher.check()
        };
        let header =
            |name: &str, value: &str| BTreeMap::from([(name.to_string(), value.to_string())]);
        let secret = "0123456789abcdef0123";
        let error = with(|teacher| {
            teacher.headers = BTreeMap::from([("X-Api-Key".into(), "0123456789abcdef0123".into())]);
        });
        assert!(!error.unwrap_err().to_string().contains(secret));
        let teacher = TeacherConfig {
            headers: header("X-Api-Key", "${GATEWAY_KEY}"),
            ..TeacherConfig::default()
        };
        assert!(teacher.check().is_ok());
        let teacher = TeacherConfig {
            headers: header("HTTP-Referer", "https://example.com/a-long-address"),
            ..TeacherConfig::default()
        };
        assert!(teacher.check().is_ok());
        assert!(
            with(|teacher| teacher.base_url = "https://x/sk-0123456789abcdef/v1".into()).is_err()
        );
        assert!(with(|teacher| teacher.base_url = "https://x/${PART}/v1".into()).is_ok());
        assert!(
            with(|teacher| {
                teacher.api_key_command = Some("x".into());
                teacher.api_key_file = Some("y".into());
            })
            .is_err()
        );
    }

    #[test]
    fn plain_http_is_a_choice_of_three() {
        let parse = |text: &str| toml::from_str::<TeacherConfig>(&format!("allow_http = {text}"));
        assert_eq!(parse("true").unwrap().allow_http, AllowHttp::WithoutKey);
        assert_eq!(parse("false").unwrap().allow_http, AllowHttp::No);
        assert_eq!(
            parse("\"with_key\"").unwrap().allow_http,
            AllowHttp::WithKey
        );
        let error = parse("\"yes\"").unwrap_err().to_string();
        assert!(error.contains("with_key"), "{error}");
        let shown = toml::to_string(&parse("true").unwrap()).unwrap();
        assert!(shown.contains("allow_http = true"), "{shown}");
    }
}
