//! The answers as JSON, in OpenAI's shapes.

use std::borrow::Cow;

use serde::Serialize;

use crate::data::tokenizer::Tokenizer;
use crate::model::generate::{Choice, FinishReason};

/// What OpenAI sends for "very unlikely", since JSON has no infinity.
const LOWEST_LOGPROB: f32 = -9999.0;

/// What every object of one answer repeats.
#[derive(Debug, Clone, Serialize)]
pub struct Head {
    pub id: String,
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: i64,
    pub model: String,
    /// Names the weights: another fingerprint, another model.
    pub system_fingerprint: String,
}

#[derive(Debug, Serialize)]
pub struct Completion<'a> {
    #[serde(flatten)]
    pub head: &'a Head,
    pub choices: Vec<CompletionChoice<'a>>,
    pub usage: Usage,
}

#[derive(Debug, Serialize)]
pub struct CompletionChoice<'a> {
    pub index: usize,
    pub message: AssistantMessage,
    pub logprobs: Option<Logprobs<'a>>,
    pub finish_reason: Option<FinishReason>,
}

#[derive(Debug, Serialize)]
pub struct AssistantMessage {
    pub role: &'static str,
    pub content: String,
    pub refusal: Option<String>,
}

/// One event of a stream.
#[derive(Debug, Serialize)]
pub struct Chunk<'a> {
    #[serde(flatten)]
    pub head: &'a Head,
    pub choices: Vec<ChunkChoice<'a>>,
    /// Where the client asks for usage: null in every chunk but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize)]
pub struct ChunkChoice<'a> {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<Logprobs<'a>>,
    pub finish_reason: Option<FinishReason>,
}

#[derive(Debug, Default, Serialize)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Tokens, as OpenAI counts them: the end of the turn is one of the completion's.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

impl Usage {
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Logprobs<'a> {
    content: Vec<Position<'a>>,
    refusal: Option<Vec<Position<'a>>>,
}

#[derive(Debug, Serialize)]
struct Position<'a> {
    #[serde(flatten)]
    chosen: Token<'a>,
    top_logprobs: Vec<Token<'a>>,
}

/// A token by its text and, exactly, by its bytes: a token that is part of a character has the
/// replacement character in its text.
#[derive(Debug, Serialize)]
struct Token<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    bytes: &'a [u8],
}

impl<'a> Logprobs<'a> {
    pub fn new(choices: &[Choice], tokenizer: &'a Tokenizer) -> Self {
        let token = |id, logprob| Token::new(id, logprob, tokenizer);
        let content = choices
            .iter()
            .map(|choice| Position {
                chosen: token(choice.id, choice.logprob),
                top_logprobs: choice
                    .top
                    .iter()
                    .map(|&(id, logprob)| token(id, logprob))
                    .collect(),
            })
            .collect();
        Self {
            content,
            refusal: None,
        }
    }
}

impl<'a> Token<'a> {
    fn new(id: u32, logprob: f32, tokenizer: &'a Tokenizer) -> Self {
        let (token, bytes) = match tokenizer.token_bytes(id) {
            Some(bytes) => (String::from_utf8_lossy(bytes), bytes),
            // A control token, the end of the turn for one, adds no bytes to the text.
            None => (tokenizer.token_name(id).into(), [].as_slice()),
        };
        Self {
            token,
            logprob: logprob.max(LOWEST_LOGPROB),
            bytes,
        }
    }
}
