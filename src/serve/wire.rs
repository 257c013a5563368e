//! Response bodies, serialised in OpenAI's formats.

use std::borrow::Cow;

use serde::Serialize;

use crate::cache::record::MISSING_LOGPROB;
use crate::model::batcher::FinishReason;
use crate::model::sampling::TokenLogprobs;
use crate::model::text_stream::incomplete_character;
use crate::tokenizer::Tokenizer;

/// The fields that all objects of one response share.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ResponseHead {
    pub id: String,
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: i64,
    pub model: String,
    /// Hash of the model's config and weights.
    pub system_fingerprint: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatCompletion<'a> {
    #[serde(flatten)]
    pub head: &'a ResponseHead,
    pub choices: Vec<ChatChoice<'a>>,
    pub usage: TokenUsage,
    /// vLLM's extension; sent only if requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatChoice<'a> {
    pub index: usize,
    pub message: AssistantMessage,
    pub logprobs: Option<ChatLogprobs<'a>>,
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
pub(crate) struct ChatChunk<'a> {
    #[serde(flatten)]
    pub head: &'a ResponseHead,
    pub choices: Vec<ChatChunkChoice<'a>>,
    /// Sent only if requested. Then it is null in every chunk except the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<TokenUsage>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatChunkChoice<'a> {
    pub index: usize,
    pub delta: MessageDelta,
    pub logprobs: Option<ChatLogprobs<'a>>,
    pub finish_reason: Option<FinishReason>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct MessageDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Token counts as OpenAI defines them: the end-of-turn token counts as a completion token.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct TokenUsage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

impl TokenUsage {
    pub(crate) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprobs<'a> {
    content: Vec<TokenPosition<'a>>,
    refusal: Option<Vec<TokenPosition<'a>>>,
}

#[derive(Debug, Serialize)]
struct TokenPosition<'a> {
    #[serde(flatten)]
    chosen: TokenLogprob<'a>,
    top_logprobs: Vec<TokenLogprob<'a>>,
}

/// A token with its text and its bytes. If the token holds only a part of a character, its text contains
/// the replacement character; the bytes are always exact.
#[derive(Debug, Serialize)]
struct TokenLogprob<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    /// Empty for control tokens such as the end of the turn, which add no bytes to the text.
    bytes: &'a [u8],
}

impl<'a> ChatLogprobs<'a> {
    /// Converts the logprobs of an answer, or of a part of it.
    pub(crate) fn new(token_logprobs: &[TokenLogprobs], tokenizer: &'a Tokenizer) -> Self {
        let position = |position: &TokenLogprobs| {
            let token = |id, logprob| TokenLogprob::new(id, logprob, position.is_first, tokenizer);
            TokenPosition {
                chosen: token(position.id, position.logprob),
                top_logprobs: position
                    .top
                    .iter()
                    .map(|&(id, logprob)| token(id, logprob))
                    .collect(),
            }
        };
        let content = token_logprobs.iter().map(position).collect();
        Self {
            content,
            refusal: None,
        }
    }
}

impl<'a> TokenLogprob<'a> {
    /// Converts a token. `is_first` is true at the start of an answer.
    fn new(id: u32, logprob: f32, is_first: bool, tokenizer: &'a Tokenizer) -> Self {
        let (token, bytes) = match tokenizer.answer_bytes(id, is_first) {
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

/// The logprobs of a prompt in vLLM's format: an object for each position, with token ids as keys.
/// The prompt's own token comes first, then the most likely tokens. The first position is null, because
/// the first token has no context.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct PromptLogprobs<'a>(Vec<Option<PromptPosition<'a>>>);

/// The tokens of one position, serialised as a map in the order of the entries.
#[derive(Debug)]
struct PromptPosition<'a>(Vec<(u32, PromptToken<'a>)>);

#[derive(Debug, Serialize)]
struct PromptToken<'a> {
    logprob: f32,
    /// Rank by probability, from 1; null if the token is not one of the `top_k` most likely tokens.
    rank: Option<usize>,
    decoded_token: Cow<'a, str>,
}

impl Serialize for PromptPosition<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, token)| (id, token)))
    }
}

impl<'a> PromptLogprobs<'a> {
    /// Converts the logprobs of every token of a prompt except the first, with the `top_k` most likely
    /// tokens at each position.
    pub(crate) fn new(
        token_logprobs: &[TokenLogprobs],
        top_k: usize,
        tokenizer: &'a Tokenizer,
    ) -> Self {
        let position = |prompt_token: &TokenLogprobs| {
            let likeliest = &prompt_token.top[..top_k.min(prompt_token.top.len())];
            let rank = |id: u32| {
                likeliest
                    .iter()
                    .position(|token| token.0 == id)
                    .map(|index| index + 1)
            };
            let others = likeliest
                .iter()
                .filter(|token| token.0 != prompt_token.id)
                .copied();
            let tokens = std::iter::once((prompt_token.id, prompt_token.logprob)).chain(others);
            let tokens = tokens.map(|(id, logprob)| {
                let TokenLogprob { token, logprob, .. } =
                    TokenLogprob::new(id, logprob, false, tokenizer);
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
                .chain(token_logprobs.iter().map(position))
                .collect(),
        )
    }
}

/// The response of `/v1/completions`, in OpenAI's older format.
#[derive(Debug, Serialize)]
pub(crate) struct TextCompletion<'a> {
    #[serde(flatten)]
    pub head: &'a ResponseHead,
    pub choices: Vec<TextChoice<'a>>,
    pub usage: TokenUsage,
}

#[derive(Debug, Serialize)]
pub(crate) struct TextChoice<'a> {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<TextLogprobs<'a>>,
    pub finish_reason: FinishReason,
    /// vLLM's extension; sent only if requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
}

