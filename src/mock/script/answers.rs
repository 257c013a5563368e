//! `[answers]`: what a good answer is, and which requests are refused.

use serde::{Deserialize, Serialize};

use crate::mock::script::{Span, ensure, is_time};

/// What a good answer says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Text {
    /// The last message.
    Echo,
    /// The last message in capitals.
    Upper,
    Fixed(String),
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Token {
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
pub struct Answers {
    pub text: Text,
    pub token: Token,
    /// The answers' length: the text is repeated or cut. None: as long as the text is.
    pub tokens: Option<Span>,
    /// From the request to its answer.
    pub latency_s: Span,
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

impl Default for Answers {
    fn default() -> Self {
        Self {
            text: Text::Echo,
            token: Token::Word,
            tokens: None,
            latency_s: Span::Exactly(0.0),
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

impl Answers {
    pub(crate) fn check(&self) -> Result<(), String> {
        let spans = [
            ("answers.latency_s", Some(self.latency_s)),
            ("answers.tokens", self.tokens),
        ];
        for (key, span) in spans {
            ensure(
                span.is_none_or(Span::is_fit),
                key,
                "must be a number that is not negative, or [low, high]",
            )?;
        }
        ensure(
            is_time(self.token_s),
            "answers.token_s",
            "must be finite and not negative",
        )
    }
}
