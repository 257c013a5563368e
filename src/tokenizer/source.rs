//! Parses `tokenizer.json`: its model, and the rest as a JSON value that can be changed.
//!
//! The vocabulary and the merges are nearly the whole file, up to 30 MB. They are read once, directly into the model;
//! as JSON values they would take many times that memory.

use std::borrow::Cow;
use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde::de::value::MapDeserializer;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Model, ModelWrapper};

/// Number of words in the model's cache, per thread: about the words of a language, and six times the default, with
/// which every rare word would be encoded again.
const WORD_CACHE: usize = 1 << 16;

/// A parsed `tokenizer.json`.
pub(crate) struct TokenizerJson {
    /// The whole file, but with only [`SETTINGS`] of the model under `model`.
    pub json: Value,
    /// The model with its vocabulary.
    pub model: ModelWrapper,
}

/// Fields of the model that the loader needs besides the model itself.
const SETTINGS: [&str; 4] = ["type", "byte_fallback", "unk_token", "unk_id"];

/// Known fields of a BPE model. Its reader fails on others, which future versions may write.
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

type Fields<'a> = HashMap<Cow<'a, str>, &'a RawValue>;

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
        json["model"] = values(&fields, |name| SETTINGS.contains(&name))?;
        let mut model = if json["model"]["type"] == "BPE" {
            let known = fields.iter().map(|(name, raw)| (&**name, *raw));
            let known = known.filter(|(name, _)| BPE_FIELDS.contains(name));
            // Reading directly avoids a JSON value of the vocabulary.
            BPE::deserialize(MapDeserializer::new(known)).map(ModelWrapper::BPE)
        } else {
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

/// Builds the tokenizer that `json`, a [`TokenizerJson::json`], describes, with this model.
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
            .filter(|found| found != id)
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

/// Parses the fields of an object. If a name occurs several times, the last one counts.
fn fields(text: &str) -> Result<Fields<'_>> {
    serde_json::from_str(text).map_err(|error| {
        if error.is_data() {
            anyhow!("it is not a JSON object")
        } else {
            anyhow!(error).context("it is not valid JSON")
        }
    })
}

/// Parses the fields with the wanted names into an object.
fn values(fields: &Fields, wanted: impl Fn(&str) -> bool) -> Result<Value> {
    let mut values = json!({});
    for (name, raw) in fields.iter().filter(|(name, _)| wanted(name)) {
        let value = serde_json::from_str(raw.get());
        values[&**name] = value.with_context(|| format!("in its {name}"))?;
    }
    Ok(values)
}
