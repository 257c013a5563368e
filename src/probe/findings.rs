//! What `distill probe` found out about an endpoint, and what follows for a config. Pure, but for
//! the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::config::{EndpointConfig, MaxTokensField};
use crate::exit::Exit;

/// The version of the file, and of what `distill probe --json` prints.
pub const ENDPOINT_VERSION: u32 = 1;

/// `endpoint.json` in the run folder: every endpoint of the config, as it was when it was probed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbedEndpoints {
    pub version: u32,
    pub endpoints: Vec<ProbedEndpoint>,
}

/// What an endpoint does, as measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProbedEndpoint {
    pub base_url: String,
    pub model: String,
    /// RFC 3339, in UTC.
    pub probed_at: String,
    /// Requests that it took to find out.
    pub requests: u32,
    /// The model's name as the endpoint reports it.
    pub reported_model: String,
    pub max_tokens_field: Option<MaxTokensField>,
    pub logprobs: LogprobsOffer,
    pub reports_usage: bool,
    /// The model thinks before it answers, at a price.
    pub thinks: bool,
    /// `n = 2` brings two choices.
    pub several_choices: Option<bool>,
    pub seed: Finding,
    pub structured: Finding,
    /// Are the logprobs of a text told that is given, by vLLM's `prompt_logprobs`?
    #[serde(skip_serializing_if = "Finding::is_unknown")]
    pub prompt_logprobs: Finding,
    /// Parameters that bring a refusal, with the endpoint's words.
    pub refused: BTreeMap<String, String>,
    /// What its headers call limits: `requests 60/min`.
    pub limits: Vec<String>,
    pub error_shape: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogprobsOffer {
    /// The most alternatives that came; 0 where logprobs do not come.
    pub largest_k: u32,
    pub kind: LogprobsKind,
    pub bytes: TokenBytes,
    pub token_ids: bool,
}

/// Are logprobs those of the model, or those after the temperature?
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogprobsKind {
    Raw,
    Tempered,
    #[default]
    Unknown,
}

/// Do the bytes of the tokens make up the answer, emoji and all?
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenBytes {
    Right,
    Wrong,
    /// None are sent; the texts of the tokens make up the answer.
    Absent,
    #[default]
    Unknown,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// It does what its name says.
    Works,
    /// It is accepted, and nothing comes of it.
    Ignored,
    Refused,
    #[default]
    Unknown,
}

impl Finding {
    fn is_unknown(&self) -> bool {
        *self == Finding::Unknown
    }
}

pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("endpoint.json")
}

/// What is known of the endpoints of this run folder.
///
/// # Errors
/// [`Exit::Usage`] where the file cannot be read.
pub fn load(run_dir: &Path) -> Result<Option<ProbedEndpoints>> {
    let path = file(run_dir);
    if !path.exists() {
        return Ok(None);
    }
    let text = crate::fs::read_to_string(&path)?;
    let endpoints: ProbedEndpoints = serde_json::from_str(&text).map_err(|error| {
        Exit::Usage(format!(
            "{} is damaged ({error}): run `distill probe` again, or delete it",
            path.display()
        ))
    })?;
    Ok(Some(endpoints).filter(|endpoints| endpoints.version == ENDPOINT_VERSION))
}

impl ProbedEndpoints {
    /// What is known of the endpoint that this lane asks.
    pub fn find(&self, lane: &EndpointConfig) -> Option<&ProbedEndpoint> {
        let base_url = crate::config::teacher::identity(&lane.teacher);
        self.endpoints
            .iter()
            .find(|endpoint| endpoint.base_url == base_url && endpoint.model == lane.teacher.model)
    }
}

impl ProbedEndpoint {
    /// BLAKE3, in hex, of what was found: records carry it.
    pub fn hash(&self) -> Result<String> {
        let found = ProbedEndpoint {
            probed_at: String::new(),
            requests: 0,
            ..self.clone()
        };
        Ok(blake3::hash(&serde_json::to_vec(&found)?)
            .to_hex()
            .to_string())
    }

