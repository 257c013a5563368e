//! Scoring of existing answers: the request for the teacher's logprobs of a text, and the parser of the reply. Pure.
//!
//! Two APIs return these logprobs:
//! - vLLM's chat completions with `prompt_logprobs` return the most likely tokens at each position of the
//!   conversation. The server applies the chat template.
//! - Text completions with `echo` return the prompt and the logprobs of its tokens. The client applies the chat
//!   template.
//!
//! Both APIs generate at least one token, so one is requested and discarded.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::cache::record::{Answer, Logprobs};
use crate::client::response::completion::{Completion, NoAnswer};
use crate::client::response::error::{ApiError, is_error};
use crate::client::response::logprobs::{Logprob, LogprobColumns, TokenByteList, WireToken};
use crate::client::response::text::text;
use crate::client::response::{json, usage};
use crate::config::EndpointConfig;
use crate::data::align::token_ids;
use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;

/// API by which texts are scored, with the teacher's tokenizer.
pub enum ScoringMethod {
    /// vLLM's chat completions. Without a tokenizer, tokens are identified by their texts.
    PromptLogprobs(Option<Tokenizer>),
    /// Text completions with `echo`.
    Echo(Tokenizer),
}

impl ScoringMethod {
    fn tokenizer(&self) -> Option<&Tokenizer> {
        match self {
            Self::PromptLogprobs(tokenizer) => tokenizer.as_ref(),
            Self::Echo(tokenizer) => Some(tokenizer),
        }
    }

    /// Checks that the last of these messages can be scored.
    ///
    /// # Errors
    /// If the client applies the chat template and the template rejects the messages.
    pub fn check(&self, messages: &[Message]) -> anyhow::Result<()> {
        match self {
            Self::PromptLogprobs(_) => Ok(()),
            Self::Echo(tokenizer) => tokenizer.encode_continued(messages).map(|_| ()),
        }
    }

    /// Builds the body of the request that scores the last message. [`ScoringMethod::check`] must have accepted the
    /// messages.
    pub fn body(&self, endpoint: &EndpointConfig, messages: &[Message]) -> Value {
        let sampling = &endpoint.sampling;
        let mut body = Map::new();
        body.insert("model".into(), json!(endpoint.teacher.model));
        let top = json!(sampling.top_logprobs);
        match self {
            Self::Echo(tokenizer) => {
                let (ids, _) = tokenizer.encode_continued(messages).unwrap_or_default();
                body.insert("prompt".into(), json!(ids));
                body.insert("max_tokens".into(), json!(1));
                body.insert("echo".into(), json!(true));
                body.insert("logprobs".into(), top);
                body.insert("return_tokens_as_token_ids".into(), json!(true));
            }
            Self::PromptLogprobs(_) => {
                body.insert("messages".into(), json!(messages));
                body.insert(sampling.max_tokens_field.name().into(), json!(1));
                body.insert("prompt_logprobs".into(), top);
                body.insert("add_generation_prompt".into(), json!(false));
                body.insert("continue_final_message".into(), json!(true));
                body.insert("return_token_ids".into(), json!(true));
            }
        }
        body.extend(sampling.extra.clone());
        Value::Object(body)
    }

    /// Parses the reply to `body`. Returns the scored text as an answer, with its logprobs.
    pub fn parse_reply(
        &self,
        reply: &[u8],
        body: &Value,
        messages: &[Message],
    ) -> Result<Completion, NoAnswer> {
        let reply =
            json::value(reply).map_err(|problem| NoAnswer::Malformed(problem.to_string()))?;
        if is_error(&reply["error"]) {
            return Err(NoAnswer::error(ApiError::from_value(&reply["error"])));
        }
        let choice = &reply["choices"][0];
        if !choice.is_object() {
            return Err(NoAnswer::Malformed("the body contains no choice".into()));
        }
        let scored = messages.last().map_or("", |message| &message.content);
        let logprobs = match self {
            Self::Echo(_) => self.parse_echo(&choice["logprobs"], &body["prompt"], scored)?,
            Self::PromptLogprobs(_) => self.parse_prompt_logprobs(&reply, messages, scored)?,
        };
        let (usage, _) = usage::usage(reply["usage"].clone());
        let mismatch = "the teacher's tokens do not end with the answer";
        Ok(Completion {
            answer: Answer {
                text: scored.to_owned(),
                finish_reason: "stop".into(),
                ..Answer::default()
            },
            usage,
            model: text(&reply["model"]),
            fingerprint: text(&reply["system_fingerprint"]),
            logprobs_fault: logprobs.is_none().then(|| mismatch.into()),
            logprobs,
            ..Completion::default()
        })
    }

