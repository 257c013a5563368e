//! The student's tokenizer: text, conversations and bytes to ids and back.

pub(crate) mod added;
pub(crate) mod answer_tokens;
pub mod chat_template;
pub(crate) mod conversation;
pub(crate) mod files;
pub(crate) mod load;
pub(crate) mod pieces;
pub(crate) mod source;
pub(crate) mod token_bytes;
pub(crate) mod writer;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::tokenizer::added::PlainAdded;
use anyhow::{Result, anyhow, bail};
use serde_json::Value;
use tokenizers::AddedVocabulary;

use crate::exit::Exit;
use crate::prompt::message::Message;
pub use crate::tokenizer::answer_tokens::{
    AnswerTokens, EncodedConversation, PromptDifference, ThinkingChange,
};
use crate::tokenizer::chat_template::{ChatTemplate, TemplateClock};
use crate::tokenizer::pieces::PieceCache;
use crate::tokenizer::token_bytes::TokenBytes;

/// A tokenizer with its chat template.
///
/// Control tokens are those that the model folder declares special or names as such, those that end
/// an answer, and added tokens of the form `<|...|>`. Text never becomes one of them: only a chat
/// template can write them.
#[derive(Debug)]
pub struct Tokenizer {
    dir: PathBuf,
    /// Encodes everything as text, control tokens too.
    text: tokenizers::Tokenizer,
    /// The same for text that goes on where other text ends, without the space that `text` puts
    /// before, and without added tokens. None where it puts none.
    continuing: Option<tokenizers::Tokenizer>,
    /// Does text after a control token get that space?
    space_after_control: bool,
    /// Finds the control tokens in template text.
    control: AddedVocabulary,
    /// Finds the other added tokens in any text. None if there are none.
    plain_added: Option<PlainAdded>,
    /// Those of `plain_added` after which the tokenizer adds a prefix space.
    spacing: HashSet<u32>,
    /// True if a normalizer adds the prefix space, before normalised added tokens are matched.
    prepends_by_normalizer: bool,
    special: HashSet<u32>,
    unknown: Option<u32>,
    bytes: TokenBytes,
    stop_ids: Vec<u32>,
    /// See [`Self::find_end_of_turn`]. Empty if the template ends no turn.
    end_of_turn: Box<[u32]>,
    vocab_size: usize,
    template: Option<ChatTemplate>,
    fingerprint: blake3::Hash,
    /// Name of the template's date.
    date: String,
    template_args: BTreeMap<String, Value>,
    /// None where texts must be encoded whole.
    pieces: Option<PieceCache>,
}

