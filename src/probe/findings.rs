//! Findings of `distill probe` about an endpoint, and checks of a config against them. Pure, except for reading the
//! file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::config::{EndpointConfig, MaxTokensField};
use crate::exit::Exit;

/// Version of `endpoint.json` and of the JSON object that `distill probe --json` prints.
pub(crate) const ENDPOINT_VERSION: u32 = 1;

/// `endpoint.json` in the run folder: the findings about every endpoint of the config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(expecting = "the findings of `distill probe`")]
pub struct ProbedEndpoints {
    pub version: u32,
    pub endpoints: Vec<ProbedEndpoint>,
}

/// Measured properties of an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProbedEndpoint {
    pub base_url: String,
    pub model: String,
    /// Time of the probe, RFC 3339 in UTC.
    pub probed_at: String,
    /// Number of requests sent by the probe.
    pub requests: u32,
    /// Model name as reported by the endpoint.
    pub reported_model: String,
    /// Field of the token limit in the plain prompt that was answered. The probe tries the configured field first.
    pub max_tokens_field: Option<MaxTokensField>,
    pub logprobs: LogprobsOffer,
    /// True if the reply to a plain prompt contained the usage.
    pub reports_usage: bool,
    /// True if the reply to a plain prompt contains or bills reasoning, or has no text within the token limit.
    pub thinks: bool,
    /// True if a request with `n = 2` returns two choices; `None` if the endpoint refuses `n`.
    pub several_choices: Option<bool>,
    /// Result for `seed`: the same seed gives the same answer.
    pub seed: Finding,
    /// Result for `response_format` with a JSON schema.
    pub structured: Finding,
    /// Result for vLLM's `prompt_logprobs`, which returns the logprobs of a given text.
    #[serde(skip_serializing_if = "Finding::is_unknown")]
    pub prompt_logprobs: Finding,
    /// Refused parameters, with the endpoint's error messages.
    pub refused: BTreeMap<String, String>,
    /// Limits in the reply headers, such as `requests 60/min`.
    pub limits: Vec<String>,
    /// Status and JSON shape of an error reply.
    pub error_shape: String,
}

/// Logprobs that an endpoint returns.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogprobsOffer {
    /// Largest number of alternatives returned; 0 if there are no logprobs.
    pub largest_k: u32,
    pub kind: LogprobsKind,
    pub bytes: TokenBytes,
    /// True if the reply contains token ids.
    pub token_ids: bool,
}

/// Stage at which logprobs are computed: before (raw) or after (tempered) the temperature is applied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogprobsKind {
    Raw,
    Tempered,
    #[default]
    Unknown,
}

/// Whether the token bytes spell the answer, including its non-ASCII characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenBytes {
    Right,
    Wrong,
    /// The endpoint sends no bytes, but the token texts spell the answer.
    Absent,
    #[default]
    Unknown,
}

/// Result of testing one parameter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The parameter has its documented effect.
    Works,
    /// The parameter is accepted without effect.
    Ignored,
    /// The endpoint refuses a request with the parameter.
    Refused,
    /// The test was inconclusive, or has not run.
    #[default]
    Unknown,
}

impl Finding {
    fn is_unknown(&self) -> bool {
        *self == Finding::Unknown
    }
}

/// Returns the path of `endpoint.json`.
pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("endpoint.json")
}

/// Reads the findings of the run folder. Returns None if the file does not exist or has another version.
///
/// # Errors
/// [`Exit::Usage`] if the file is damaged.
pub fn load(run_dir: &Path) -> Result<Option<ProbedEndpoints>> {
    let path = file(run_dir);
    if !path.exists() {
        return Ok(None);
    }
    let text = crate::fs::read_to_string(&path)?;
    let endpoints: ProbedEndpoints = serde_json::from_str(&text).map_err(|error| {
        Exit::Usage(format!(
            "{} is damaged ({error}): rerun `distill probe`, or delete the file",
            path.display()
        ))
    })?;
    Ok(Some(endpoints).filter(|endpoints| endpoints.version == ENDPOINT_VERSION))
}

