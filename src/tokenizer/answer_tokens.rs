//! A conversation in token ids, with the tokens of its answers.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

/// A conversation of T tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodedConversation {
    /// Token ids (T).
    pub ids: Vec<u32>,
    /// The assistant's messages, in order.
    pub answers: Vec<AnswerTokens>,
    /// Set if the generation prompt differs from the rendered prefix of the last answer. `ids` then begin with the
    /// generation prompt.
    pub difference: Option<PromptDifference>,
}

/// An answer in an [`EncodedConversation`]. Ranges of tokens refer to its `ids`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerTokens {
    /// Index of the message.
    pub message: usize,
    /// Byte range of the content that `tokens` end with.
    pub text: Range<usize>,
    /// Tokens from the end of the generation prompt to the end of the content. They include text of the template that
    /// the model must generate.
    pub tokens: Range<usize>,
    /// `tokens`, and the following ones up to the token that ends the turn, if there is one.
    pub supervised: Range<usize>,
    /// Tokens of the content only.
    pub content: Range<usize>,
    /// First token after the thinking, or the first of `tokens` if there is no thinking.
    pub after_thinking: usize,
    /// True if the ids before `tokens` equal the generation prompt and the answer is rendered as after that prompt, or if
    /// the template rejects such a prompt.
    pub follows_generation_prompt: bool,
    /// Set if the template does not print the thinking of the message.
    pub thinking: Option<ThinkingChange>,
}

impl AnswerTokens {
    /// Returns an answer without tokens, which is trained as a separate example or not at all.
    pub(crate) fn separate(message: usize) -> AnswerTokens {
        AnswerTokens {
            message,
            text: 0..0,
            content: 0..0,
            tokens: 0..0,
            supervised: 0..0,
            after_thinking: 0,
            follows_generation_prompt: false,
            thinking: None,
        }
    }
}

/// The end of the generation prompt, and the different end of the prefix in the rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PromptDifference {
    pub generation: String,
    pub conversation: String,
}

/// How an answer's thinking differs from what the template prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThinkingChange {
    /// The template drops the thinking; it is written as in the message.
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
