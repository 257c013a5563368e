//! `distill probe`: determines the capabilities of an endpoint with 11 to 19 cheap requests, not counting retries.
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | the tests of a probe, in order |
//! | `question` | one request: budget, retries, outcome |
//! | `findings` | `endpoint.json`, and checks of a config against it |
//!
//! Invariants:
//! - Each request reserves its maximum cost in the budget before it is sent, and settles the reservation after the
//!   reply.
//! - After the first answer, a refusal or a lasting error is a finding and does not end the probe.
//! - Probe requests do not use the config's sampling settings, except for `sampling.max_tokens_field`.
//! - Records that `harvest` writes after a probe contain the hash of its findings.

pub mod findings;
pub(crate) mod question;

use std::sync::Arc;

use anyhow::{Result, anyhow};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::budget::account::Account;
use crate::budget::ledger::LedgerFiles;
use crate::cache::record::is_truncated;
use crate::client::response::completion::Completion;
use crate::client::response::error::ApiError;
use crate::client::response::json;
use crate::client::transport::{HttpReply, Transport};
use crate::config::EndpointConfig;
use crate::probe::findings::{Finding, LogprobsKind, ProbedEndpoint, TokenBytes};
use crate::probe::question::{Probe, ProbeOutcome};
use crate::rate_limit::headers::{self, Refill};

/// Maximum number of tokens of an answer.
const SHORT_ANSWER: u32 = 24;

/// Maximum number of tokens of an answer of a reasoning model.
const REASONING_ANSWER: u32 = 512;

/// Maximum number of tokens of the answer to [`NON_ASCII`], more than one for each byte.
const NON_ASCII_ANSWER: u32 = 100;

/// Numbers of alternatives to request, the largest first: the maxima of common servers.
const TOP_LOGPROBS: [u32; 4] = [20, 8, 5, 1];

/// Minimum gap between two logprobs at temperature 1. Smaller gaps are not compared with those at temperature 0.5.
const MIN_LOGPROB_GAP: f32 = 0.05;

/// Prompt whose answer has many likely first tokens.
const OPEN_ENDED: &str = "Write ten random words, in no order, separated by spaces.";

/// Prompt with characters of two, three and four bytes, which tokenizers may split.
const NON_ASCII: &str = "Repeat exactly, and write nothing else: 😀 naïve 漢字 👩‍👩‍👧 Ω≈ç";

/// Probes the endpoint of `config`.
///
/// # Errors
/// If the endpoint does not answer a plain prompt, throttles a request for several minutes, or the budget is exhausted.
pub async fn run(
    config: EndpointConfig,
    transport: Arc<dyn Transport>,
    account: &mut Account<LedgerFiles>,
    now: Timestamp,
) -> Result<ProbedEndpoint> {
    let findings = ProbedEndpoint {
        base_url: crate::config::teacher::identity(&config.teacher).into(),
        model: config.teacher.model.clone(),
        probed_at: format!("{now:.0}"),
        ..ProbedEndpoint::default()
    };
    let mut probe = Probe {
        config,
        transport,
        account,
        findings,
        max_tokens: SHORT_ANSWER,
        has_answered: false,
    };
    probe.plain_prompt().await?;
    probe.logprobs().await?;
    probe.parameters().await?;
    probe.seed().await?;
    probe.structured().await?;
    probe.prompt_logprobs().await?;
    probe.error_shape().await?;
    Ok(probe.findings)
}

