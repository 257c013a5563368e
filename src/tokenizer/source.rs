//! Parses `tokenizer.json`: its model, and all other fields as a JSON value that can be changed.
//!
//! Nearly the whole file is vocabulary and merges, up to 30 MB. They are parsed directly into the model, because as
//! JSON values they would take many times that memory.

use std::borrow::Cow;
use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde::de::value::MapDeserializer;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Model, ModelWrapper};

/// Number of words in the model's cache, per thread: enough for the words of a language. With the default, a sixth of
/// this, rare words would be encoded again each time.
const WORD_CACHE: usize = 1 << 16;

/// Maximum length of a piece of a Unigram vocabulary.
const MAX_PIECE_BYTES: usize = 4096;

/// A parsed `tokenizer.json`.
pub(crate) struct TokenizerJson {
    /// The file, with only the [`MODEL_SETTINGS`] under `model`.
    pub json: Value,
    /// The model with its vocabulary.
    pub model: ModelWrapper,
}

/// Fields of the model that the loader reads, in addition to the parsed model.
const MODEL_SETTINGS: [&str; 4] = ["type", "byte_fallback", "unk_token", "unk_id"];

/// Fields that the library's parser of BPE models accepts. It fails on other fields, which future versions may add.
const BPE_FIELDS: [&str; 9] = [
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
    "vocab",
    "merges",
];

type RawFields<'a> = HashMap<Cow<'a, str>, &'a RawValue>;

/// A token of `added_tokens`.
#[derive(Deserialize)]
struct AddedTokenEntry {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

impl TokenizerJson {
    /// Parses `text`, the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// If it is not valid JSON or not a tokenizer.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut fields = fields(text)?;
        let model = fields.remove("model").context("it has no model")?;
        let mut json = values(&fields, |_| true)?;
        if !matches!(json["added_tokens"], Value::Null | Value::Array(_)) {
            bail!("its added_tokens are not a list");
        }
        let fields = self::fields(model.get()).context("in its model")?;
        json["model"] = values(&fields, |name| MODEL_SETTINGS.contains(&name))?;
        let mut model = if json["model"]["type"] == "BPE" {
            let bpe_fields = fields.iter().map(|(name, raw)| (&**name, *raw));
            let bpe_fields = bpe_fields.filter(|(name, _)| BPE_FIELDS.contains(name));
            // Avoids a JSON value of the vocabulary.
            BPE::deserialize(MapDeserializer::new(bpe_fields)).map(ModelWrapper::BPE)
        } else {
            if let Some(vocabulary) = fields
                .get("vocab")
                .filter(|_| json["model"]["type"] == "Unigram")
            {
                check_piece_lengths(vocabulary.get())?;
            }
            serde_json::from_str(model.get())
        }
        .context("in its model")?;
        model.resize_cache(WORD_CACHE);
        Ok(Self { json, model })
    }

    /// Id of a token of the model.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.model.token_to_id(token)
    }
}

/// Builds the tokenizer that [`TokenizerJson::json`] describes, with `model`.
///
/// # Errors
/// If `json` contains an unknown part.
pub(crate) fn build(json: &Value, model: ModelWrapper) -> Result<tokenizers::Tokenizer> {
    let mut json = json.clone();
    // Added tokens are added after the model is set, because their ids depend on it.
    let added: Option<Vec<AddedTokenEntry>> =
        serde_json::from_value(json["added_tokens"].take()).context("in its added_tokens")?;
    let added = added.unwrap_or_default();
    json["added_tokens"] = json!([]);
    json["model"] = json!({"type": "BPE", "vocab": {}, "merges": []});
    let mut tokenizer: tokenizers::Tokenizer = serde_json::from_value(json)?;
    tokenizer.with_model(model);
    let tokens = added.iter().map(|added| added.token.clone());
    tokenizer.add_tokens(tokens).map_err(|e| anyhow!(e))?;
    for AddedTokenEntry { id, token } in &added {
        if let Some(other) = tokenizer
            .token_to_id(&token.content)
            .filter(|other| other != id)
        {
            tracing::warn!(
                "tokenizer.json adds {:?} with id {id}, but its vocabulary and the order of its added tokens give id {other}, \
                 which is used",
                token.content
            );
        }
    }
    tokenizer.with_truncation(None).map_err(|e| anyhow!(e))?;
    tokenizer.with_padding(None);
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// Checks the vocabulary of a Unigram model: the library recurses over the bytes of a piece.
fn check_piece_lengths(vocabulary: &str) -> Result<()> {
    let pieces: Vec<(Cow<'_, str>, f64)> =
        serde_json::from_str(vocabulary).context("in its vocab")?;
    match pieces
        .iter()
        .find(|(piece, _)| piece.len() > MAX_PIECE_BYTES)
    {
        Some((piece, _)) => bail!(
            "its vocabulary has a piece of {} bytes; at most {MAX_PIECE_BYTES} are supported",
            piece.len()
        ),
        None => Ok(()),
    }
}

/// Splits a JSON object into its fields, without parsing their values. Of several fields with the same name, returns
/// the last one.
fn fields(text: &str) -> Result<RawFields<'_>> {
    serde_json::from_str(text).map_err(|error| {
        if error.is_data() {
            anyhow!("it is not a JSON object")
        } else {
            anyhow!(error).context("it is not valid JSON")
        }
    })
}

/// Parses the fields whose names are selected. Returns them as an object.
fn values(fields: &RawFields, is_selected: impl Fn(&str) -> bool) -> Result<Value> {
    let mut values = json!({});
    for (name, raw) in fields.iter().filter(|(name, _)| is_selected(name)) {
        let value = serde_json::from_str(raw.get());
        values[&**name] = value.with_context(|| format!("in its {name}"))?;
    }
    Ok(values)
}