    /// Extracts the answer's logprobs from those of the whole conversation.
    fn parse_prompt_logprobs(
        &self,
        reply: &Value,
        messages: &[Message],
        answer: &str,
    ) -> Result<Option<Logprobs>, NoAnswer> {
        let Some(positions) = reply["prompt_logprobs"].as_array() else {
            return Err(missing_logprob(
                "no `prompt_logprobs`: it is not vLLM, or does not enable the field",
            ));
        };
        // The first position has no logprobs, since no token precedes it.
        let positions: Vec<&Map<String, Value>> =
            positions.iter().filter_map(Value::as_object).collect();
        let reported_ids = reply["prompt_token_ids"].as_array();
        let ids = self.final_token_ids(&positions, reported_ids, messages);
        let tokens = ids.iter().rev().zip(positions.iter().rev());
        let tokens_from_end = tokens.map(|(id, position)| {
            // vLLM includes the prompt's token even if it is not among the most likely tokens.
            let likeliest = position.iter().map(|(id, token)| self.token(id, token));
            Some((self.token(id, position.get(id)?), likeliest.collect()))
        });
        Ok(answer_logprobs(tokens_from_end, answer))
    }

    /// Returns the ids of the last tokens of the conversation.
    ///
    /// In order of preference: the ids that the server reports; the ids of the answer by the teacher's tokenizer; the
    /// first id of each position. Newer servers list the prompt's token first. Older servers sort by probability, so
    /// the first id may be wrong; [`answer_logprobs`] rejects tokens that do not spell the answer.
    fn final_token_ids(
        &self,
        positions: &[&Map<String, Value>],
        reported_ids: Option<&Vec<Value>>,
        messages: &[Message],
    ) -> Vec<String> {
        if let Some(ids) = reported_ids {
            return ids.iter().map(Value::to_string).collect();
        }
        let encoded = self
            .tokenizer()
            .map(|tokenizer| tokenizer.encode_continued(messages));
        match encoded {
            Some(Ok((ids, answer))) => ids[answer].iter().map(u32::to_string).collect(),
            _ => positions
                .iter()
                .map(|position| position.keys().next().cloned().unwrap_or_default())
                .collect(),
        }
    }

    /// Extracts the answer's logprobs from an echoed prompt that was sent as token ids.
    fn parse_echo(
        &self,
        logprobs: &Value,
        prompt_ids: &Value,
        answer: &str,
    ) -> Result<Option<Logprobs>, NoAnswer> {
        let list = |name: &str| logprobs[name].as_array();
        let (Some(names), Some(token_logprobs), Some(top)) =
            (list("tokens"), list("token_logprobs"), list("top_logprobs"))
        else {
            return Err(missing_logprob(
                "no logprobs of the prompt: it does not support `echo`, or not together with `logprobs`",
            ));
        };
        let count = prompt_ids.as_array().map_or(0, Vec::len);
        if names.len() < count || token_logprobs.len() < count || top.len() < count {
            return Err(missing_logprob("fewer tokens than the prompt has"));
        }
        let tokens_from_end = (0..count).rev().map(|position| {
            let name = names[position].as_str()?;
            let id = u32::try_from(prompt_ids[position].as_u64()?).ok()?;
            let token = self.wire_token(Some(id), name.into(), &token_logprobs[position]);
            let likeliest = top[position].as_object().into_iter().flatten();
            let likeliest = likeliest.map(|(name, logprob)| self.token_by_name(name, logprob));
            // The positions are shifted if the server added tokens to the prompt.
            name_matches(&token, id, name).then(|| (token, likeliest.collect()))
        });
        Ok(answer_logprobs(tokens_from_end, answer))
    }

    /// Returns a token of vLLM's `prompt_logprobs`, by its id if there is a tokenizer.
    fn token<'a>(&'a self, id: &str, token: &'a Value) -> WireToken<'a> {
        let text = token["decoded_token"].as_str().unwrap_or_default();
        self.wire_token(id.parse().ok(), text.into(), &token["logprob"])
    }

