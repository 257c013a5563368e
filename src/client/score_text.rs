//! What the teacher would have said in place of each token of a text that somebody else wrote. Pure.
//!
//! Two dialects ask for it. vLLM's chat completions take `prompt_logprobs` and give, for each token of
//! the conversation as the server's template prints it, the likeliest tokens by their ids. Text
//! completions give the prompt back with `echo`, and with it the logprobs of its tokens; there the
//! conversation must be templated here. Either way one token is asked for, which servers insist on,
//! and thrown away.

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

/// How texts are scored, and the teacher's tokenizer.
pub enum ScoringMethod {
    /// By vLLM's chat completions; without a tokenizer tokens are known by their texts.
    PromptLogprobs(Option<Tokenizer>),
    /// By text completions.
    Echo(Tokenizer),
}

impl ScoringMethod {
    fn tokenizer(&self) -> Option<&Tokenizer> {
        match self {
            Self::PromptLogprobs(tokenizer) => tokenizer.as_ref(),
            Self::Echo(tokenizer) => Some(tokenizer),
        }
    }

    /// Can these messages be asked about?
    ///
    /// # Errors
    /// Where the template that they are printed with here does not take them.
    pub fn check(&self, messages: &[Message]) -> anyhow::Result<()> {
        match self {
            Self::PromptLogprobs(_) => Ok(()),
            Self::Echo(tokenizer) => tokenizer.encode_continued(messages).map(|_| ()),
        }
    }

    /// The request that has the last of the messages scored, which [`Scoring::check`] let pass.
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
        for (field, value) in &sampling.extra {
            body.insert(field.clone(), value.clone());
        }
        Value::Object(body)
    }

    /// Reads the reply to `body`: the text that was scored, as an answer with its logprobs.
    pub fn read(
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
            return Err(NoAnswer::Malformed("there is no choice in the body".into()));
        }
        let scored = messages.last().map_or("", |message| &message.content);
        let logprobs = match self {
            Self::Echo(_) => self.of_echo(&choice["logprobs"], &body["prompt"], scored)?,
            Self::PromptLogprobs(_) => self.of_prompt(&reply, messages, scored)?,
        };
        let (usage, _) = usage::usage(reply["usage"].clone());
        let fault = "the teacher's tokens do not end with the answer";
        Ok(Completion {
            answer: Answer {
                text: scored.to_owned(),
                finish_reason: "stop".into(),
                ..Answer::default()
            },
            usage,
            model: text(&reply["model"]),
            fingerprint: text(&reply["system_fingerprint"]),
            logprobs_fault: logprobs.is_none().then(|| fault.into()),
            logprobs,
            ..Completion::default()
        })
    }

    /// From what is told of the whole conversation.
    fn of_prompt(
        &self,
        reply: &Value,
        messages: &[Message],
        answer: &str,
    ) -> Result<Option<Logprobs>, NoAnswer> {
        let Some(positions) = reply["prompt_logprobs"].as_array() else {
            return Err(missing_logprob(
                "no `prompt_logprobs`: it does not speak vLLM's dialect, or is set up without",
            ));
        };
        // Nothing comes before the first.
        let positions: Vec<&Map<String, Value>> =
            positions.iter().filter_map(Value::as_object).collect();
        let told = reply["prompt_token_ids"].as_array();
        let ids = self.ids_at_the_end(&positions, told, messages);
        let tokens = ids.iter().rev().zip(positions.iter().rev());
        let scored = tokens.map(|(id, position)| {
            // It is told also where it is none of the likeliest.
            let likeliest = position.iter().map(|(id, token)| self.token(id, token));
            Some((self.token(id, position.get(id)?), likeliest.collect()))
        });
        Ok(ending(scored, answer))
    }

    /// The tokens that the conversation ends with, by their ids: as told, else as the teacher's tokenizer
    /// spells the answer, else the first of each position. Newer servers put the token that is there first;
    /// older ones sort by likelihood, but what does not spell the answer is found out.
    fn ids_at_the_end(
        &self,
        positions: &[&Map<String, Value>],
        told: Option<&Vec<Value>>,
        messages: &[Message],
    ) -> Vec<String> {
        if let Some(ids) = told {
            return ids.iter().map(Value::to_string).collect();
        }
        let encoded = self.tokenizer().map(|it| it.encode_continued(messages));
        match encoded {
            Some(Ok((ids, answer))) => ids[answer].iter().map(u32::to_string).collect(),
            _ => positions
                .iter()
                .map(|position| position.keys().next().cloned().unwrap_or_default())
                .collect(),
        }
    }

    /// From the prompt that was sent as ids and came back.
    fn of_echo(
        &self,
        logprobs: &Value,
        sent: &Value,
        answer: &str,
    ) -> Result<Option<Logprobs>, NoAnswer> {
        let list = |name: &str| logprobs[name].as_array();
        let lists = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
        let (Some(names), Some(own), Some(top)) = lists else {
            return Err(missing_logprob(
                "no logprobs of the prompt: it takes no `echo`, or not together with `logprobs`",
            ));
        };
        let count = sent.as_array().map_or(0, Vec::len);
        if names.len() < count || own.len() < count || top.len() < count {
            return Err(missing_logprob("fewer tokens than the prompt has"));
        }
        let scored = (0..count).rev().map(|at| {
            let name = names[at].as_str()?;
            let id = u32::try_from(sent[at].as_u64()?).ok()?;
            let token = self.alternative(Some(id), name.into(), &own[at]);
            let likeliest = top[at].as_object().into_iter().flatten();
            let likeliest = likeliest.map(|(name, logprob)| self.named(name, logprob));
            // A server that adds tokens of its own is a position off.
            is_called(&token, id, name).then(|| (token, likeliest.collect()))
        });
        Ok(ending(scored, answer))
    }

    /// A token of vLLM's `prompt_logprobs`, by its id where the tokenizer is known.
    fn token<'a>(&'a self, id: &str, token: &'a Value) -> WireToken<'a> {
        let told = token["decoded_token"].as_str().unwrap_or_default();
        self.alternative(id.parse().ok(), told.into(), &token["logprob"])
    }

    /// A token by its text or, exactly, as `token_id:N`.
    fn named<'a>(&'a self, name: &str, logprob: &Value) -> WireToken<'a> {
        let id = token_ids::parse(name.as_bytes());
        self.alternative(id, name.to_owned().into(), logprob)
    }

    fn alternative<'a>(
        &'a self,
        id: Option<u32>,
        told: Cow<'a, str>,
        logprob: &Value,
    ) -> WireToken<'a> {
        let known = self.tokenizer().zip(id);
        let bytes = known.and_then(|(tokenizer, id)| tokenizer.token_bytes(id));
        let token = match known {
            // A control token goes by its name.
            Some((tokenizer, id)) if bytes.is_none() => tokenizer.token_name(id).into(),
            _ => told,
        };
        WireToken {
            token,
            logprob: logprob.as_f64().map(Logprob::from).unwrap_or_default(),
            bytes: bytes.map(TokenByteList::from),
            prob: None,
        }
    }
}

