//! `[answers]`: what a good answer is, and which requests are refused.

use serde::{Deserialize, Serialize};

use crate::mock::script::{NumberRange, is_time, require};

/// What a good answer says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerText {
    /// The last message.
    Echo,
    /// The last message in capitals.
    Upper,
    Fixed(String),
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenUnit {
    /// A word with the white space before it.
    Word,
    Char,
    /// Three bytes, so that characters of more than one byte are split.
    Bytes,
}

/// The field in which an endpoint takes the longest answer's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxTokensField {
    Either,
    MaxTokens,
    MaxCompletionTokens,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnswerScript {
    pub text: AnswerText,
    pub token: TokenUnit,
    /// The answers' length: the text is repeated or cut. None: as long as the text is.
    pub tokens: Option<NumberRange>,
    /// From the request to its answer.
    pub latency_s: NumberRange,
    /// Added to the latency for every token of the answer.
    pub token_s: f64,
    /// Whether logprobs come to who asks for them.
    pub logprobs: bool,
    /// A request for more is refused.
    pub top_logprobs: usize,
    /// Whether logprobs are those after the temperature.
    pub tempered: bool,
    /// Hidden tokens that are billed, and count against the longest answer.
    pub reasoning_tokens: u64,
    /// Of the prompt.
    pub cached_tokens: u64,
    pub finish_reason: String,
    /// Top-level fields of a request that earn a 400.
    pub refuse_parameters: Vec<String>,
    pub max_tokens_field: MaxTokensField,
    /// Prompt and answer may have so many tokens together.
    pub context_tokens: Option<u64>,
    /// Whether replies are compressed for clients that accept gzip.
    pub gzip: bool,
    /// Whether an answer is billed whose client left before it came.
    pub bill_abandoned: bool,
}

impl Default for AnswerScript {
    fn default() -> Self {
        Self {
            text: AnswerText::Echo,
            token: TokenUnit::Word,
            tokens: None,
            latency_s: NumberRange::Exactly(0.0),
            token_s: 0.0,
            logprobs: true,
            top_logprobs: 20,
            tempered: false,
            reasoning_tokens: 0,
            cached_tokens: 0,
            finish_reason: "stop".into(),
            refuse_parameters: Vec::new(),
            max_tokens_field: MaxTokensField::Either,
            context_tokens: None,
            gzip: false,
            bill_abandoned: true,
        }
    }
}

impl AnswerScript {
    pub(crate) fn check(&self) -> Result<(), String> {
        let spans = [
            ("answers.latency_s", Some(self.latency_s)),
            ("answers.tokens", self.tokens),
        ];
        for (key, span) in spans {
            require(
                span.is_none_or(NumberRange::is_valid),
                key,
                "must be a number that is not negative, or [low, high]",
            )?;
        }
        require(
            is_time(self.token_s),
            "answers.token_s",
            "must be finite and not negative",
        )
    }
}
