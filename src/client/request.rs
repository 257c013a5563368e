//! Builds request bodies from prompts and settings, and selects the parser of their replies. Pure.

use std::sync::Arc;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::cache::question::template::QuestionTemplate;
use crate::client::response;
use crate::client::response::completion::{Completion, NoAnswer};
use crate::client::score_text::ScoringMethod;
use crate::client::structured_output::StructuredOutput;
use crate::config::EndpointConfig;
use crate::prompt::Prompt;
use crate::prompt::message::Message;

/// Maximum number of question templates, which bounds their memory.
const MAX_TEMPLATES: u32 = 1_000;

/// Usual number of fields of a chat request, for the capacity of its map.
const USUAL_FIELDS: usize = 8;

/// Settings that all requests to one teacher share.
pub struct RequestTemplate {
    pub endpoint: EndpointConfig,
    pub structured: Option<StructuredOutput>,
    /// Hash of the findings of `distill probe`; empty if the endpoint was not probed.
    pub probe: String,
    /// Set if requests score existing answers instead of generating new ones.
    pub scoring: Option<Arc<ScoringMethod>>,
}

fn message_to_json(message: &Message) -> Value {
    let mut fields = Map::with_capacity(2);
    fields.insert("role".into(), message.role.as_str().into());
    fields.insert("content".into(), message.content.as_str().into());
    Value::Object(fields)
}

impl RequestTemplate {
    /// Returns a template without a schema, for an endpoint that was not probed.
    pub fn plain(endpoint: EndpointConfig) -> RequestTemplate {
        RequestTemplate {
            endpoint,
            structured: None,
            probe: String::new(),
            scoring: None,
        }
    }

    /// Builds the body of a request. Its fields have a fixed order.
    pub fn body(&self, messages: &[Message], sample: u32) -> Value {
        match &self.scoring {
            Some(scoring) => scoring.body(&self.endpoint, messages),
            None => self.chat_body(messages, sample),
        }
    }

    /// Builds the body for a prompt, including the request fields of the prompt itself.
    pub fn body_for_prompt(&self, prompt: &Prompt, sample: u32) -> Value {
        let mut body = self.body(&prompt.messages, sample);
        if let (Some(raw), Some(fields)) = (&prompt.raw, body.as_object_mut()) {
            if let Some(messages) = &raw.messages {
                fields.insert("messages".into(), messages.clone());
            }
            for (field, value) in &raw.fields {
                fields.insert(field.clone(), value.clone());
            }
        }
        body
    }

    /// Returns one question template per sample, for the first [`MAX_TEMPLATES`] samples. They are valid only for
    /// prompts without request fields of their own. Empty for scoring requests.
    pub fn templates(&self, samples: u32) -> Vec<QuestionTemplate> {
        if self.scoring.is_some() {
            return Vec::new();
        }
        let samples = 0..samples.min(MAX_TEMPLATES);
        samples
            .map(|sample| QuestionTemplate::new(&self.chat_body(&[], sample), sample))
            .collect()
    }

    /// Returns the parser of replies to `body`, which was built from `messages`.
    pub fn reply_parser<'a>(
        &'a self,
        body: &'a Value,
        messages: &'a [Message],
    ) -> impl Fn(&[u8]) -> Result<Completion, NoAnswer> + 'a {
        move |reply| match &self.scoring {
            Some(scoring) => scoring.parse_reply(reply, body, messages),
            None => response::parse(reply),
        }
    }

    /// Builds the body of a chat completion. Sample i uses seed + i, since the same seed would give the same answer.
    fn chat_body(&self, messages: &[Message], sample: u32) -> Value {
        let sampling = &self.endpoint.sampling;
        let mut body = Map::with_capacity(USUAL_FIELDS + sampling.extra.len());
        body.insert("model".into(), json!(self.endpoint.teacher.model));
        body.insert(
            "messages".into(),
            messages.iter().map(message_to_json).collect(),
        );
        let max_tokens = sampling.max_tokens_field.name();
        body.insert(max_tokens.into(), json!(sampling.max_tokens));
        if !sampling.reasoning {
            if let Some(temperature) = sampling.temperature {
                body.insert("temperature".into(), json!(temperature));
            }
            if let Some(top_p) = sampling.top_p {
                body.insert("top_p".into(), json!(top_p));
            }
            if sampling.top_logprobs > 0 {
                body.insert("logprobs".into(), json!(true));
                body.insert("top_logprobs".into(), json!(sampling.top_logprobs));
            }
        }
        if let Some(seed) = sampling.seed {
            body.insert("seed".into(), json!(seed.wrapping_add(i64::from(sample))));
        }
        if !sampling.stop.is_empty() && !sampling.reasoning {
            body.insert("stop".into(), json!(sampling.stop));
        }
        if let Some(effort) = &sampling.reasoning_effort {
            body.insert("reasoning_effort".into(), json!(effort));
        }
        if let Some(structured) = &self.structured {
            body.insert("response_format".into(), structured.response_format());
        }
        body.extend(sampling.extra.clone());
        Value::Object(body)
    }

    /// Returns true if requests ask for logprobs.
    pub fn wants_logprobs(&self) -> bool {
        self.endpoint.sampling.top_logprobs > 0 && !self.endpoint.sampling.reasoning
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MaxTokensField, SamplingConfig, TeacherConfig};

    fn body(
        teacher: &TeacherConfig,
        sampling: &SamplingConfig,
        messages: &[Message],
        sample: u32,
    ) -> Value {
        let endpoint = EndpointConfig {
            teacher: teacher.clone(),
            sampling: sampling.clone(),
            limits: Default::default(),
            price: Default::default(),
        };
        RequestTemplate::plain(endpoint).body(messages, sample)
    }

    fn teacher() -> TeacherConfig {
        TeacherConfig {
            model: "m".into(),
            ..TeacherConfig::default()
        }
    }

    fn messages(content: &str) -> Vec<Message> {
        vec![Message {
            role: "user".into(),
            content: content.into(),
        }]
    }

    #[test]
    fn body_has_fixed_field_order_with_extra_last() {
        let sampling = SamplingConfig {
            top_p: Some(0.5),
            seed: Some(7),
            stop: vec!["\n".into()],
            extra: Map::from_iter([
                ("reasoning_effort".to_string(), json!("none")),
                ("temperature".to_string(), json!(0)),
            ]),
            ..SamplingConfig::default()
        };
        assert_eq!(
            body(&teacher(), &sampling, &messages("hi"), 2).to_string(),
            r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_completion_tokens":512,"temperature":0,"top_p":0.5,"logprobs":true,"top_logprobs":20,"seed":9,"stop":["\n"],"reasoning_effort":"none"}"#
        );
        let sampling = SamplingConfig {
            reasoning: true,
            reasoning_effort: Some("low".into()),
            stop: vec!["x".into()],
            ..SamplingConfig::default()
        };
        assert_eq!(
            body(&teacher(), &sampling, &messages("hi"), 0).to_string(),
            r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_completion_tokens":512,"reasoning_effort":"low"}"#
        );
        let sampling = SamplingConfig {
            max_tokens_field: MaxTokensField::MaxTokens,
            temperature: None,
            top_logprobs: 0,
            ..SamplingConfig::default()
        };
        assert_eq!(
            body(&teacher(), &sampling, &messages("hi"), 0).to_string(),
            r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":512}"#
        );
    }
}
