//! `distill probe`: about twenty cheap requests that find out what an endpoint really does.

pub mod findings;
pub(crate) mod question;

use crate::probe::question::Probe;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::budget::account::Account;
use crate::budget::ledger::LedgerFiles;
use crate::client::response::completion::Completion;
use crate::client::response::error::ApiError;
use crate::client::response::json;
use crate::client::transport::{HttpReply, Transport};
use crate::config::{EndpointConfig, MaxTokensField};
use crate::probe::findings::{Finding, LogprobsKind, ProbedEndpoint, TokenBytes};
use crate::probe::question::ProbeOutcome;
use crate::rate_limit::headers;
use crate::rate_limit::headers::Refill;

/// Tokens of an answer; a thinking model is given more.
const SHORT: u32 = 24;
const ROOM_TO_THINK: u32 = 512;

/// For the whole of [`WIDE`], a token for each byte.
const ENOUGH_FOR_WIDE: u32 = 100;

/// The prompt whose first token has many likely values.
const OPEN: &str = "Write ten random words, in no order, separated by spaces.";

/// Characters of two, three and four bytes, which tokenizers cut in the middle.
const WIDE: &str = "Repeat exactly, and write nothing else: 😀 naïve 漢字 👩‍👩‍👧 Ω≈ç";

/// Finds out what the endpoint of `lane` does.
///
/// # Errors
/// Where it does not answer a plain question, and where a question does not fit the budget.
pub async fn run(
    lane: EndpointConfig,
    transport: Arc<dyn Transport>,
    account: &mut Account<LedgerFiles>,
    now: Timestamp,
) -> Result<ProbedEndpoint> {
    let found = ProbedEndpoint {
        base_url: crate::config::teacher::identity(&lane.teacher).into(),
        model: lane.teacher.model.clone(),
        probed_at: format!("{now:.0}"),
        ..ProbedEndpoint::default()
    };
    let mut probe = Probe {
        lane,
        transport,
        account,
        found,
        max_tokens: SHORT,
        has_answered: false,
    };
    probe.plain_question().await?;
    probe.logprobs().await?;
    probe.parameters().await?;
    probe.seed().await?;
    probe.structured().await?;
    probe.given_text().await?;
    probe.error_shape().await?;
    Ok(probe.found)
}

