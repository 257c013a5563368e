//! Prompts and answers of an encoder-decoder, such as T5: the encoder reads the prompt as a source text, and the decoder
//! begins the answer with a token of its own.
//!
//! ```text
//! source: the messages before the answer, by the source template, within the tokens that the tokenizer itself adds to
//!         a text; the end token if it adds none after it
//! decoder: the start token, the answer, the end token
//! ```
//!
//! The source template is the chat template of the folder, or [`DEFAULT_TEMPLATE`](super::seq2seq_tokens::DEFAULT_TEMPLATE).

use std::ops::Range;

use anyhow::{Result, anyhow, bail};

use crate::exit::Exit;
use crate::prompt::message::Message;
use crate::tokenizer::answer_tokens::{AnswerTokens, EncodedConversation};
use crate::tokenizer::chat_template::{ChatTemplate, answer_start};
use crate::tokenizer::conversation;
use crate::tokenizer::seq2seq_tokens::Seq2SeqTokens;
use crate::tokenizer::{TextPosition, Tokenizer};

impl Tokenizer {
    /// Returns true for the tokenizer of an encoder-decoder.
    pub fn is_encoder_decoder(&self) -> bool {
        self.seq2seq.is_some()
    }

    /// First token of the decoder's input, of an encoder-decoder.
    pub fn decoder_start(&self) -> Option<u32> {
        self.seq2seq.map(|tokens| tokens.start)
    }

