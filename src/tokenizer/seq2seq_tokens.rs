//! The tokens around the answers of an encoder-decoder, and its default template.

use serde_json::Value;

/// Source template of a folder without a chat template: the contents of all messages, one per line.
pub(crate) const DEFAULT_TEMPLATE: &str = "{% for message in messages %}{{ message['content'] }}\
    {% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}";

/// Tokens around the answer of an encoder-decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seq2SeqTokens {
    /// First token of the decoder's input.
    pub start: u32,
    /// Token that ends the source and the answer.
    pub end: u32,
}

impl Seq2SeqTokens {
    /// Returns the tokens of the model that `config`, the content of `config.json`, describes; None if it is not an
    /// encoder-decoder.
    pub(crate) fn from_config(config: &Value) -> Option<Self> {
        let is_t5 = matches!(config["model_type"].as_str(), Some("t5" | "mt5"));
        if !is_t5 {
            return None;
        }
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let start = id(&config["decoder_start_token_id"]).or_else(|| id(&config["pad_token_id"]));
        let end = match &config["eos_token_id"] {
            Value::Array(ids) => ids.first().and_then(id),
            value => id(value),
        };
        Some(Self {
            start: start.unwrap_or(0),
            end: end.unwrap_or(1),
        })
    }
}
