//! The answers as JSON, in OpenAI's shapes.

use std::borrow::Cow;

use serde::Serialize;

use crate::cache::record::MISSING_LOGPROB;
use crate::model::batcher::FinishReason;
use crate::model::sampling::TokenLogprobs;
use crate::tokenizer::Tokenizer;

/// What every object of one answer repeats.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Head {
    pub id: String,
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: i64,
    pub model: String,
    /// Names the weights: another fingerprint, another model.
    pub system_fingerprint: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Completion<'a> {
    #[serde(flatten)]
    pub head: &'a Head,
    pub choices: Vec<CompletionChoice<'a>>,
    pub usage: Usage,
    /// vLLM's, where it is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Debug, Serialize)]
pub(crate) struct CompletionChoice<'a> {
    pub index: usize,
    pub message: AssistantMessage,
    pub logprobs: Option<Logprobs<'a>>,
    pub finish_reason: Option<FinishReason>,
}

#[derive(Debug, Serialize)]
pub(crate) struct AssistantMessage {
    pub role: &'static str,
    pub content: String,
    pub refusal: Option<String>,
}

/// One event of a stream.
#[derive(Debug, Serialize)]
pub(crate) struct Chunk<'a> {
    #[serde(flatten)]
    pub head: &'a Head,
    pub choices: Vec<ChunkChoice<'a>>,
    /// Where the client asks for usage: null in every chunk but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChunkChoice<'a> {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<Logprobs<'a>>,
    pub finish_reason: Option<FinishReason>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Tokens, as OpenAI counts them: the end of the turn is one of the completion's.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

impl Usage {
    pub(crate) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Logprobs<'a> {
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
    /// Empty for control tokens: the end of the turn, for one, adds no bytes to the text.
    bytes: &'a [u8],
}

impl<'a> Logprobs<'a> {
    pub(crate) fn new(choices: &[TokenLogprobs], tokenizer: &'a Tokenizer) -> Self {
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
            None => (tokenizer.token_name(id).into(), [].as_slice()),
        };
        Self {
            token,
            logprob: logprob.max(MISSING_LOGPROB),
            bytes,
        }
    }
}

/// The logprobs of a prompt as vLLM tells them: of each position an object by token id, the token that
/// is there first, then the likeliest ones; null at the first, which nothing comes before.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct PromptLogprobs<'a>(Vec<Option<PromptPosition<'a>>>);

/// Keeps its order.
#[derive(Debug)]
struct PromptPosition<'a>(Vec<(u32, PromptToken<'a>)>);

#[derive(Debug, Serialize)]
struct PromptToken<'a> {
    logprob: f32,
    /// Among the likeliest, from 1; null where it is none of those told.
    rank: Option<usize>,
    decoded_token: Cow<'a, str>,
}

impl Serialize for PromptPosition<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, token)| (id, token)))
    }
}

impl<'a> PromptLogprobs<'a> {
    /// Of `choices`, which are those of every token but the first, with the `top` likeliest at each.
    pub(crate) fn new(choices: &[TokenLogprobs], top: usize, tokenizer: &'a Tokenizer) -> Self {
        let position = |choice: &TokenLogprobs| {
            let likeliest = &choice.top[..top.min(choice.top.len())];
            let rank = |id: u32| {
                likeliest
                    .iter()
                    .position(|top| top.0 == id)
                    .map(|at| at + 1)
            };
            let others = likeliest.iter().filter(|top| top.0 != choice.id);
            let tokens = std::iter::once((choice.id, choice.logprob)).chain(others.copied());
            let tokens = tokens.map(|(id, logprob)| {
                let Token { token, logprob, .. } = Token::new(id, logprob, tokenizer);
                let token = PromptToken {
                    logprob,
                    rank: rank(id),
                    decoded_token: token,
                };
                (id, token)
            });
            Some(PromptPosition(tokens.collect()))
        };
        Self(
            std::iter::once(None)
                .chain(choices.iter().map(position))
                .collect(),
        )
    }
}

/// An answer to a plain text, in the older shape.
#[derive(Debug, Serialize)]
pub(crate) struct TextCompletion<'a> {
    #[serde(flatten)]
    pub head: &'a Head,
    pub choices: Vec<TextChoice<'a>>,
    pub usage: Usage,
}

#[derive(Debug, Serialize)]
pub(crate) struct TextChoice<'a> {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<TextLogprobs<'a>>,
    pub finish_reason: FinishReason,
    /// vLLM's, where it is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
}

/// Logprobs in columns, by the tokens' texts.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs<'a> {
    /// Where each token begins, in characters.
    text_offset: Vec<usize>,
    /// null at the very first token of an echoed prompt, as is its `top_logprobs`.
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<Cow<'a, str>>,
    top_logprobs: Vec<Option<Top<'a>>>,
}

/// Best first. Of tokens with the same text the best alone, since they are keys of an object.
#[derive(Debug)]
struct Top<'a>(Vec<(Cow<'a, str>, f32)>);

impl Serialize for Top<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

impl<'a> TextLogprobs<'a> {
    /// Of an echoed text's `first` token, which nothing comes before, and of all that were chosen after,
    /// with the `most` likeliest at each. With `as_ids` tokens are named `token_id:N`, which is exact where
    /// they are parts of a character.
    pub(crate) fn new(
        first: Option<u32>,
        choices: impl Iterator<Item = &'a TokenLogprobs>,
        most: usize,
        tokenizer: &'a Tokenizer,
        as_ids: bool,
    ) -> Self {
        let name = |id: u32| match as_ids {
            true => Cow::Owned(format!("token_id:{id}")),
            false => Token::new(id, 0.0, tokenizer).token,
        };
        let mut columns = Self::default();
        let mut offset = 0;
        let mut push = |id: u32, logprob: Option<f32>, top: Option<Top<'a>>| {
            columns.text_offset.push(offset);
            columns.token_logprobs.push(logprob);
            columns.tokens.push(name(id));
            columns.top_logprobs.push(top);
            offset += Token::new(id, 0.0, tokenizer).token.chars().count();
        };
        if let Some(id) = first {
            push(id, None, None);
        }
        for choice in choices {
            let mut top: Vec<(Cow<str>, f32)> = Vec::with_capacity(choice.top.len());
            for &(id, logprob) in choice.top.iter().take(most) {
                let name = name(id);
                if top.iter().all(|known| known.0 != name) {
                    top.push((name, logprob.max(MISSING_LOGPROB)));
                }
            }
            push(
                choice.id,
                Some(choice.logprob.max(MISSING_LOGPROB)),
                Some(Top(top)),
            );
        }
        columns
    }
}