    /// Ids of a prompt that is a text, not a conversation. The source of an encoder-decoder ends with the end token.
    ///
    /// # Errors
    /// As [`Self::encode_text`].
    pub fn encode_text_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode_text(text)?;
        Ok(match self.seq2seq {
            Some(tokens) => self.source(tokens, ids),
            None => ids,
        })
    }

    /// Bytes that a token adds to an answer. The tokenizer of an encoder-decoder writes a space before each text, which
    /// is not part of the answer: it is removed from the first token.
    pub fn answer_bytes(&self, id: u32, is_first: bool) -> Option<&[u8]> {
        let bytes = self.token_bytes(id)?;
        match bytes {
            [b' ', rest @ ..] if is_first && self.seq2seq.is_some() => Some(rest),
            _ => Some(bytes),
        }
    }

    /// Checks that `student.source_template` prints the contents of a conversation.
    ///
    /// # Errors
    /// [`Exit::Usage`] if it fails for every conversation that is tried, or prints the same text for two of them.
    pub(super) fn check_source_template(&self) -> Result<()> {
        let Some(source) = self.source_template() else {
            return Ok(());
        };
        let template = self.template()?.with_date(None);
        let roles: [&[&str]; 3] = [
            &["user"],
            &["system", "user"],
            &["user", "assistant", "user"],
        ];
        let render = |roles: &[&str], word: &str| {
            let messages = roles.iter().map(|role| Message::new(*role, word));
            template.render_text(&messages.collect::<Vec<_>>(), true)
        };
        let mut last_error = None;
        for roles in roles {
            match (render(roles, "first"), render(roles, "second")) {
                (Ok(first), Ok(second)) if first != second => return Ok(()),
                (Err(error), _) => last_error = Some(format!("{error:#}")),
                _ => {}
            }
        }
        let problem = last_error.map_or_else(
            || "prints the same text for all messages: use the variable `messages`, as in {{ messages[-1]['content'] }}".into(),
            |error| format!("fails: {error}"),
        );
        bail!(Exit::Usage(format!(
            "`student.source_template` {source:?} {problem}"
        )))
    }

    /// Encodes the source of `messages`.
    pub(super) fn encode_source(
        &self,
        tokens: Seq2SeqTokens,
        template: &ChatTemplate,
        messages: &[Message],
    ) -> Result<Vec<u32>> {
        let ids = conversation::encode_template(self, template, messages)?;
        Ok(self.source(tokens, ids))
    }

    /// Adds the tokens around the text of a source, unless a template has written them.
    fn source(&self, tokens: Seq2SeqTokens, text: Vec<u32>) -> Vec<u32> {
        let [before, after] = &self.added_around;
        // A tokenizer without a post-processor adds no end.
        let after = if after.is_empty() {
            &[tokens.end]
        } else {
            after.as_slice()
        };
        let mut ids = if text.starts_with(before) {
            text
        } else {
            [before.as_slice(), &text].concat()
        };
        if !ids.ends_with(after) {
            ids.extend(after);
        }
        ids
    }

    /// Returns true for the source of messages without any text.
    pub(crate) fn is_empty_source(&self, source: &[u32]) -> bool {
        source
            .iter()
            .all(|&id| self.is_special(id) && !self.is_unknown(id))
    }

    /// Returns true if the tokenizer itself, as transformers calls it, ends a source.
    pub(crate) fn ends_sources(&self) -> bool {
        let [_, after] = &self.added_around;
        !after.is_empty()
    }

    /// Encodes the last answer of a conversation after its source. Earlier answers are part of the source.
    pub(super) fn encode_seq2seq(
        &self,
        tokens: Seq2SeqTokens,
        template: &ChatTemplate,
        messages: &[Message],
    ) -> Result<EncodedConversation> {
        let answers = messages.iter().enumerate();
        let answers = answers.filter(|(_, message)| message.role == "assistant");
        let mut answers: Vec<AnswerTokens> = answers
            .map(|(index, _)| AnswerTokens::without_tokens(index))
            .collect();
        let Some(last) = answers.last_mut() else {
            bail!("the conversation has no message of the role `assistant`");
        };
        let source_ids = self.encode_source(tokens, template, &messages[..last.message])?;
        let content = &messages[last.message].content;
        let (answer_ids, ends) = self.encode_with_ends(content)?;
        let ids = [&[tokens.start], answer_ids.as_slice(), &[tokens.end]].concat();
        let text = 1..1 + answer_ids.len();
        let thinking = answer_start(content);
        *last = AnswerTokens {
            message: last.message,
            text: 0..content.len(),
            content: text.clone(),
            supervised: text.start..text.end + 1,
            after_thinking: match &ends {
                Some(ends) => text.start + ends.partition_point(|&end| end <= thinking),
                None => text.start,
            },
            tokens: text,
            token_ends: ends,
            follows_generation_prompt: true,
            thinking: None,
        };
        Ok(EncodedConversation {
            ids,
            source_ids,
            answers,
            difference: None,
        })
    }

    /// Ids of a text, and the end of each token in bytes of the text. The ends are None if the text contains the name of
    /// a control token, which is encoded in parts.
    fn encode_with_ends(&self, text: &str) -> Result<(Vec<u32>, Option<Vec<usize>>)> {
        let ids = self.encode_at(text, TextPosition::First)?;
        let encoding = self.text.encode(text, false);
        let encoding = encoding.map_err(|e| anyhow!(e).context("the tokenizer failed"))?;
        let offsets = encoding.get_ids().iter().zip(encoding.get_offsets());
        let offsets = offsets.map(|(&id, &(start, end))| {
            // The space that the tokenizer writes before a word has the offsets of the word's first character.
            let is_space = self.token_bytes(id) == Some(b" ");
            let is_before_word = || {
                text.get(start..end)
                    .is_some_and(|part| !part.trim().is_empty())
            };
            if is_space && is_before_word() {
                start..start
            } else {
                start..end
            }
        });
        let ends = token_ends(text, &offsets.collect::<Vec<_>>());
        let is_same = encoding.get_ids() == ids;
        Ok((ids, is_same.then_some(ends)))
    }

    /// Returns true for the token that stands for characters that the vocabulary cannot spell.
    pub fn is_unknown(&self, id: u32) -> bool {
        self.unknown == Some(id)
    }
}

/// Returns the end of each token in bytes of `text`, from the range of the characters that the token was made of.
///
/// Normalisation makes one character of several, or drops some: the characters between two tokens belong to the former,
/// but not white space. It also makes several of one: tokens that share a character get the same end.
fn token_ends(text: &str, offsets: &[Range<usize>]) -> Vec<usize> {
    let mut ends: Vec<usize> = offsets.iter().map(|range| range.end).collect();
    // Start and end of the next token.
    let mut next = [text.len(); 2];
    for (end, range) in ends.iter_mut().zip(offsets).rev() {
        let [next_start, next_end] = next;
        if next_start < *end {
            *end = next_end;
        } else if let Some(between) = text.get(*end..next_start) {
            *end += between.trim_end().len();
        }
        next = [range.start, *end];
    }
    ends
}
