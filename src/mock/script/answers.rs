//! `[answers]`: the content of answers, and the request fields that are rejected.

use serde::{Deserialize, Serialize};

use crate::mock::script::values::{NumberRange, is_valid_amount, require};

/// The text of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerText {
    /// The last message.
    Echo,
    /// The last message in capitals.
    Upper,
    Fixed(String),
}

/// The unit that counts as a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenUnit {
    /// A word, including the white space before it.
    Word,
    Char,
    /// Three bytes, so that characters of more than one byte are split.
    Bytes,
}

/// The request field that sets the maximum length of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AcceptedMaxTokens {
    Either,
    MaxTokens,
    MaxCompletionTokens,
}

/// The section `[answers]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnswerScript {
    pub text: AnswerText,
    pub token: TokenUnit,
    /// Number of tokens of an answer; the text is repeated or cut to this length. None: the text is sent once.
    pub tokens: Option<NumberRange>,
    /// Latency of an answer, in seconds.
    pub latency_s: NumberRange,
    /// Seconds added to the latency for every completion token, including reasoning tokens.
    pub token_s: f64,
    /// True if requested logprobs are sent.
    pub logprobs: bool,
    /// Maximum `top_logprobs` of a request.
    pub top_logprobs: usize,
    /// True if the temperature changes the logprobs.
    pub tempered: bool,
    /// Number of hidden reasoning tokens per choice. They are billed and count against `max_tokens`.
    pub reasoning_tokens: u64,
    /// Number of cached prompt tokens that the usage reports, at most the number of prompt tokens.
    pub cached_tokens: u64,
    pub finish_reason: String,
    /// Top-level request fields that are rejected with a 400.
    pub refuse_parameters: Vec<String>,
    pub max_tokens_field: AcceptedMaxTokens,
    /// Maximum sum of prompt tokens and `max_tokens`.
    pub context_tokens: Option<u64>,
    /// True to compress complete replies to clients that accept gzip.
    pub gzip: bool,
    /// True to bill an answer whose client disconnects before the reply.
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
            max_tokens_field: AcceptedMaxTokens::Either,
            context_tokens: None,
            gzip: false,
            bill_abandoned: true,
        }
    }
}

impl AnswerScript {
    pub(crate) fn check(&self) -> Result<(), String> {
        let ranges = [
            ("answers.latency_s", Some(self.latency_s)),
            ("answers.tokens", self.tokens),
        ];
        for (key, range) in ranges {
            require(
                range.is_none_or(NumberRange::is_valid),
                key,
                "must be a number from 0 to 1e9, or [low, high]",
            )?;
        }
        require(
            is_valid_amount(self.token_s),
            "answers.token_s",
            "must be from 0 to 1e9",
        )
    }
}