impl Probe<'_> {
    /// A plain question with the one field that must be right, and what its answer tells.
    async fn plain_question(&mut self) -> Result<()> {
        let first = self.lane.sampling.max_tokens_field;
        let other = match first {
            MaxTokensField::MaxTokens => MaxTokensField::MaxCompletionTokens,
            MaxTokensField::MaxCompletionTokens => MaxTokensField::MaxTokens,
        };
        let mut words = String::new();
        for field in [first, other] {
            self.found.max_tokens_field = Some(field);
            match self.ask("Say hello.", |_| {}).await? {
                ProbeOutcome::Answer(completion, reply) => {
                    self.learn_from(&completion, &reply);
                    return Ok(());
                }
                ProbeOutcome::Refused(message, _) => words = message,
            }
        }
        Err(anyhow!("the endpoint refuses a plain question: {words}"))
    }

    fn learn_from(&mut self, completion: &Completion, reply: &HttpReply) {
        let found = &mut self.found;
        found.reported_model = completion.model.clone();
        found.reports_usage = completion.usage.is_some();
        let hidden = completion
            .usage
            .is_some_and(|usage| usage.reasoning_tokens > 0);
        let is_empty = completion.answer.text.is_empty() && completion.answer.refusal.is_empty();
        found.thinks = hidden || !completion.answer.reasoning.is_empty() || is_empty;
        if found.thinks {
            self.max_tokens = ROOM_TO_THINK;
        }
        let reports = headers::parse(&reply.headers, std::time::SystemTime::UNIX_EPOCH);
        found.limits = reports
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
        found.limits.sort();
    }

    async fn logprobs(&mut self) -> Result<()> {
        for k in [20, 8, 5, 1] {
            let asked = self.ask(OPEN, |body| with_logprobs(body, k, 1.0)).await?;
            match asked {
                ProbeOutcome::Refused(words, _) => {
                    self.found.refused.insert("logprobs".into(), words);
                }
                ProbeOutcome::Answer(warm, reply) => {
                    self.found.refused.remove("logprobs");
                    self.learn_logprobs(&warm, &reply);
                    if self.found.logprobs.largest_k > 0 {
                        self.temper(k, &warm).await?;
                        self.wide_characters(k).await?;
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn learn_logprobs(&mut self, completion: &Completion, reply: &HttpReply) {
        let Some(logprobs) = &completion.logprobs else {
            return;
        };
        let offer = &mut self.found.logprobs;
        let most = logprobs.top.iter().map(Vec::len).max().unwrap_or(0);
        offer.largest_k = most as u32;
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

    /// Asks the same at half the temperature: logprobs after the temperature are then twice as far
    /// apart.
    async fn temper(&mut self, k: u32, warm: &Completion) -> Result<()> {
        let ProbeOutcome::Answer(cool, _) =
            self.ask(OPEN, |body| with_logprobs(body, k, 0.5)).await?
        else {
            return Ok(());
        };
        let first = |completion: &Completion| -> Vec<(String, f32)> {
            let Some(logprobs) = &completion.logprobs else {
                return Vec::new();
            };
            let tokens = logprobs.top.first().into_iter().flatten().cloned();
            let values = logprobs.top_logprob.first().into_iter().flatten();
            let known = tokens.zip(values).filter(|(token, _)| !token.is_empty());
            known
                .filter_map(|(token, value)| Some((token, (*value)?)))
                .collect()
        };
        let (warm, cool) = (first(warm), first(&cool));
        let mut ratios: Vec<f32> = warm
            .iter()
            .skip(1)
            .filter_map(|(token, value)| {
                let gap = warm[0].1 - value;
                let same = |wanted: &str| cool.iter().find(|(other, _)| other == wanted);
                let cool_gap = same(&warm[0].0)?.1 - same(token)?.1;
                (gap > 0.05).then_some(cool_gap / gap)
            })
            .collect();
        ratios.sort_by(f32::total_cmp);
        self.found.logprobs.kind = match ratios.get(ratios.len() / 2) {
            Some(0.8..=1.25) => LogprobsKind::Raw,
            Some(1.6..=2.5) => LogprobsKind::Tempered,
            _ => LogprobsKind::Unknown,
        };
        Ok(())
    }

    async fn wide_characters(&mut self, k: u32) -> Result<()> {
        let before = self.max_tokens;
        self.max_tokens = before.max(ENOUGH_FOR_WIDE);
        let asked = self
            .ask(WIDE, |body| with_logprobs(body, k.min(2), 1.0))
            .await?;
        self.max_tokens = before;
        let ProbeOutcome::Answer(completion, reply) = asked else {
            return Ok(());
        };
        let Some(logprobs) = &completion.logprobs else {
            return Ok(());
        };
        let body = json::value(&reply.body).unwrap_or_default();
        let position = body.pointer("/choices/0/logprobs/content/0");
        let has_bytes = position.is_some_and(|position| position["bytes"].is_array());
        self.found.logprobs.bytes = match (logprobs.matches_text, has_bytes) {
            // An answer without a single wide character shows nothing.
            _ if completion.answer.text.is_ascii() => TokenBytes::Unknown,
            (true, true) => TokenBytes::Right,
            (true, false) => TokenBytes::Absent,
            (false, _) => TokenBytes::Wrong,
        };
        Ok(())
    }

    /// Each parameter alone.
    async fn parameters(&mut self) -> Result<()> {
        for (name, value) in [
            ("temperature", json!(0.7)),
            ("top_p", json!(0.9)),
            ("stop", json!(["\n\n"])),
            ("presence_penalty", json!(0.1)),
            ("n", json!(2)),
        ] {
            let asked = self
                .ask("Say hello.", |body| {
                    body.insert(name.into(), value);
                })
                .await?;
            match asked {
                ProbeOutcome::Refused(words, _) => {
                    self.found.refused.insert(name.into(), words);
                }
                ProbeOutcome::Answer(_, reply) if name == "n" => {
                    let body = json::value(&reply.body).unwrap_or_default();
                    let choices = body["choices"].as_array().map_or(0, Vec::len);
                    self.found.several_choices = Some(choices == 2);
                }
                ProbeOutcome::Answer(..) => {}
            }
        }
        Ok(())
    }

    /// The same seed twice, and another one.
    async fn seed(&mut self) -> Result<()> {
        let mut texts = Vec::new();
        for seed in [7, 7, 8] {
            let asked = self
                .ask(OPEN, |body| {
                    body.insert("seed".into(), json!(seed));
                })
                .await?;
            match asked {
                ProbeOutcome::Answer(completion, _) => texts.push(completion.answer.text),
                ProbeOutcome::Refused(words, _) => {
                    self.found.refused.insert("seed".into(), words);
                    self.found.seed = Finding::Refused;
                    return Ok(());
                }
            }
        }
        self.found.seed = match (texts[0] == texts[1], texts[1] == texts[2]) {
            (true, false) => Finding::Works,
            // A model that always says the same shows nothing.
            (true, true) => Finding::Unknown,
            (false, _) => Finding::Ignored,
        };
        Ok(())
    }

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
        let asked = self
            .ask("What is the capital of France?", |body| {
                body.insert("response_format".into(), format);
            })
            .await?;
        self.found.structured = match asked {
            ProbeOutcome::Refused(words, _) => {
                self.found.refused.insert("response_format".into(), words);
                Finding::Refused
            }
            ProbeOutcome::Answer(completion, _) => {
                let answer = serde_json::from_str::<Value>(&completion.answer.text);
                match answer.is_ok_and(|answer| answer["answer"].is_string()) {
                    true => Finding::Works,
                    false if completion.answer.finish_reason == "length" => Finding::Unknown,
                    false => Finding::Ignored,
                }
            }
        };
        Ok(())
    }

    /// Does it say what a text that is given is worth?
    async fn given_text(&mut self) -> Result<()> {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let messages = [message("user", "Say hello."), message("assistant", "Hello")];
        let asked = self
            .ask("", |body| {
                body.insert("messages".into(), json!(messages));
                body.insert("prompt_logprobs".into(), json!(1));
                body.insert("add_generation_prompt".into(), json!(false));
                body.insert("continue_final_message".into(), json!(true));
            })
            .await?;
        self.found.prompt_logprobs = match asked {
            ProbeOutcome::Refused(..) => Finding::Refused,
            ProbeOutcome::Answer(completion, _) => {
                let told = completion.extra.get("prompt_logprobs");
                match told
                    .and_then(Value::as_array)
                    .is_some_and(|told| told.len() > 1)
                {
                    true => Finding::Works,
                    false => Finding::Ignored,
                }
            }
        };
        Ok(())
    }

    /// What a mistake of ours is answered with.
    async fn error_shape(&mut self) -> Result<()> {
        let asked = self
            .ask("Say hello.", |body| {
                body.insert("temperature".into(), json!("warm"));
            })
            .await?;
        self.found.error_shape = match asked {
            ProbeOutcome::Answer(..) => "none: a wrong type is accepted".into(),
            ProbeOutcome::Refused(_, None) => "no reply".into(),
            ProbeOutcome::Refused(_, Some(reply)) => shape(&reply),
        };
        Ok(())
    }
}

fn with_logprobs(body: &mut Map<String, Value>, k: u32, temperature: f64) {
    body.insert("logprobs".into(), json!(true));
    body.insert("top_logprobs".into(), json!(k));
    // Some models refuse any temperature, the default one too.
    if temperature != 1.0 {
        body.insert("temperature".into(), json!(temperature));
    }
}

/// The shape of an error in words.
fn shape(reply: &HttpReply) -> String {
    let Ok(body) = json::value(&reply.body) else {
        let what = match reply.body.trim_ascii_start().starts_with(b"<") {
            true => "HTML",
            false => "text",
        };
        return format!("{}: {what}", reply.status);
    };
    let error = ApiError::parse(&reply.body);
    let code = match &body["error"]["code"] {
        Value::Number(_) => "an integer code",
        Value::String(_) => "a code",
        _ => "no code",
    };
    let kind = match error.kind.is_empty() {
        true => "no type",
        false => "a type",
    };
    match body["error"].is_object() {
        true => format!("{}: error object with {code} and {kind}", reply.status),
        false => format!("{}: JSON without an error object", reply.status),
    }
}