/// Does a server mean this token by `name`? It may have lost the bytes of a part of a character, and the
/// white space in front, as SentencePiece's decoder does.
fn is_called(token: &WireToken, id: u32, name: &str) -> bool {
    if let Some(told) = token_ids::parse(name.as_bytes()) {
        return told == id;
    }
    let text = String::from_utf8_lossy(token.spelled());
    name.contains(char::REPLACEMENT_CHARACTER) || text.trim_start() == name.trim_start()
}

/// The token that is there, and the likeliest ones.
type Scored<'a> = (WireToken<'a>, Vec<WireToken<'a>>);

/// The logprobs of the answer that a conversation ends with, of whose tokens `backwards` are the last
/// ones, from the end; None where one of them is not told. Where it begins only the server knows.
fn ending<'a>(
    mut backwards: impl Iterator<Item = Option<Scored<'a>>>,
    answer: &str,
) -> Option<Logprobs> {
    let (mut scored, mut missing) = (Vec::new(), answer.len());
    while missing > 0 {
        let (own, likeliest) = backwards.next()??;
        missing = missing.saturating_sub(own.spelled().len());
        scored.push((own, likeliest));
    }
    scored.reverse();
    columns(scored, answer)
}

/// The columns of an answer, if its tokens spell it. White space before it is the template's, also where
/// it is in one token with the answer's beginning, as SentencePiece has it.
fn columns(scored: Vec<Scored>, answer: &str) -> Option<Logprobs> {
    let spelled: usize = scored.iter().map(|(own, _)| own.spelled().len()).sum();
    let mut lead = spelled.checked_sub(answer.len())?;
    let mut columns = LogprobColumns::default();
    for (own, mut likeliest) in scored {
        let length = own.spelled().len();
        let front = own.spelled()[..lead.min(length)].to_vec();
        if !front.iter().all(u8::is_ascii_whitespace) {
            return None;
        }
        lead -= front.len();
        if !front.is_empty() && front.len() == length {
            continue;
        }
        let own = without_prefix(own, &front);
        likeliest = likeliest
            .into_iter()
            .map(|it| without_prefix(it, &front))
            .collect();
        columns.push(own, &mut likeliest);
    }
    let logprobs = columns.finish(answer);
    logprobs.filter(|logprobs| logprobs.matches_text)
}