impl ProbedEndpoints {
    /// Returns the findings about the endpoint and model of `config`.
    pub fn find(&self, config: &EndpointConfig) -> Option<&ProbedEndpoint> {
        let base_url = crate::config::teacher::identity(&config.teacher);
        self.endpoints.iter().find(|endpoint| {
            endpoint.base_url == base_url && endpoint.model == config.teacher.model
        })
    }
}

impl ProbedEndpoint {
    /// Returns the BLAKE3 hash of the findings in hex, without the time and the number of requests. Each record stores
    /// the hash.
    pub fn hash(&self) -> Result<String> {
        let findings = ProbedEndpoint {
            probed_at: String::new(),
            requests: 0,
            ..self.clone()
        };
        Ok(blake3::hash(&serde_json::to_vec(&findings)?)
            .to_hex()
            .to_string())
    }

    /// Compares the config with the findings. Returns warnings.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the endpoint would refuse the requests or return unusable answers.
    pub fn check(&self, config: &EndpointConfig) -> Result<Vec<String>> {
        let sampling = &config.sampling;
        let label = config.teacher.label();
        let refuse = |message: String| -> Result<Vec<String>> {
            Err(Exit::Usage(format!(
                "{message} (found by `distill probe` at {}; rerun it if the endpoint has changed)",
                self.probed_at
            ))
            .into())
        };
        let mut warnings = Vec::new();
        let max_tokens_field = sampling.max_tokens_field;
        for (parameter, reason) in &self.refused {
            if parameter == max_tokens_field.name() {
                return refuse(format!(
                    "{label} refuses `{parameter}` ({reason}): set `sampling.max_tokens_field` = \"{}\"",
                    max_tokens_field.other().name()
                ));
            }
            if is_sent(parameter, config) {
                return refuse(format!(
                    "{label} refuses `{parameter}` ({reason}): do not set it in `[sampling]`"
                ));
            }
        }
        if self.thinks && !sampling.reasoning {
            warnings.push(format!(
                "{label} is a reasoning model: set `sampling.reasoning` = true, and increase \
                 `sampling.max_tokens` for its reasoning"
            ));
        }
        if sampling.top_logprobs == 0 || sampling.reasoning {
            return Ok(warnings);
        }
        let offer = &self.logprobs;
        if offer.largest_k == 0 {
            return refuse(format!(
                "{label} returns no logprobs: set `sampling.top_logprobs` = 0, and train with \
                 `loss.kd` = \"none\""
            ));
        }
        if offer.largest_k < sampling.top_logprobs {
            warnings.push(format!(
                "{label} returns {} logprobs per token, not {}",
                offer.largest_k, sampling.top_logprobs
            ));
        }
        let temperature = sampling.temperature.unwrap_or(1.0);
        if offer.kind == LogprobsKind::Tempered && changes_distribution(temperature) {
            return refuse(format!(
                "{label} returns logprobs after applying the temperature, and at {temperature} they are not \
                 valid soft labels: set `sampling.temperature` = 1.0, or `sampling.top_logprobs` = 0"
            ));
        }
        if offer.bytes == TokenBytes::Wrong {
            warnings.push(format!(
                "{label} sends tokens that do not spell its non-ASCII answers: such answers are \
                 trained on with cross-entropy only"
            ));
        }
        Ok(warnings)
    }
}

/// Returns a warning if the config may give invalid soft labels and the endpoint was not probed.
pub(crate) fn check_unprobed(config: &EndpointConfig) -> Option<String> {
    let sampling = &config.sampling;
    let temperature = sampling.temperature.unwrap_or(1.0);
    let has_logprobs = sampling.top_logprobs > 0 && !sampling.reasoning;
    (has_logprobs && changes_distribution(temperature)).then(|| {
        format!(
            "logprobs are requested at temperature {temperature}, and some endpoints return them after \
             applying the temperature: run `distill probe` first, or set `sampling.temperature` = 1.0"
        )
    })
}

/// Returns true if the temperature is not 1, apart from rounding errors.
fn changes_distribution(temperature: f64) -> bool {
    (temperature - 1.0).abs() > 1e-9
}