impl Probe<'_> {
    /// Sends a plain prompt with each name of the token limit until one is accepted.
    async fn plain_prompt(&mut self) -> Result<()> {
        let first = self.config.sampling.max_tokens_field;
        let mut refusal = String::new();
        for field in [first, first.other()] {
            self.findings.max_tokens_field = Some(field);
            match self.send("Say hello.", |_| {}).await? {
                ProbeOutcome::Answer(completion, reply) => {
                    self.record_basics(&completion, &reply);
                    return Ok(());
                }
                ProbeOutcome::Refused(message, _) => {
                    self.findings
                        .refused
                        .insert(field.name().into(), message.clone());
                    refusal = message;
                }
            }
        }
        Err(anyhow!("the endpoint refuses a plain prompt: {refusal}"))
    }

    /// Records model name, usage, reasoning and rate limits of the first answer.
    fn record_basics(&mut self, completion: &Completion, reply: &HttpReply) {
        let findings = &mut self.findings;
        findings.reported_model = completion.model.clone();
        findings.reports_usage = completion.usage.is_some();
        let bills_reasoning = completion
            .usage
            .is_some_and(|usage| usage.reasoning_tokens > 0);
        let is_empty = completion.answer.text.is_empty() && completion.answer.refusal.is_empty();
        findings.thinks = bills_reasoning || !completion.answer.reasoning.is_empty() || is_empty;
        if findings.thinks {
            self.max_tokens = REASONING_ANSWER;
        }
        let reports = headers::parse(&reply.headers, std::time::SystemTime::UNIX_EPOCH);
        findings.limits = reports
            .iter()
            .map(|report| {
                let limit = report.limit.map_or("?".into(), |limit| limit.to_string());
                let period = match report.refill() {
                    Refill::Constant(period) => match period.as_secs() {
                        1 => "/s",
                        60 => "/min",
                        3_600 => "/h",
                        _ => "/day",
                    },
                    Refill::AtReset | Refill::Unknown => "",
                };
                format!("{} {limit}{period}", report.resource.name())
            })
            .collect();
        findings.limits.sort();
    }

    /// Requests logprobs with decreasing k until one is accepted.
    async fn logprobs(&mut self) -> Result<()> {
        for k in TOP_LOGPROBS {
            let outcome = self
                .send(OPEN_ENDED, |body| with_logprobs(body, k, 1.0))
                .await?;
            match outcome {
                ProbeOutcome::Refused(message, _) => {
                    self.findings.refused.insert("logprobs".into(), message);
                }
                ProbeOutcome::Answer(completion, reply) => {
                    self.findings.refused.remove("logprobs");
                    self.record_logprobs(&completion, &reply);
                    if self.findings.logprobs.largest_k > 0 {
                        self.logprobs_kind(k, &completion).await?;
                        self.token_bytes(k).await?;
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Records the number of alternatives, and whether token ids are returned.
    fn record_logprobs(&mut self, completion: &Completion, reply: &HttpReply) {
        let Some(logprobs) = &completion.logprobs else {
            return;
        };
        let offer = &mut self.findings.logprobs;
        let largest_k = logprobs.top.iter().map(Vec::len).max().unwrap_or(0);
        offer.largest_k = largest_k as u32;
        let position = json::value(&reply.body)
            .ok()
            .and_then(|body| body.pointer("/choices/0/logprobs/content/0").cloned());
        offer.token_ids = position.is_some_and(|position| {
            let ids = ["id", "token_id"];
            ids.iter().any(|name| position.get(name).is_some())
                || position["token"]
                    .as_str()
                    .is_some_and(|token| token.starts_with("token_id:"))
        });
    }

    /// Repeats the request of `at_1`, an answer at temperature 1, at temperature 0.5. If logprobs are computed after
    /// the temperature is applied, the differences between the alternatives to the first token double.
    async fn logprobs_kind(&mut self, k: u32, at_1: &Completion) -> Result<()> {
        let ProbeOutcome::Answer(at_half, _) = self
            .send(OPEN_ENDED, |body| with_logprobs(body, k, 0.5))
            .await?
        else {
            return Ok(());
        };
        let first_alternatives = |completion: &Completion| -> Vec<(String, f32)> {
            let Some(logprobs) = &completion.logprobs else {
                return Vec::new();
            };
            let tokens = logprobs.top.first().into_iter().flatten().cloned();
            let values = logprobs.top_logprob.first().into_iter().flatten();
            let alternatives = tokens.zip(values).filter(|(token, _)| !token.is_empty());
            alternatives
                .filter_map(|(token, value)| Some((token, (*value)?)))
                .collect()
        };
        let at_1 = first_alternatives(at_1);
        let at_half = first_alternatives(&at_half);
        let logprob_at_half = |token: &str| {
            let alternative = at_half.iter().find(|(other, _)| other == token)?;
            Some(alternative.1)
        };
        let mut ratios: Vec<f32> = at_1
            .iter()
            .skip(1)
            .filter_map(|(token, logprob)| {
                let (first_token, first_logprob) = &at_1[0];
                let gap = first_logprob - logprob;
                let gap_at_half = logprob_at_half(first_token)? - logprob_at_half(token)?;
                (gap > MIN_LOGPROB_GAP).then_some(gap_at_half / gap)
            })
            .collect();
        ratios.sort_by(f32::total_cmp);
        // The median ratio is 1 for raw and 2 for tempered logprobs, apart from rounding and noise.
        self.findings.logprobs.kind = match ratios.get(ratios.len() / 2) {
            Some(0.8..=1.25) => LogprobsKind::Raw,
            Some(1.6..=2.5) => LogprobsKind::Tempered,
            _ => LogprobsKind::Unknown,
        };
        Ok(())
    }

    /// Checks whether the token bytes of a non-ASCII answer spell it.
    async fn token_bytes(&mut self, k: u32) -> Result<()> {
        let max_tokens = self.max_tokens;
        self.max_tokens = max_tokens.max(NON_ASCII_ANSWER);
        let outcome = self
            .send(NON_ASCII, |body| with_logprobs(body, k.min(2), 1.0))
            .await?;
        self.max_tokens = max_tokens;
        let ProbeOutcome::Answer(completion, reply) = outcome else {
            return Ok(());
        };
        let Some(logprobs) = &completion.logprobs else {
            return Ok(());
        };
        let body = json::value(&reply.body).unwrap_or_default();
        let position = body.pointer("/choices/0/logprobs/content/0");
        let has_bytes = position.is_some_and(|position| position["bytes"].is_array());
        self.findings.logprobs.bytes = match (logprobs.matches_text, has_bytes) {
            // An ASCII answer is inconclusive.
            _ if completion.answer.text.is_ascii() => TokenBytes::Unknown,
            (true, true) => TokenBytes::Right,
            (true, false) => TokenBytes::Absent,
            (false, _) => TokenBytes::Wrong,
        };
        Ok(())
    }

    /// Tests each of several parameters in a request of its own.
    async fn parameters(&mut self) -> Result<()> {
        for (name, value) in [
            ("temperature", json!(0.7)),
            ("top_p", json!(0.9)),
            ("stop", json!(["\n\n"])),
            ("presence_penalty", json!(0.1)),
            ("n", json!(2)),
        ] {
            let outcome = self
                .send("Say hello.", |body| {
                    body.insert(name.into(), value);
                })
                .await?;
            match outcome {
                ProbeOutcome::Refused(message, _) => {
                    self.findings.refused.insert(name.into(), message);
                }
                ProbeOutcome::Answer(_, reply) if name == "n" => {
                    let body = json::value(&reply.body).unwrap_or_default();
                    let choices = body["choices"].as_array().map_or(0, Vec::len);
                    self.findings.several_choices = Some(choices == 2);
                }
                ProbeOutcome::Answer(..) => {}
            }
        }
        Ok(())
    }

    /// Sends one seed twice, and then another seed.
    async fn seed(&mut self) -> Result<()> {
        let mut texts = Vec::new();
        for seed in [7, 7, 8] {
            let outcome = self
                .send(OPEN_ENDED, |body| {
                    body.insert("seed".into(), json!(seed));
                })
                .await?;
            match outcome {
                ProbeOutcome::Answer(completion, _) => texts.push(completion.answer.text),
                ProbeOutcome::Refused(message, _) => {
                    self.findings.refused.insert("seed".into(), message);
                    self.findings.seed = Finding::Refused;
                    return Ok(());
                }
            }
        }
        self.findings.seed = match (texts[0] == texts[1], texts[1] == texts[2]) {
            (true, false) => Finding::Works,
            // A model that always gives the same answer is inconclusive.
            (true, true) => Finding::Unknown,
            (false, _) => Finding::Ignored,
        };
        Ok(())
    }

    /// Tests structured output with a small schema.
    async fn structured(&mut self) -> Result<()> {
        let schema = json!({
            "type": "object",
            "properties": {"answer": {"type": "string"}},
            "required": ["answer"],
            "additionalProperties": false,
        });
        let format = json!({
            "type": "json_schema",
            "json_schema": {"name": "probe", "schema": schema, "strict": true},
        });
        let outcome = self
            .send("What is the capital of France?", |body| {
                body.insert("response_format".into(), format);
            })
            .await?;
        self.findings.structured = match outcome {
            ProbeOutcome::Refused(message, _) => {
                self.findings
                    .refused
                    .insert("response_format".into(), message);
                Finding::Refused
            }
            ProbeOutcome::Answer(completion, _) => {
                let answer = serde_json::from_str::<Value>(&completion.answer.text);
                if answer.is_ok_and(|answer| answer["answer"].is_string()) {
                    Finding::Works
                } else if is_truncated(&completion.answer.finish_reason) {
                    Finding::Unknown
                } else {
                    Finding::Ignored
                }
            }
        };
        Ok(())
    }

    /// Tests vLLM's `prompt_logprobs` on a given text.
    async fn prompt_logprobs(&mut self) -> Result<()> {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let messages = [message("user", "Say hello."), message("assistant", "Hello")];
        let outcome = self
            .send("", |body| {
                body.insert("messages".into(), json!(messages));
                body.insert("prompt_logprobs".into(), json!(1));
                body.insert("add_generation_prompt".into(), json!(false));
                body.insert("continue_final_message".into(), json!(true));
            })
            .await?;
        self.findings.prompt_logprobs = match outcome {
            ProbeOutcome::Refused(..) => Finding::Refused,
            ProbeOutcome::Answer(completion, _) => {
                let positions = completion.extra.get("prompt_logprobs");
                let positions = positions.and_then(Value::as_array);
                if positions.is_some_and(|positions| positions.len() > 1) {
                    Finding::Works
                } else {
                    Finding::Ignored
                }
            }
        };
        Ok(())
    }

    /// Records the shape of the error reply to a request with a temperature of the wrong type.
    async fn error_shape(&mut self) -> Result<()> {
        let outcome = self
            .send("Say hello.", |body| {
                body.insert("temperature".into(), json!("warm"));
            })
            .await?;
        self.findings.error_shape = match outcome {
            ProbeOutcome::Answer(..) => "none: a wrong type is accepted".into(),
            ProbeOutcome::Refused(_, None) => "no reply".into(),
            ProbeOutcome::Refused(_, Some(reply)) => shape_of(&reply),
        };
        Ok(())
    }
}

/// Sets the request fields that ask for logprobs.
fn with_logprobs(body: &mut Map<String, Value>, k: u32, temperature: f64) {
    body.insert("logprobs".into(), json!(true));
    body.insert("top_logprobs".into(), json!(k));
    // Some models refuse any temperature, even the default.
    if temperature != 1.0 {
        body.insert("temperature".into(), json!(temperature));
    }
}

/// Describes the status and the JSON shape of an error reply.
fn shape_of(reply: &HttpReply) -> String {
    let Ok(body) = json::value(&reply.body) else {
        let is_html = reply.body.trim_ascii_start().starts_with(b"<");
        let format = if is_html { "HTML" } else { "text" };
        return format!("{}: {format}", reply.status);
    };
    let error = ApiError::parse(&reply.body);
    let code = match &body["error"]["code"] {
        Value::Number(_) => "an integer code",
        Value::String(_) => "a code",
        _ => "no code",
    };
    let kind = if error.kind.is_empty() {
        "no type"
    } else {
        "a type"
    };
    if body["error"].is_object() {
        format!("{}: error object with {code} and {kind}", reply.status)
    } else {
        format!("{}: JSON without an error object", reply.status)
    }
}
