//! `tokenizer.json` as it is read: its model, and all else as a value that may be changed.
//!
//! The vocabulary and the merges are nearly all of such a file, up to 30 MB of it. They are read once, straight
//! into the model; as values they would take many times that.

use std::borrow::Cow;
use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde::de::value::MapDeserializer;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Model, ModelWrapper};

/// Words whose tokens are remembered, on each thread: as many as a language has, and six times as many
/// as by default, after which every rare word would be put together anew.
const REMEMBERED: usize = 1 << 16;

/// A parsed `tokenizer.json`.
pub(crate) struct TokenizerJson {
    /// All of the file, with the model's settings alone under `model`.
    pub json: Value,
    pub model: ModelWrapper,
}

/// Settings of the model that are used besides the model itself.
const SETTINGS: [&str; 4] = ["type", "byte_fallback", "unk_token", "unk_id"];

/// Fields of a BPE model. Its reader fails at others, which versions to come may write.
const OF_BPE: [&str; 9] = [
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
    /// If it is no JSON, or no tokenizer.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut fields = fields(text)?;
        let model = fields.remove("model").context("it has no model")?;
        let mut json = values(&fields, |_| true)?;
        if !matches!(json["added_tokens"], Value::Null | Value::Array(_)) {
            bail!("its added_tokens are no list");
        }
        let fields = self::fields(model.get()).context("in its model")?;
        json["model"] = values(&fields, |name| SETTINGS.contains(&name))?;
        let mut model = if json["model"]["type"] == "BPE" {
            let known = fields.iter().map(|(name, raw)| (&**name, *raw));
            let known = known.filter(|(name, _)| OF_BPE.contains(name));
            // Read directly, it never exists as a value.
            BPE::deserialize(MapDeserializer::new(known)).map(ModelWrapper::BPE)
        } else {
            serde_json::from_str(model.get())
        }
        .context("in its model")?;
        model.resize_cache(REMEMBERED);
        Ok(Self { json, model })
    }

    /// Id of a token of the model.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.model.token_to_id(token)
    }
}

/// The tokenizer that `json`, as [`TokenizerJson::json`], describes, with this model.
///
/// # Errors
/// If a part of it is unknown.
pub(crate) fn build(json: &Value, model: ModelWrapper) -> Result<tokenizers::Tokenizer> {
    let mut json = json.clone();
    // Their ids depend on the model.
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
                "tokenizer.json adds {:?} with id {id}, but by its vocabulary and the order of added tokens the id is \
                 {other}, which is used",
                token.content
            );
        }
    }
    tokenizer.with_truncation(None).map_err(|e| anyhow!(e))?;
    tokenizer.with_padding(None);
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// The fields of an object. Of several with one name, the last.
fn fields(text: &str) -> Result<Fields<'_>> {
    serde_json::from_str(text).map_err(|error| {
        if error.is_data() {
            anyhow!("it is no object of JSON")
        } else {
            anyhow!(error).context("it is no valid JSON")
        }
    })
}

/// Those with these names as an object.
fn values(fields: &Fields, wanted: impl Fn(&str) -> bool) -> Result<Value> {
    let mut values = json!({});
    for (name, raw) in fields.iter().filter(|(name, _)| wanted(name)) {
        let value = serde_json::from_str(raw.get());
        values[&**name] = value.with_context(|| format!("in its {name}"))?;
    }
    Ok(values)
}