    /// Returns a token that is named by its text or by its id, as `token_id:N`.
    fn token_by_name<'a>(&'a self, name: &str, logprob: &Value) -> WireToken<'a> {
        let id = token_ids::parse(name.as_bytes());
        self.wire_token(id, name.to_owned().into(), logprob)
    }

    fn wire_token<'a>(
        &'a self,
        id: Option<u32>,
        text: Cow<'a, str>,
        logprob: &Value,
    ) -> WireToken<'a> {
        let identified = self.tokenizer().zip(id);
        let bytes = identified.and_then(|(tokenizer, id)| tokenizer.token_bytes(id));
        let token = match identified {
            // Control tokens have a name instead of bytes.
            Some((tokenizer, id)) if bytes.is_none() => tokenizer.token_name(id).into(),
            _ => text,
        };
        WireToken {
            token,
            logprob: logprob.as_f64().map(Logprob::from).unwrap_or_default(),
            bytes: bytes.map(TokenByteList::from),
            prob: None,
        }
    }
}

/// Returns true if `name` may denote this token. Names may lack leading white space, which SentencePiece's decoder
/// drops, and bytes of a split character.
fn name_matches(token: &WireToken, id: u32, name: &str) -> bool {
    if let Some(reported) = token_ids::parse(name.as_bytes()) {
        return reported == id;
    }
    let text = String::from_utf8_lossy(token.spelled());
    name.contains(char::REPLACEMENT_CHARACTER) || text.trim_start() == name.trim_start()
}

/// The token of a position, and the most likely tokens there.
type TokenWithAlternatives<'a> = (WireToken<'a>, Vec<WireToken<'a>>);

/// Returns the logprobs of the answer that ends a conversation. `tokens_from_end` yields the conversation's tokens,
/// last first. The last tokens that together have at least the answer's length are used, since only the server knows
/// where the answer begins. None if these tokens do not spell the answer, or one is missing.
fn answer_logprobs<'a>(
    mut tokens_from_end: impl Iterator<Item = Option<TokenWithAlternatives<'a>>>,
    answer: &str,
) -> Option<Logprobs> {
    let mut scored = Vec::new();
    let mut missing_bytes = answer.len();
    while missing_bytes > 0 {
        let (token, likeliest) = tokens_from_end.next()??;
        missing_bytes = missing_bytes.saturating_sub(token.spelled().len());
        scored.push((token, likeliest));
    }
    scored.reverse();
    columns_if_spelled(scored, answer)
}

/// Returns the columns of an answer if its tokens spell it. White space before the answer belongs to the template,
/// even if it shares a token with the beginning of the answer, as with SentencePiece.
fn columns_if_spelled(scored: Vec<TokenWithAlternatives>, answer: &str) -> Option<Logprobs> {
    let spelled: usize = scored.iter().map(|(token, _)| token.spelled().len()).sum();
    let mut excess = spelled.checked_sub(answer.len())?;
    let mut columns = LogprobColumns::default();
    for (token, likeliest) in scored {
        let length = token.spelled().len();
        let prefix = token.spelled()[..excess.min(length)].to_vec();
        if !prefix.iter().all(u8::is_ascii_whitespace) {
            return None;
        }
        excess -= prefix.len();
        if !prefix.is_empty() && prefix.len() == length {
            continue;
        }
        let token = without_prefix(token, &prefix);
        let likeliest = likeliest.into_iter();
        let mut likeliest = likeliest
            .map(|other| without_prefix(other, &prefix))
            .collect();
        columns.push(token, &mut likeliest);
    }
    let logprobs = columns.finish(answer);
    logprobs.filter(|logprobs| logprobs.matches_text)
}

/// Removes `prefix` from a token. A token that does not begin with `prefix` becomes empty.
fn without_prefix<'a>(token: WireToken<'a>, prefix: &[u8]) -> WireToken<'a> {
    if prefix.is_empty() {
        return token;
    }
    let suffix = token.spelled().strip_prefix(prefix).unwrap_or_default();
    WireToken {
        bytes: Some(TokenByteList::from(suffix)),
        token: String::from_utf8_lossy(suffix).into_owned().into(),
        logprob: token.logprob,
        prob: None,
    }
}

/// Returns the error for a reply without the requested logprobs. Its status 400 prevents retries.
fn missing_logprob(returned: &str) -> NoAnswer {
    NoAnswer::error(ApiError {
        status: Some(400),
        message: format!("the endpoint returned {returned}"),
        ..ApiError::default()
    })
}

#[cfg(test)]
mod tests;
