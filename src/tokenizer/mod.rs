//! The student's tokenizer: converts between texts, conversations, bytes and token ids.
//!
//! | file | content |
//! |---|---|
//! | `load`, `files`, `source` | read a Hugging Face model folder |
//! | `added` | added tokens: completes their list and finds them in a text |
//! | `pieces` | cache of encoded pieces of text |
//! | `token_bytes` | the exact bytes of each token |
//! | `chat_template` | renders conversations, in a sandbox |
//! | `conversation`, `encoder` | encode conversations, and find the tokens of their answers |
//! | `seq2seq`, `seq2seq_tokens` | sources and answers of an encoder-decoder |
//! | `answer_tokens` | the result: ids and the ranges of the answers |
//!
//! Invariants:
//! - Text never becomes a control token; only a chat template can write control tokens.
//! - The ids of a conversation are those of the whole rendered text, except that an answer is encoded separately, as
//!   the model generates it after the generation prompt.
//! - The ids of a text do not depend on how it is cut into pieces.

pub(crate) mod added;
pub(crate) mod answer_tokens;
pub mod chat_template;
pub(crate) mod conversation;
pub(crate) mod encoder;
pub(crate) mod files;
pub(crate) mod load;
pub(crate) mod pieces;
pub(crate) mod seq2seq;
pub(crate) mod seq2seq_tokens;
pub(crate) mod source;
pub(crate) mod token_bytes;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use serde_json::Value;
use tokenizers::AddedVocabulary;

use crate::exit::Exit;
use crate::prompt::message::Message;
use crate::tokenizer::added::AddedTokenSearch;
pub use crate::tokenizer::answer_tokens::{
    AnswerTokens, EncodedConversation, PromptDifference, ThinkingChange,
};
use crate::tokenizer::chat_template::{ChatTemplate, TemplateClock};
use crate::tokenizer::pieces::{BYTES_PER_TOKEN, PieceCache};
use crate::tokenizer::seq2seq_tokens::Seq2SeqTokens;
use crate::tokenizer::token_bytes::TokenByteMap;

/// A tokenizer with its chat template.
///
/// Control tokens are the tokens that the model folder declares or names as special, the tokens that end an answer if
/// they are added tokens (not white space) or have the name of a control token, and added tokens of the form `<|...|>`.
/// Text never becomes a control token: only a chat template can write one.
#[derive(Debug)]
pub struct Tokenizer {
    dir: PathBuf,
    /// Encodes everything as text, including the names of control tokens.
    text: tokenizers::Tokenizer,
    /// Encodes text that continues other text: like `text`, but without adding a prefix space, and without added tokens
    /// except control tokens. None if `text` does not add a prefix space.
    continuing: Option<tokenizers::Tokenizer>,
    /// True if text after a control token gets the prefix space.
    space_after_control: bool,
    /// Finds the control tokens in template text.
    control: AddedVocabulary,
    /// Detects texts with added tokens that are not control tokens. None if the vocabulary has no such tokens.
    plain_added: Option<AddedTokenSearch>,
    /// Ids of the added tokens after which the tokenizer adds a prefix space, control tokens excluded.
    before_space: HashSet<u32>,
    /// True if a normalizer adds the prefix space before normalised added tokens are matched.
    prepends_by_normalizer: bool,
    /// Ids of the control tokens.
    special: HashSet<u32>,
    unknown: Option<u32>,
    bytes: TokenByteMap,
    stop_ids: Vec<u32>,
    /// See [`Self::find_end_of_turn`]. Empty if the template does not end turns.
    end_of_turn: Box<[u32]>,
    vocab_size: usize,
    /// The chat template, or the source template of an encoder-decoder.
    template: Option<ChatTemplate>,
    /// Set for an encoder-decoder.
    seq2seq: Option<Seq2SeqTokens>,
    /// Tokens that the tokenizer of an encoder-decoder itself adds to a text: before it and after it.
    added_around: [Vec<u32>; 2],
    /// False if `template` is the default template of an encoder-decoder, or there is none.
    has_own_template: bool,
    fingerprint: blake3::Hash,
    /// Name of the template's date, for the fingerprint.
    date: String,
    template_args: BTreeMap<String, Value>,
    /// `student.source_template` of an encoder-decoder.
    source_template: Option<String>,
    /// Cache of encoded pieces of text. None if texts cannot be cut into pieces.
    pieces: Option<PieceCache>,
}

