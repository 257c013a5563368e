//! `tokenizer.json` as it is read: its model, and all else as a value that may be changed.
//!
//! The vocabulary and the merges are nearly all of such a file, up to 30 MB of it. They are read once, straight
//! into the model; as values they would take many times that.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Model, ModelWrapper};

/// Words whose tokens are remembered, on each thread: as many as a language has, and six times as many
/// as by default, after which every rare word would be put together anew.
const REMEMBERED: usize = 1 << 16;

/// A parsed `tokenizer.json`.
pub struct Source {
    /// All of the file, with the model's settings alone under `model`.
    pub json: Value,
    pub model: ModelWrapper,
}

/// What is used of the model's settings.
#[derive(Deserialize, Serialize)]
#[serde(default)]
#[derive(Default)]
struct Settings {
    #[serde(rename = "type")]
    kind: Value,
    byte_fallback: Value,
    unk_token: Value,
    unk_id: Value,
}

impl Source {
    /// Parses `text`, the content of the file at `path`.
    ///
    /// # Errors
    /// If it is no JSON, or no tokenizer.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let fields: HashMap<Cow<str>, &RawValue> = serde_json::from_str(text)
            .with_context(|| format!("{} is no valid JSON", path.display()))?;
        let is_no_tokenizer = || format!("{} is no tokenizer", path.display());
        let mut json = json!({});
        let mut model = None;
        for (name, raw) in fields {
            if name == "model" {
                json["model"] = settings(raw).with_context(is_no_tokenizer)?;
                model = Some(read_model(raw, &json["model"]).with_context(is_no_tokenizer)?);
            } else {
                json[&*name] = serde_json::from_str(raw.get())?;
            }
        }
        let model = model
            .context("it has no model")
            .with_context(is_no_tokenizer)?;
        Ok(Self { json, model })
    }

    /// Id of a token of the model.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.model.token_to_id(token)
    }
}

/// The tokenizer that `json`, as [`Source::json`], describes, with this model.
///
/// # Errors
/// If a part of it is unknown.
pub fn build(json: &Value, model: ModelWrapper) -> Result<tokenizers::Tokenizer> {
    let mut json = json.clone();
    // Their ids depend on the model.
    let added: Option<Vec<AddedToken>> = serde_json::from_value(json["added_tokens"].take())?;
    json["added_tokens"] = json!([]);
    json["model"] = json!({"type": "BPE", "vocab": {}, "merges": []});
    let mut tokenizer: tokenizers::Tokenizer = serde_json::from_value(json)?;
    tokenizer.with_model(model);
    let added = added.unwrap_or_default();
    tokenizer.add_tokens(added).map_err(|e| anyhow!(e))?;
    tokenizer.with_truncation(None).map_err(|e| anyhow!(e))?;
    tokenizer.with_padding(None);
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

fn settings(model: &RawValue) -> Result<Value> {
    let settings: Settings = serde_json::from_str(model.get())?;
    Ok(serde_json::to_value(settings)?)
}

fn read_model(raw: &RawValue, settings: &Value) -> Result<ModelWrapper> {
    let mut model = if settings["type"] == "BPE" {
        // Read directly, it never exists as a value.
        ModelWrapper::BPE(serde_json::from_str::<BPE>(raw.get())?)
    } else {
        serde_json::from_str(raw.get())?
    };
    model.resize_cache(REMEMBERED);
    Ok(model)
}
