//! Settings of the teacher: the endpoint, its API key and its connection.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::harvest::{LimitsConfig, Price, SamplingConfig};
use crate::config::error::{MIN_KEY_LENGTH, Mistake, contains_key};
use crate::config::parsed::seconds;

/// Start of an environment variable in a value: `${NAME}`.
pub(crate) const VARIABLE_START: &str = "${";

/// Default of `teacher.api_key_env`.
const DEFAULT_VARIABLE: &str = "OPENAI_API_KEY";

/// Settings of a teacher: an endpoint, or a model on this machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TeacherConfig {
    /// Name in the summary and in messages, and identity in cache records; empty for the name of the model.
    pub name: String,
    /// Weight of this teacher in the distribution of the prompts over all teachers.
    pub share: f64,
    /// Address of the endpoint; `${NAME}` is replaced by the environment variable. The part of the variable's value
    /// after the host is removed from answers, like a key.
    pub base_url: String,
    pub model: String,
    /// Name of the environment variable with the key; empty for an endpoint without a key.
    pub api_key_env: String,
    /// File with the key, instead of a variable; read again when the endpoint rejects the key.
    pub api_key_file: Option<PathBuf>,
    /// Shell command that prints the key, instead of a variable; run again when the endpoint rejects the key.
    pub api_key_command: Option<String>,
    /// Header for the key; in `Authorization` the key follows `Bearer`.
    pub api_key_header: String,
    /// Additional headers of every request; `${NAME}` is replaced by the environment variable.
    pub headers: BTreeMap<String, String>,
    /// Query parameters of every request; `${NAME}` is replaced by the environment variable.
    pub query: BTreeMap<String, String>,
    /// Value of the `OpenAI-Organization` header; empty to omit the header.
    pub organization: String,
    /// Value of the `OpenAI-Project` header; empty to omit the header.
    pub project: String,
    /// Permission for unencrypted http to another machine.
    pub allow_http: AllowHttp,
    /// PEM file of certificate authorities to trust in addition to the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM file of a client certificate with its private key.
    pub client_certificate: Option<PathBuf>,
    #[serde(rename = "connect_timeout_s", with = "seconds")]
    pub connect_timeout: Duration,
    /// Timeout for the whole answer. The default is generous, since a request that timed out may have been billed.
    #[serde(rename = "timeout_s", with = "seconds")]
    pub timeout: Duration,
    /// Model folder of a teacher on this machine. `distill train` uses its full distributions as soft labels, instead
    /// of the logprobs in the cache.
    pub local: Option<PathBuf>,
    /// True to train the local teacher along with the student, by cross-entropy on the same examples.
    pub cotrain: bool,
    /// Learning rate of the local teacher, as a multiple of `train.learning_rate`.
    pub cotrain_rate: f64,
    /// Sampling of this teacher alone; missing keys have the values of `[sampling]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplingConfig>,
    /// Limits of this teacher alone; missing keys have the values of `[limits]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsConfig>,
    /// Prices of this teacher alone; missing keys have the values of `[price]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
}

/// Settings of one endpoint: an entry of `[[teachers]]`, or `[teacher]`, with its sampling, limits and prices.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointConfig {
    pub teacher: TeacherConfig,
    pub sampling: SamplingConfig,
    pub limits: LimitsConfig,
    pub price: Price,
}

impl TeacherConfig {
    /// Returns the headers of every request, except for the key, as (setting, name, value).
    pub(crate) fn extra_headers(&self) -> impl Iterator<Item = (String, &str, &str)> {
        let openai = [
            ("organization", "OpenAI-Organization", &self.organization),
            ("project", "OpenAI-Project", &self.project),
        ];
        let openai = openai
            .into_iter()
            .filter(|(_, _, value)| !value.is_empty())
            .map(|(key, name, value)| (format!("teacher.{key}"), name, value.as_str()));
        let headers = self.headers.iter();
        openai.chain(headers.map(|(name, value)| {
            let setting = format!("teacher.headers.{name}");
            (setting, name.as_str(), value.as_str())
        }))
    }

    /// Returns the name of the teacher in messages: `name`, or else the name of the model.
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
            connect_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(600),
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
    /// To an endpoint without a key.
    WithoutKey,
    /// Also with a key, which is sent unencrypted.
    WithKey,
}

impl TryFrom<serde_json::Value> for AllowHttp {
    type Error = &'static str;