/// Position of a text relative to other tokens, which decides whether the text gets the prefix space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TextPosition {
    /// No token precedes the text.
    First,
    /// The text follows a control token, or another added token after which the tokenizer adds a prefix space.
    AfterControl,
    /// The text follows other text.
    AfterText,
}

impl Tokenizer {
    /// Sets the date that `strftime_now` returns in the chat template.
    pub fn set_date(&mut self, date: TemplateClock) {
        self.date = date.name();
        if let Some(template) = &mut self.template {
            template.set_date(date);
        }
    }

    /// Makes `strftime_now` fail, as it does before [`Self::set_date`].
    pub(crate) fn clear_date(&mut self) {
        self.date.clear();
        if let Some(template) = &mut self.template {
            template.clear_date();
        }
    }

    /// Makes `strftime_now` return the current local time.
    pub(crate) fn use_clock(&mut self) {
        self.set_date(TemplateClock::Clock(|| jiff::Zoned::now().datetime()));
    }

    /// Default values of variables of the chat template.
    pub fn template_args(&self) -> &BTreeMap<String, Value> {
        &self.template_args
    }

    /// Source template that the user has set, for an encoder-decoder.
    pub(crate) fn source_template(&self) -> Option<&str> {
        self.source_template.as_deref()
    }

    /// Returns true if the folder or the user gives the template of the messages.
    pub(crate) fn has_own_template(&self) -> bool {
        self.has_own_template
    }

