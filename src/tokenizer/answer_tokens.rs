//! An encoded conversation: its token ids, and the ranges of its answers.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

/// A conversation of T tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodedConversation {
    /// Token ids (T); of an encoder-decoder, the input of the decoder.
    pub ids: Vec<u32>,
    /// Token ids of the source, which the encoder of an encoder-decoder reads; else empty.
    pub source_ids: Vec<u32>,
    /// The assistant's messages, in order.
    pub answers: Vec<AnswerTokens>,
    /// Set if the generation prompt differs from the text before the last answer in the rendered conversation. In that
    /// case, `ids` begin with the generation prompt.
    pub difference: Option<PromptDifference>,
}

/// An answer in an [`EncodedConversation`]. Ranges of tokens are ranges of the conversation's `ids`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerTokens {
    /// Index of the answer's message.
    pub message: usize,
    /// Byte range of the message's content that the last bytes of `tokens` spell.
    pub text: Range<usize>,
    /// Tokens from the end of the generation prompt to the end of the content. They include text of the template that
    /// the model must generate.
    pub tokens: Range<usize>,
    /// `tokens` and, if the template ends the turn, the tokens up to the one that ends it.
    pub supervised: Range<usize>,
    /// Tokens of the content only.
    pub content: Range<usize>,
    /// End of each of `tokens`, in bytes of the content; None if the bytes of the tokens spell the content.
    pub token_ends: Option<Vec<usize>>,
    /// First token after the thinking, or the first of `tokens` in an answer without thinking.
    pub after_thinking: usize,
    /// True if the ids before `tokens` equal the generation prompt, and the template renders the answer in the same way
    /// at the end of a conversation. Also true if the template rejects conversations that end before the answer.
    pub follows_generation_prompt: bool,
    /// Set if the template does not print the thinking of the message.
    pub thinking: Option<ThinkingChange>,
}

impl AnswerTokens {
    /// Returns the entry of an answer that is not trained as a part of this conversation: all its ranges are empty.
    pub(crate) fn without_tokens(message: usize) -> AnswerTokens {
        AnswerTokens {
            message,
            text: 0..0,
            content: 0..0,
            tokens: 0..0,
            supervised: 0..0,
            token_ends: None,
            after_thinking: 0,
            follows_generation_prompt: false,
            thinking: None,
        }
    }
}

/// The difference between the generation prompt and the text before the answer in the rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PromptDifference {
    /// The part of the generation prompt that differs, shortened.
    pub generation: String,
    /// The part of the text before the answer that differs, shortened.
    pub conversation: String,
}

/// The change of an answer's thinking, if the template does not print it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThinkingChange {
    /// The thinking is written as in the message, although the template drops it.
    Restored,
    /// The thinking is left out, because the generation prompt closes a block of thinking.
    LeftOut,
}

impl fmt::Display for ThinkingChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ThinkingChange::Restored => "with their thinking, which the chat template drops",
            ThinkingChange::LeftOut => {
                "without their thinking, because the generation prompt closes a block of thinking"
            }
        })
    }
}