    fn try_from(value: serde_json::Value) -> Result<Self, Self::Error> {
        match (value.as_bool(), value.as_str()) {
            (Some(false), _) => Ok(AllowHttp::No),
            (Some(true), _) => Ok(AllowHttp::WithoutKey),
            (_, Some("with_key")) => Ok(AllowHttp::WithKey),
            _ => Err("expected true, false or \"with_key\""),
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
    /// Returns the source of the API key. A command or a file takes precedence over a variable, which has a default
    /// name.
    pub fn key_source(&self) -> KeySource<'_> {
        match (&self.api_key_command, &self.api_key_file) {
            (Some(command), _) => KeySource::Command(command),
            (_, Some(file)) => KeySource::File(file),
            _ if self.api_key_env.is_empty() => KeySource::None,
            _ => KeySource::Variable(&self.api_key_env),
        }
    }

    /// Checks the API key settings. The messages never repeat a value that may be a key.
    ///
    /// # Errors
    /// If several sources of the key are set, `api_key_env` is not a variable name, or a header, the base URL or the
    /// query seems to contain a key.
    pub(crate) fn check(&self) -> Result<(), Mistake> {
        let sources = [
            self.api_key_command.is_some(),
            self.api_key_file.is_some(),
            !self.api_key_env.is_empty() && self.api_key_env != DEFAULT_VARIABLE,
        ];
        if sources.into_iter().filter(|is_set| *is_set).count() > 1 {
            let set_key = match &self.api_key_command {
                Some(_) => "teacher.api_key_command",
                None => "teacher.api_key_file",
            };
            return Err(Mistake::new(
                set_key,
                "the API key has several sources: set only one of `teacher.api_key_env`, `teacher.api_key_file` and \
                 `teacher.api_key_command`",
            ));
        }
        if !self.api_key_env.is_empty() && !is_name(&self.api_key_env) {
            return Err(Mistake::new(
                "teacher.api_key_env",
                "`teacher.api_key_env` must be the name of the environment variable that holds the key; its value \
                 is not a valid name (it is not repeated here, as it may be the key itself): run \
                 `export TEACHER_KEY=...` and set `teacher.api_key_env = \"TEACHER_KEY\"`",
            ));
        }
        for (name, value) in &self.headers {
            let lower_name = name.to_lowercase();
            let secret_words = ["auth", "key", "token", "secret", "cookie"];
            let is_secret = secret_words.iter().any(|word| lower_name.contains(word));
            if (is_secret && value.len() >= MIN_KEY_LENGTH || contains_key(value))
                && !value.contains(VARIABLE_START)
            {
                let message = format!(
                    "`teacher.headers.{name}` seems to contain a key (it is not repeated here): put it \
                     into an environment variable and write `${{NAME}}` in its place"
                );
                return Err(Mistake::new("teacher.headers", message));
            }
        }
        let contain_keys = [
            ("teacher.base_url", contains_key(&self.base_url)),
            (
                "teacher.query",
                self.query.values().any(|value| contains_key(value)),
            ),
        ];
        if let Some((key, _)) = contain_keys.into_iter().find(|(_, is_secret)| *is_secret) {
            let message = format!(
                "`{key}` seems to contain a key (it is not repeated here): put it into an environment variable and \
                 write ${{NAME}} in its place"
            );
            return Err(Mistake::new(key, message));
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
    // Names consist of words and few digits; keys mix letters with many digits.
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    let has_lower_case = text.bytes().any(|byte| byte.is_ascii_lowercase());
    let max_digits = if has_lower_case { 0 } else { 3 };
    let is_mixed = text.len() >= MIN_KEY_LENGTH && !text.contains('_') && digits > max_digits;
    is_identifier && !is_mixed && !contains_key(text)
}

/// Returns the identity of an endpoint in cache keys and records: the base URL without trailing slashes.
pub fn identity(settings: &TeacherConfig) -> &str {
    settings.base_url.trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::error::hide_keys;

    #[test]
    fn key_in_api_key_env_is_rejected_and_not_repeated() {
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
            let error = teacher.check().unwrap_err().message;
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
    fn keys_in_headers_query_and_url_are_rejected() {
        let check_changed = |change: fn(&mut TeacherConfig)| {
            let mut teacher = TeacherConfig::default();
            change(&mut teacher);
            teacher.check()
        };
        let header =
            |name: &str, value: &str| BTreeMap::from([(name.to_string(), value.to_string())]);
        let secret = "0123456789abcdef0123";
        let error = check_changed(|teacher| {
            teacher.headers = BTreeMap::from([("X-Api-Key".into(), "0123456789abcdef0123".into())]);
        });
        assert!(!error.unwrap_err().message.contains(secret));
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
            check_changed(|teacher| teacher.base_url = "https://x/sk-0123456789abcdef/v1".into())
                .is_err()
        );
        assert!(check_changed(|teacher| teacher.base_url = "https://x/${PART}/v1".into()).is_ok());
        assert!(
            check_changed(|teacher| {
                teacher.api_key_command = Some("x".into());
                teacher.api_key_file = Some("y".into());
            })
            .is_err()
        );
    }

    #[test]
    fn allow_http_parses_three_values() {
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