    /// Folder that the tokenizer was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ids of a text, without special tokens at its beginning and end. The names of control tokens are encoded as text.
    ///
    /// # Errors
    /// If the text contains the name of a control token of the model's own vocabulary, and this name is a single
    /// character or appears only after normalisation.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_at(text, TextPosition::First)
    }

    /// Renders a conversation as text.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.template()?
            .with_date(None)
            .render_text(messages, false)
    }

    /// Text of the tokens `ids`, without control tokens and unknown ids. Invalid UTF-8 becomes U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let ids: Vec<u32> = ids
            .iter()
            .copied()
            .filter(|&id| !self.is_special(id))
            .collect();
        self.text.decode(&ids, true).map_err(|e| anyhow!(e))
    }

    /// Bytes of a token. None for control tokens, for ids outside the vocabulary, and for all tokens of a vocabulary
    /// whose spelling does not determine the bytes (WordPiece).
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.get(id)
    }

    /// Bytes of a token, or the name of a control token, because a template may write one inside an answer.
    pub fn spelling(&self, id: u32) -> Option<Cow<'_, [u8]>> {
        match self.bytes.get(id) {
            Some(bytes) => Some(Cow::Borrowed(bytes)),
            None if self.is_special(id) && self.has_token_bytes() => {
                Some(Cow::Owned(self.token_name(id).into_bytes()))
            }
            None => None,
        }
    }

    /// Token as spelled in the vocabulary; empty for ids outside it. Its text may differ: see [`Self::token_bytes`].
    pub fn token_name(&self, id: u32) -> String {
        self.text.id_to_token(id).unwrap_or_default()
    }

    /// Returns the smallest id that stands for another token or no token in `other`, or for a control token in only one
    /// of the two tokenizers.
    pub(crate) fn first_difference(&self, other: &Self) -> Option<u32> {
        let largest = self.vocab_size.max(other.vocab_size) as u32;
        let differs = |id: &u32| {
            self.text.id_to_token(*id) != other.text.id_to_token(*id)
                || self.is_special(*id) != other.is_special(*id)
        };
        (0..largest).find(differs)
    }

    /// Returns true if the spelling of the vocabulary determines the bytes of its tokens.
    pub(crate) fn has_token_bytes(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Id of the token with exactly these bytes.
    pub fn id_of_bytes(&self, bytes: &[u8]) -> Option<u32> {
        self.bytes.find_id(bytes)
    }

    /// Id of the control token of this name.
    pub fn id_of_control(&self, name: &str) -> Option<u32> {
        self.text
            .token_to_id(name)
            .filter(|&id| self.is_special(id))
    }

    /// First token of the encoding of `bytes` as text that continues other text.
    pub fn first_id_of(&self, bytes: &[u8]) -> Option<u32> {
        let text = std::str::from_utf8(bytes).ok()?;
        let ids = self.encode_at(text, TextPosition::AfterText).ok()?;
        let first = *ids.first()?;
        // Normalisation may have changed the text.
        let first_bytes = self.token_bytes(first)?;
        (!first_bytes.is_empty() && bytes.starts_with(first_bytes)).then_some(first)
    }

    /// Returns true for a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Returns true if the text is the name of a control token.
    pub(crate) fn names_special(&self, text: &str) -> bool {
        self.control.is_special_token(text)
    }

    /// Hash of everything that determines the encoding of conversations.
    pub fn fingerprint(&self) -> blake3::Hash {
        let mut hash = blake3::Hasher::new();
        hash.update(self.fingerprint.as_bytes());
        hash.update(self.date.as_bytes());
        if let Some(Seq2SeqTokens { start, end }) = self.seq2seq {
            hash.update(&start.to_le_bytes());
            hash.update(&end.to_le_bytes());
        }
        hash.finalize()
    }

    /// Largest id + 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Tokens that end an answer.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Token that ends a turn in the chat template.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn.last().copied()
    }

    /// First token that a model generates after its answer: the end-of-turn token, or the first token of the text that
    /// the template writes before it, such as the space of Llama 2's template.
    pub fn end_of_answer(&self) -> Option<u32> {
        self.end_of_turn.first().copied()
    }

    /// Checks that a model with `embedding_rows` rows of embeddings has one for each token.
    ///
    /// # Errors
    /// [`Exit::Usage`] if there are fewer rows than tokens.
    pub fn check_fits(&self, embedding_rows: usize) -> Result<()> {
        if self.vocab_size <= embedding_rows {
            return Ok(());
        }
        bail!(Exit::Usage(format!(
            "the tokenizer in {} has ids up to {}, the model has {embedding_rows} embeddings; \
             set `student.path` to a folder whose tokenizer and weights belong together, or resize \
             the model's embeddings to {} rows",
            self.dir.display(),
            self.vocab_size - 1,
            self.vocab_size,
        )))
    }

    /// Returns the chat template.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the folder has none.
    fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            anyhow!(Exit::Usage(format!(
                "{} has no chat template; add a `chat_template.jinja` there, or the field `chat_template` of \
                 `tokenizer_config.json`",
                self.dir.display()
            )))
        })
    }

    /// Encodes a text, and the added tokens in it, for a position.
    fn encode_at(&self, text: &str, position: TextPosition) -> Result<Vec<u32>> {
        // In a text that is encoded in one piece by `text`, the library finds added tokens itself.
        let is_cut = self.pieces.is_some() || self.continues(position);
        if !is_cut || !self.may_contain_added(text) {
            return self.encode_between_added(text, position);
        }
        let mut ids = Vec::with_capacity(text.len() / BYTES_PER_TOKEN);
        let mut start = 0;
        let mut position = position;
        for (range, id) in self.find_added(text, position) {
            // A token that strips white space may overlap the next one.
            if start < range.start {
                ids.extend(self.encode_between_added(&text[start..range.start], position)?);
            }
            ids.push(id);
            start = start.max(range.end);
            position = self.position_after(&[id]);
        }
        ids.extend(self.encode_between_added(&text[start..], position)?);
        Ok(ids)
    }

    /// Returns true if text at this position is encoded without the prefix space.
    fn continues(&self, position: TextPosition) -> bool {
        let has_space = match position {
            TextPosition::First => true,
            TextPosition::AfterControl => self.space_after_control,
            TextPosition::AfterText => false,
        };
        self.continuing.is_some() && !has_space
    }

    /// Returns the position of the text after `ids`.
    fn position_after(&self, ids: &[u32]) -> TextPosition {
        match ids.last() {
            Some(id) if self.before_space.contains(id) => TextPosition::AfterControl,
            _ => TextPosition::AfterText,
        }
    }

    /// Returns false only if `text` contains no added tokens except control tokens.
    fn may_contain_added(&self, text: &str) -> bool {
        let added = self.plain_added.as_ref();
        added.is_some_and(|added| added.may_be_in(text))
    }

    /// Finds the added tokens in a text. Returns their byte ranges and ids.
    fn find_added(&self, text: &str, position: TextPosition) -> Vec<(Range<usize>, u32)> {
        let vocabulary = self.text.get_added_vocabulary();
        let mut added_tokens = added::find(vocabulary, self.text.get_normalizer(), text);
        // The library adds the prefix space before it matches normalised tokens. A token at the start that matched only
        // with that space is therefore dropped if the text gets no prefix space.
        let needs_prefix_space = |(range, id): &(Range<usize>, u32)| {
            let token = vocabulary.get_added_tokens_decoder().get(id);
            range.start == 0
                && token
                    .is_some_and(|token| token.normalized && token.content == text[range.clone()])
        };
        if self.continues(position)
            && self.prepends_by_normalizer
            && added_tokens.first().is_some_and(needs_prefix_space)
        {
            added_tokens.remove(0);
        }
        added_tokens
    }

    /// Encodes a text without added tokens.
    fn encode_between_added(&self, text: &str, position: TextPosition) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        match &self.pieces {
            // Tokenizers with pieces do not add a prefix space, so the position does not affect the ids.
            Some(pieces) => pieces.encode(text, |piece| self.encode_whole(piece, position)),
            None => self.encode_whole(text, position),
        }
    }

    /// Encodes a text without added tokens, without the cache.
    fn encode_whole(&self, text: &str, position: TextPosition) -> Result<Vec<u32>> {
        let tokenizer = match &self.continuing {
            Some(continuing) if self.continues(position) => continuing,
            _ => &self.text,
        };
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|e| anyhow!(e).context("the tokenizer failed"))?;
        let ids = encoding.get_ids();
        // The unknown token also stands for characters that are not in the vocabulary.
        let is_name = |id: u32| {
            self.is_special(id) && (self.unknown != Some(id) || text.contains(&self.token_name(id)))
        };
        let Some(special) = ids.iter().copied().find(|&id| is_name(id)) else {
            return Ok(ids.to_vec());
        };
        self.encode_without_control(text, position, special)
    }

    /// Encodes a text that contains the name of the control token `special` in the model's own vocabulary. Cuts each
    /// occurrence of the name after its first character, and encodes the parts separately.
    fn encode_without_control(
        &self,
        text: &str,
        position: TextPosition,
        special: u32,
    ) -> Result<Vec<u32>> {
        let name = self.text.id_to_token(special).unwrap_or_default();
        let first_length = name.chars().next().map_or(0, char::len_utf8);
        let occurrences = text.match_indices(&name);
        let cuts: Vec<usize> = match first_length {
            0 => Vec::new(),
            length if length == name.len() => Vec::new(),
            length => occurrences.map(|(start, _)| start + length).collect(),
        };
        if cuts.is_empty() {
            bail!(Exit::Usage(format!(
                "a text contains the token {name:?} (id {special}), which the model in {} declares as a control token \
                 (special, or listed in `eos_token_id` of generation_config.json or config.json): remove it there",
                self.dir.display()
            )));
        }
        let mut ids = Vec::new();
        let mut start = 0;
        let mut position = position;
        for end in cuts.into_iter().chain([text.len()]) {
            // A part may still contain the name, if occurrences overlap, or the name of another control token.
            ids.extend(self.encode_at(&text[start..end], position)?);
            start = end;
            position = TextPosition::AfterText;
        }
        Ok(ids)
    }
}