/// Returns true if requests of `config` contain the parameter.
fn is_sent(parameter: &str, config: &EndpointConfig) -> bool {
    let sampling = &config.sampling;
    let is_plain = !sampling.reasoning;
    sampling.extra.contains_key(parameter)
        || match parameter {
            "temperature" => is_plain && sampling.temperature.is_some(),
            "top_p" => is_plain && sampling.top_p.is_some(),
            "stop" => is_plain && !sampling.stop.is_empty(),
            "seed" => sampling.seed.is_some(),
            "response_format" => sampling.schema.is_some(),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SamplingConfig, TeacherConfig};

    fn config(change: impl FnOnce(&mut SamplingConfig)) -> EndpointConfig {
        let mut sampling = SamplingConfig::default();
        change(&mut sampling);
        EndpointConfig {
            teacher: TeacherConfig {
                model: "m".into(),
                ..TeacherConfig::default()
            },
            sampling,
            limits: Default::default(),
            price: Default::default(),
        }
    }

    /// Findings that a config with the default sampling fits.
    fn good() -> ProbedEndpoint {
        ProbedEndpoint {
            logprobs: LogprobsOffer {
                largest_k: 20,
                kind: LogprobsKind::Tempered,
                bytes: TokenBytes::Right,
                token_ids: false,
            },
            max_tokens_field: Some(MaxTokensField::MaxCompletionTokens),
            ..ProbedEndpoint::default()
        }
    }

    #[track_caller]
    fn assert_refused(endpoint: &ProbedEndpoint, config: &EndpointConfig, part: &str) {
        let error = endpoint.check(config).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(Exit::code_of(&error), 2);
    }

    #[test]
    fn config_that_the_endpoint_does_not_support_is_rejected() {
        assert_eq!(good().check(&config(|_| {})).unwrap(), [""; 0]);
        assert_refused(
            &good(),
            &config(|sampling| sampling.temperature = Some(0.2)),
            "`sampling.temperature` = 1.0",
        );
        let raw = ProbedEndpoint {
            logprobs: LogprobsOffer {
                kind: LogprobsKind::Raw,
                ..good().logprobs
            },
            ..good()
        };
        assert_eq!(
            raw.check(&config(|sampling| sampling.temperature = Some(0.2)))
                .unwrap(),
            [""; 0]
        );
        let without_logprobs = ProbedEndpoint {
            logprobs: LogprobsOffer::default(),
            ..good()
        };
        assert_refused(&without_logprobs, &config(|_| {}), "returns no logprobs");
        assert!(
            without_logprobs
                .check(&config(|sampling| sampling.top_logprobs = 0))
                .is_ok()
        );
        let old_field = config(|sampling| sampling.max_tokens_field = MaxTokensField::MaxTokens);
        // The probe did not try the old field.
        assert!(good().check(&old_field).is_ok());
        let mut without_old_field = good();
        without_old_field
            .refused
            .insert("max_tokens".into(), "no".into());
        assert_refused(
            &without_old_field,
            &old_field,
            "refuses `max_tokens` (no): set `sampling.max_tokens_field` = \"max_completion_tokens\"",
        );
        assert!(without_old_field.check(&config(|_| {})).is_ok());
        let mut without_seed = good();
        without_seed.refused.insert("seed".into(), "no".into());
        assert!(without_seed.check(&config(|_| {})).is_ok());
        assert_refused(
            &without_seed,
            &config(|sampling| sampling.seed = Some(1)),
            "refuses `seed` (no)",
        );
    }

    #[test]
    fn reduced_support_is_a_warning() {
        let mut endpoint = good();
        endpoint.logprobs.largest_k = 5;
        endpoint.logprobs.bytes = TokenBytes::Wrong;
        endpoint.thinks = true;
        let warnings = endpoint.check(&config(|_| {})).unwrap();
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(check_unprobed(&config(|sampling| sampling.temperature = Some(0.2))).is_some());
        assert!(check_unprobed(&config(|_| {})).is_none());
    }

    #[test]
    fn hash_ignores_the_time_and_request_count() {
        let later = ProbedEndpoint {
            probed_at: "2026-11-22T00:00:00Z".into(),
            requests: 20,
            ..good()
        };
        assert_eq!(later.hash().unwrap(), good().hash().unwrap());
        assert_ne!(
            later.hash().unwrap(),
            ProbedEndpoint::default().hash().unwrap()
        );
    }
}