/// Logprobs as parallel lists, with one element per token.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs<'a> {
    /// Offset of each token in the text, in characters. A token that continues a character has the offset of that
    /// character.
    text_offset: Vec<usize>,
    /// Null at the first token of an echoed prompt, as in `top_logprobs`.
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<Cow<'a, str>>,
    top_logprobs: Vec<Option<TopLogprobs<'a>>>,
}

/// The most likely tokens, most likely first. Their texts are the keys of an object, so only the most
/// likely of several tokens with the same text is kept.
#[derive(Debug)]
struct TopLogprobs<'a>(Vec<(Cow<'a, str>, f32)>);

impl Serialize for TopLogprobs<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

impl<'a> TextLogprobs<'a> {
    /// Converts the first token of an echoed prompt (`first_id`), which has no logprob, and the logprobs
    /// of all tokens after it, with the `top_k` most likely tokens at each position. With `as_ids`, tokens
    /// are named `token_id:N`, which is exact even for parts of a character.
    pub(crate) fn new(
        first_id: Option<u32>,
        token_logprobs: impl Iterator<Item = &'a TokenLogprobs>,
        top_k: usize,
        tokenizer: &'a Tokenizer,
        as_ids: bool,
    ) -> Self {
        let name = |id: u32, is_first: bool| {
            if as_ids {
                Cow::Owned(format!("token_id:{id}"))
            } else {
                TokenLogprob::new(id, 0.0, is_first, tokenizer).token
            }
        };
        let mut columns = Self::default();
        let mut characters = CharacterCounter::default();
        let mut push =
            |id: u32, is_first: bool, logprob: Option<f32>, top: Option<TopLogprobs<'a>>| {
                columns.token_logprobs.push(logprob);
                columns.tokens.push(name(id, is_first));
                columns.top_logprobs.push(top);
                columns
                    .text_offset
                    .push(match tokenizer.answer_bytes(id, is_first) {
                        Some(bytes) => characters.add(bytes),
                        None => characters.add(tokenizer.token_name(id).as_bytes()),
                    });
            };
        if let Some(id) = first_id {
            push(id, false, None, None);
        }
        for token in token_logprobs {
            let mut top: Vec<(Cow<str>, f32)> = Vec::with_capacity(token.top.len());
            for &(id, logprob) in token.top.iter().take(top_k) {
                let name = name(id, token.is_first);
                if top.iter().all(|entry| entry.0 != name) {
                    top.push((name, logprob.max(MISSING_LOGPROB)));
                }
            }
            push(
                token.id,
                token.is_first,
                Some(token.logprob.max(MISSING_LOGPROB)),
                Some(TopLogprobs(top)),
            );
        }
        columns
    }
}

/// Counts the characters of a text whose bytes arrive in parts, such as tokens. A part may end within a character.
#[derive(Debug, Default)]
struct CharacterCounter {
    /// Number of complete characters. As in the text, each invalid sequence counts as one replacement character.
    complete: usize,
    /// First bytes of a character whose other bytes have not arrived.
    partial: Vec<u8>,
}

impl CharacterCounter {
    /// Adds the next bytes. Returns the offset of their first character.
    fn add(&mut self, bytes: &[u8]) -> usize {
        let continues = bytes.first().is_none_or(|byte| (0x80..0xc0).contains(byte));
        if !continues && !self.partial.is_empty() {
            self.partial.clear();
            self.complete += 1;
        }
        let offset = self.complete;
        self.partial.extend_from_slice(bytes);
        let complete = self.partial.len() - incomplete_character(&self.partial);
        let text = String::from_utf8_lossy(&self.partial[..complete]);
        self.complete += text.chars().count();
        self.partial.drain(..complete);
        offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_are_split_over_tokens_count_once() {
        let euro = "\u{20ac}".as_bytes();
        for (tokens, offsets) in [
            (vec![b"ab".as_slice(), euro, b"c"], [0, 2, 3]),
            (vec![&euro[..1], &euro[1..], b"c"], [0, 0, 1]),
            (vec![&euro[..2], &euro[2..], euro], [0, 0, 1]),
            // An incomplete character before a letter, in two tokens and in one, and a byte that begins no character.
            (vec![&euro[..2], b"a", b"c"], [0, 1, 2]),
            (vec![b"\xe2\x82a", b"b", b"c"], [0, 2, 3]),
            (vec![b"\x80", b"a", b"c"], [0, 1, 2]),
        ] {
            let mut counter = CharacterCounter::default();
            let counted: Vec<usize> = tokens.iter().map(|token| counter.add(token)).collect();
            assert_eq!(counted, offsets, "{tokens:?}");
        }
    }
}