    /// Compares what the config asks for with what the endpoint does. Returns warnings.
    ///
    /// # Errors
    /// [`Exit::Usage`] where asking would be money for nothing.
    pub fn check(&self, lane: &EndpointConfig) -> Result<Vec<String>> {
        let sampling = &lane.sampling;
        let label = lane.teacher.label();
        let refuse = |message: String| -> Result<Vec<String>> {
            Err(Exit::Usage(format!(
                "{message} (by `distill probe` of {}; run it again if the endpoint has changed)",
                self.probed_at
            ))
            .into())
        };
        let mut warnings = Vec::new();
        for (parameter, words) in &self.refused {
            if is_sent(parameter, lane) {
                return refuse(format!(
                    "{label} refuses `{parameter}` ({words}): do not set it in `[sampling]`"
                ));
            }
        }
        if let Some(field) = self.max_tokens_field
            && field != sampling.max_tokens_field
        {
            return refuse(format!(
                "{label} refuses `{}`: set `sampling.max_tokens_field` = \"{}\"",
                sampling.max_tokens_field.name(),
                field.name()
            ));
        }
        if self.thinks && !sampling.reasoning {
            warnings.push(format!(
                "{label} thinks before it answers: set `sampling.reasoning` = true, and leave room \
                 in `sampling.max_tokens`"
            ));
        }
        if sampling.top_logprobs == 0 || sampling.reasoning {
            return Ok(warnings);
        }
        let offer = &self.logprobs;
        if offer.largest_k == 0 {
            return refuse(format!(
                "{label} offers no logprobs: set `sampling.top_logprobs` = 0, and train with \
                 `loss.kd` = \"none\""
            ));
        }
        if offer.largest_k < sampling.top_logprobs {
            warnings.push(format!(
                "{label} offers {} logprobs a token, not {}",
                offer.largest_k, sampling.top_logprobs
            ));
        }
        let temperature = sampling.temperature.unwrap_or(1.0);
        if offer.kind == LogprobsKind::Tempered && (temperature - 1.0).abs() > 1e-9 {
            return refuse(format!(
                "{label} returns logprobs after the temperature, and those at {temperature} are no \
                 soft labels of the model: set `sampling.temperature` = 1.0, or \
                 `sampling.top_logprobs` = 0"
            ));
        }
        if offer.bytes == TokenBytes::Wrong {
            warnings.push(format!(
                "{label} sends token bytes that do not make up its answers where these are not \
                 ASCII: such answers train on cross-entropy alone"
            ));
        }
        Ok(warnings)
    }
}

/// What can be said of soft labels without a probe.
pub fn check_unprobed(lane: &EndpointConfig) -> Option<String> {
    let sampling = &lane.sampling;
    let temperature = sampling.temperature.unwrap_or(1.0);
    let asks = sampling.top_logprobs > 0 && !sampling.reasoning;
    (asks && (temperature - 1.0).abs() > 1e-9).then(|| {
        format!(
            "logprobs are asked for at temperature {temperature}, and some endpoints return them \
             after the temperature: run `distill probe` first, or set `sampling.temperature` = 1.0"
        )
    })
}

fn is_sent(parameter: &str, lane: &EndpointConfig) -> bool {
    let sampling = &lane.sampling;
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

    fn lane(change: impl FnOnce(&mut SamplingConfig)) -> EndpointConfig {
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
    fn refused(endpoint: &ProbedEndpoint, lane: &EndpointConfig, part: &str) {
        let error = endpoint.check(lane).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(Exit::code_of(&error), 2);
    }

    #[test]
    fn what_an_endpoint_does_not_do_is_refused_before_it_is_paid_for() {
        assert_eq!(good().check(&lane(|_| {})).unwrap(), [""; 0]);
        refused(
            &good(),
            &lane(|sampling| sampling.temperature = Some(0.2)),
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
            raw.check(&lane(|sampling| sampling.temperature = Some(0.2)))
                .unwrap(),
            [""; 0]
        );
        let without = ProbedEndpoint {
            logprobs: LogprobsOffer::default(),
            ..good()
        };
        refused(&without, &lane(|_| {}), "offers no logprobs");
        assert!(
            without
                .check(&lane(|sampling| sampling.top_logprobs = 0))
                .is_ok()
        );
        refused(
            &good(),
            &lane(|sampling| sampling.max_tokens_field = MaxTokensField::MaxTokens),
            "\"max_completion_tokens\"",
        );
        let mut strict = good();
        strict.refused.insert("seed".into(), "no".into());
        assert!(strict.check(&lane(|_| {})).is_ok());
        refused(
            &strict,
            &lane(|sampling| sampling.seed = Some(1)),
            "refuses `seed` (no)",
        );
    }

    #[test]
    fn what_is_only_less_is_a_warning() {
        let mut endpoint = good();
        endpoint.logprobs.largest_k = 5;
        endpoint.logprobs.bytes = TokenBytes::Wrong;
        endpoint.thinks = true;
        let warnings = endpoint.check(&lane(|_| {})).unwrap();
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(check_unprobed(&lane(|sampling| sampling.temperature = Some(0.2))).is_some());
        assert!(check_unprobed(&lane(|_| {})).is_none());
    }

    #[test]
    fn the_hash_is_that_of_what_was_found() {
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