/// Where a stretch of text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TextPosition {
    First,
    AfterControl,
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

    /// Makes `strftime_now` return the current local time.
    pub fn use_clock(&mut self) {
        self.set_date(TemplateClock::Clock(|| jiff::Zoned::now().datetime()));
    }

    /// Default values of variables of the chat template.
    pub fn template_args(&self) -> &BTreeMap<String, Value> {
        &self.template_args
    }

    /// The folder that it was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ids of a text, without anything in front or behind. The names of control tokens are text.
    ///
    /// # Errors
    /// If the vocabulary holds a control token of a single character and the text contains it.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_at(text, TextPosition::First)
    }

    /// Renders a conversation as text.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.template()?.at(None).render_text(messages, false)
    }

    /// Text of ids, without control tokens and unknown ids. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's own decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let ids: Vec<u32> = ids
            .iter()
            .copied()
            .filter(|&id| !self.is_special(id))
            .collect();
        self.text.decode(&ids, true).map_err(|e| anyhow!(e))
    }

    /// The bytes of a token. None for control tokens, for ids past the vocabulary, and for all
    /// tokens of a vocabulary that does not tell (WordPiece).
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.get(id)
    }

    /// Bytes of a token, or the name of a control token, which a template may write inside an answer.
    pub fn spelling(&self, id: u32) -> Option<Cow<'_, [u8]>> {
        match self.bytes.get(id) {
            Some(bytes) => Some(Cow::Borrowed(bytes)),
            None if self.is_special(id) && self.tells_bytes() => {
                Some(Cow::Owned(self.token_name(id).into_bytes()))
            }
            None => None,
        }
    }

    /// A token as the vocabulary spells it; empty for ids past it. Not its text: see
    /// [`Self::token_bytes`].
    pub fn token_name(&self, id: u32) -> String {
        self.text.id_to_token(id).unwrap_or_default()
    }

    /// The smallest id that is not the same token in `other`.
    pub fn first_difference(&self, other: &Self) -> Option<u32> {
        let largest = self.vocab_size.max(other.vocab_size) as u32;
        let differs = |id: &u32| {
            self.text.id_to_token(*id) != other.text.id_to_token(*id)
                || self.is_special(*id) != other.is_special(*id)
        };
        (0..largest).find(differs)
    }

    /// Does the vocabulary tell the bytes of its tokens?
    pub fn tells_bytes(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// The token with exactly these bytes.
    pub fn id_of_bytes(&self, bytes: &[u8]) -> Option<u32> {
        self.bytes.find_id(bytes)
    }

    /// The control token of this name.
    pub fn id_of_control(&self, name: &str) -> Option<u32> {
        self.text
            .token_to_id(name)
            .filter(|&id| self.is_special(id))
    }

    /// The token that the encoding of `bytes`, as text that goes on, starts with.
    pub fn first_id_of(&self, bytes: &[u8]) -> Option<u32> {
        let text = std::str::from_utf8(bytes).ok()?;
        let ids = self.encode_at(text, TextPosition::AfterText).ok()?;
        let first = *ids.first()?;
        // Only a token that `bytes` begins with is implied by them.
        let spelled = self.token_bytes(first)?;
        (!spelled.is_empty() && bytes.starts_with(spelled)).then_some(first)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Is this the name of a control token?
    pub fn names_special(&self, text: &str) -> bool {
        self.control.is_special_token(text)
    }

    /// A hash of all that decides how conversations are encoded.
    pub fn fingerprint(&self) -> blake3::Hash {
        let mut hash = blake3::Hasher::new();
        hash.update(self.fingerprint.as_bytes());
        hash.update(self.date.as_bytes());
        hash.finalize()
    }

    /// The largest id + 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The tokens that end an answer.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// The one that ends an answer in the chat template.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn.last().copied()
    }

    /// The token by which a model decides to end its answer: that of the end of turn, or of the text that the
    /// template writes before it, as Llama 2's writes a space.
    pub fn end_of_answer(&self) -> Option<u32> {
        self.end_of_turn.first().copied()
    }

    /// Checks that a model with so many rows of embeddings has one for each token.
    ///
    /// # Errors
    /// [`Exit::Usage`] if not.
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

    /// The chat template.
    fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            anyhow!(Exit::Usage(format!(
                "{} has no chat template; put one into `chat_template.jinja` there, or into the \
                 field `chat_template` of `tokenizer_config.json`",
                self.dir.display()
            )))
        })
    }

    fn encode_at(&self, text: &str, place: TextPosition) -> Result<Vec<u32>> {
        // The library itself finds added tokens in a text that it encodes unchanged.
        let is_cut = self.pieces.is_some() || self.continues(place);
        if !is_cut || !self.may_hold_added(text) {
            return self.encode_stretch(text, place);
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        let (mut at, mut place) = (0, place);
        for (range, id) in self.find_added(text, place) {
            // A token that strips white space may reach into the next one.
            if at < range.start {
                ids.extend(self.encode_stretch(&text[at..range.start], place)?);
            }
            ids.push(id);
            at = at.max(range.end);
            place = self.place_after(&[id]);
        }
        ids.extend(self.encode_stretch(&text[at..], place)?);
        Ok(ids)
    }

    /// Returns true if text at this place is encoded without the prefix space.
    fn continues(&self, place: TextPosition) -> bool {
        let has_space = match place {
            TextPosition::First => true,
            TextPosition::AfterControl => self.space_after_control,
            TextPosition::AfterText => false,
        };
        self.continuing.is_some() && !has_space
    }

    /// Place of the text that follows these ids.
    fn place_after(&self, ids: &[u32]) -> TextPosition {
        match ids.last() {
            Some(id) if self.spacing.contains(id) => TextPosition::AfterControl,
            _ => TextPosition::AfterText,
        }
    }

    /// Returns false only if `text` contains none of `plain_added`.
    fn may_hold_added(&self, text: &str) -> bool {
        let added = self.plain_added.as_ref();
        added.is_some_and(|added| added.may_be_in(text))
    }

    /// Finds `plain_added` in a text: byte ranges and ids.
    fn find_added(&self, text: &str, place: TextPosition) -> Vec<(Range<usize>, u32)> {
        let vocabulary = self.text.get_added_vocabulary();
        let mut found = added::find(vocabulary, self.text.get_normalizer(), text);
        // Some match only after a space, and here the normalizer prepended it.
        let is_by_prefix = |(range, id): &(Range<usize>, u32)| {
            let token = vocabulary.get_added_tokens_decoder().get(id);
            range.start == 0
                && token
                    .is_some_and(|token| token.normalized && token.content == text[range.clone()])
        };
        if self.continues(place)
            && self.prepends_by_normalizer
            && found.first().is_some_and(is_by_prefix)
        {
            found.remove(0);
        }
        found
    }

    /// Encodes a text that contains none of `plain_added`.
    fn encode_stretch(&self, text: &str, place: TextPosition) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        match &self.pieces {
            // No tokenizer that knows pieces puts a space before a text: the place is no matter.
            Some(pieces) => pieces.encode(text, |piece| self.encode_whole(piece, place)),
            None => self.encode_whole(text, place),
        }
    }

    fn encode_whole(&self, text: &str, place: TextPosition) -> Result<Vec<u32>> {
        let tokenizer = match &self.continuing {
            Some(continuing) if self.continues(place) => continuing,
            _ => &self.text,
        };
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|e| anyhow!(e).context("the tokenizer fails"))?;
        let ids = encoding.get_ids();
        let Some(special) = ids.iter().copied().find(|&id| self.is_special(id)) else {
            return Ok(ids.to_vec());
        };
        self.encode_around(text, place, special, ids)
    }

    /// Encodes a text of which the model's own vocabulary made the control token `special`: cuts
    /// the token's name in two, so that no piece can be it.
    fn encode_around(
        &self,
        text: &str,
        place: TextPosition,
        special: u32,
        ids: &[u32],
    ) -> Result<Vec<u32>> {
        let name = self.text.id_to_token(special).unwrap_or_default();
        let first = name.chars().next().map_or(0, char::len_utf8);
        match text.find(&name) {
            Some(at) if first > 0 && first < name.len() => {
                let (left, right) = text.split_at(at + first);
                let mut ids = self.encode_at(left, place)?;
                ids.extend(self.encode_at(right, TextPosition::AfterText)?);
                Ok(ids)
            }
            // The unknown token stands for characters that the vocabulary lacks.
            None if Some(special) == self.unknown => Ok(ids.to_vec()),
            _ => bail!(Exit::Usage(format!(
                "plain text makes the token {name:?} (id {special}), which is a control token of the model in {}: special, \
                 or listed in `eos_token_id` of its generation_config.json or config.json. Take it out there",
                self.dir.display()
            ))),
        }
    }
}