/// What is left of a token behind `front`; nothing of one that does not begin so.
fn without_prefix<'a>(token: WireToken<'a>, front: &[u8]) -> WireToken<'a> {
    if front.is_empty() {
        return token;
    }
    let rest = token.spelled().strip_prefix(front).unwrap_or_default();
    WireToken {
        bytes: Some(TokenByteList::from(rest)),
        token: String::from_utf8_lossy(rest).into_owned().into(),
        logprob: token.logprob,
        prob: None,
    }
}

/// The endpoint answers, but not what it was asked: to ask again would not help.
fn missing_logprob(what: &str) -> NoAnswer {
    NoAnswer::error(ApiError {
        status: Some(400),
        message: format!("the endpoint tells {what}"),
        ..ApiError::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SamplingConfig, TeacherConfig};

    fn endpoint() -> EndpointConfig {
        EndpointConfig {
            teacher: TeacherConfig {
                model: "m".into(),
                ..TeacherConfig::default()
            },
            sampling: SamplingConfig {
                top_logprobs: 2,
                ..SamplingConfig::default()
            },
            limits: Default::default(),
            price: Default::default(),
        }
    }

    fn messages(answer: &str) -> Vec<Message> {
        let message = |role: &str, content: &str| Message {
            role: role.into(),
            content: content.into(),
        };
        vec![message("user", "hi"), message("assistant", answer)]
    }

    fn read(reply: Value, answer: &str) -> Result<Completion, NoAnswer> {
        let scoring = ScoringMethod::PromptLogprobs(None);
        let messages = messages(answer);
        let body = scoring.body(&endpoint(), &messages);
        scoring.read(reply.to_string().as_bytes(), &body, &messages)
    }

    /// The reply of a vLLM to a conversation whose template ends with `<|im_start|>assistant\n` before the
    /// answer " a cat"; `first` puts the token that is there in front, as newer ones do.
    fn reply(first: bool) -> Value {
        let token = |logprob: f64, rank: u32, text: &str| json!({"logprob": logprob, "rank": rank, "decoded_token": text});
        let (a, the) = (token(-1.5, 2, " a"), token(-0.5, 1, " the"));
        let (cat, dog, cow) = (
            token(-4.0, 9, " cat"),
            token(-0.25, 1, " dog"),
            token(-2.0, 2, " cow"),
        );
        let positions = match first {
            true => [
                json!({"11": a, "12": the}),
                json!({"21": cat, "22": dog, "23": cow}),
            ],
            false => [
                json!({"12": the, "11": a}),
                json!({"22": dog, "23": cow, "21": cat}),
            ],
        };
        let [second, third] = positions;
        json!({
            "id": "chatcmpl-1", "model": "m-1", "usage": {"prompt_tokens": 4, "completion_tokens": 1},
            "choices": [{"index": 0, "message": {"role": "assistant", "content": " x"}}],
            "prompt_logprobs": [null, {"7": token(-9999.0, 5, "\n")}, second, third],
        })
    }

    #[test]
    fn the_answer_is_what_the_conversation_ends_with() {
        let completion = read(reply(true), " a cat").unwrap();
        let answer = &completion.answer;
        assert_eq!(
            (answer.text.as_str(), answer.finish_reason.as_str()),
            (" a cat", "stop")
        );
        assert_eq!(completion.usage.unwrap().prompt_tokens, 4);
        let logprobs = completion.logprobs.unwrap();
        assert_eq!(logprobs.token, [" a", " cat"]);
        assert_eq!(logprobs.logprob, [Some(-1.5), Some(-4.0)]);
        assert_eq!(logprobs.top[0], [" the", " a"]);
        assert_eq!(logprobs.top[1], [" dog", " cow", " cat"]);
        let best = &logprobs.top_logprob[1];
        assert_eq!(best, &[Some(-0.25), Some(-2.0), Some(-4.0)]);
    }

    #[test]
    fn the_order_does_not_matter_where_the_ids_are_told() {
        let unordered = reply(false);
        assert!(
            read(unordered.clone(), " a cat")
                .unwrap()
                .logprobs
                .is_none()
        );
        let mut told = unordered;
        told["prompt_token_ids"] = json!([5, 7, 11, 21]);
        let ordered = read(reply(true), " a cat").unwrap().logprobs;
        assert_eq!(read(told.clone(), " a cat").unwrap().logprobs, ordered);
        told["prompt_token_ids"] = json!([5, 7, 21, 11]);
        assert!(read(told, " a cat").unwrap().logprobs.is_none());
    }

    #[test]
    fn what_does_not_spell_the_answer_is_dropped_with_its_reason() {
        for answer in ["n cat", " a dog", "\n a cat", "long before \n a cat"] {
            let completion = read(reply(true), answer).unwrap();
            let is_whole = answer == "\n a cat";
            assert_eq!(completion.logprobs.is_some(), is_whole, "{answer:?}");
            assert_eq!(completion.logprobs_fault.is_none(), is_whole);
        }
    }

    #[test]
    fn white_space_that_the_template_put_before_the_answer_is_no_part_of_it() {
        let logprobs = read(reply(true), "a cat").unwrap().logprobs.unwrap();
        assert_eq!(logprobs.token, ["a", " cat"]);
        assert_eq!(logprobs.top[0], ["the", "a"]);
        let cat = read(reply(true), "cat").unwrap().logprobs.unwrap();
        assert_eq!(cat.token, ["cat"]);
        assert_eq!(cat.top[0], ["dog", "cow", "cat"]);
    }

    #[test]
    fn an_endpoint_without_the_dialect_refuses_by_what_it_leaves_out() {
        let mut plain = reply(true);
        plain.as_object_mut().unwrap().remove("prompt_logprobs");
        let Err(NoAnswer::Error(error)) = read(plain, " a cat") else {
            panic!("it told nothing");
        };
        assert_eq!(error.status, Some(400));
        assert!(error.message.contains("prompt_logprobs"), "{error:?}");
        let error = json!({"error": {"message": "prompt_logprobs is too large", "code": 400}});
        assert!(matches!(read(error, ""), Err(NoAnswer::Error(_))));
        let scoring = ScoringMethod::PromptLogprobs(None);
        let cut_off = scoring.read(b"{\"choices\":[", &Value::Null, &[]);
        assert!(matches!(cut_off, Err(NoAnswer::Malformed(_))));
        let empty = read(json!({"choices": []}), "");
        assert!(matches!(empty, Err(NoAnswer::Malformed(_))));
    }

    /// Of texts or of ids, with a token that was asked for in vain; with one in front that nobody sent.
    #[test]
    fn an_echo_is_read_by_texts_and_by_ids_and_no_position_off() {
        let folder = std::path::Path::new("tests/it/golden/tokenizers/bytelevel");
        let tokenizer = Tokenizer::load(folder).unwrap();
        let scoring = ScoringMethod::Echo(tokenizer);
        let answer = "Grüße 👋";
        let messages = messages(answer);
        let body = scoring.body(&endpoint(), &messages);
        let ids: Vec<u32> = serde_json::from_value(body["prompt"].clone()).unwrap();
        assert_eq!(
            (&body["max_tokens"], &body["echo"]),
            (&json!(1), &json!(true))
        );
        let tokenizer = scoring.tokenizer().unwrap();
        let text = |id: &u32| {
            let bytes = tokenizer.token_bytes(*id).map(String::from_utf8_lossy);
            bytes.map_or(tokenizer.token_name(*id), Cow::into_owned)
        };
        let as_id = |id: &u32| format!("token_id:{id}");
        let reply = |names: Vec<String>| {
            let logprobs: Vec<Value> = (0..names.len()).map(|at| json!(-0.5 * at as f64)).collect();
            let top: Vec<Value> = names.iter().map(|name| json!({name: -0.25})).collect();
            let logprobs =
                json!({"tokens": names, "token_logprobs": logprobs, "top_logprobs": top});
            let reply = json!({"choices": [{"text": "", "logprobs": logprobs}]}).to_string();
            scoring
                .read(reply.as_bytes(), &body, &messages)
                .unwrap()
                .logprobs
        };
        let named = |name: &dyn Fn(&u32) -> String| -> Vec<String> {
            ids.iter().chain([&7]).map(name).collect()
        };
        let by_ids = reply(named(&as_id)).unwrap();
        let by_texts = reply(named(&text)).unwrap();
        assert!(by_ids.matches_text && by_texts.matches_text);
        assert_eq!(by_ids.token, by_texts.token);
        let first = ids.len() - by_ids.token.len();
        assert_eq!(by_ids.logprob[0], Some(-0.5 * first as f32));
        for name in [&as_id as &dyn Fn(&u32) -> String, &text] {
            let mut shifted = named(name);
            shifted.insert(0, "<s>".into());
            assert_eq!(reply(shifted), None);
        }
    }

    #[test]
    fn the_body_asks_for_one_token_and_the_logprobs_of_the_prompt() {
        let scoring = ScoringMethod::PromptLogprobs(None);
        assert_eq!(
            scoring.body(&endpoint(), &messages("yes")).to_string(),
            r#"{"model":"m","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"}],"max_completion_tokens":1,"prompt_logprobs":2,"add_generation_prompt":false,"continue_final_message":true,"return_token_ids":true}"#
        );
    }
}
