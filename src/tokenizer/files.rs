//! Reads the small files of a model folder that describe its tokenizer, in addition to `tokenizer.json`.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The contents of the small files; null for missing files.
pub(crate) struct TokenizerFiles {
    tokenizer_config: Value,
    special_tokens_map: Value,
    generation_config: Value,
    pub config: Value,
    /// `added_tokens.json` of older folders.
    added_tokens: Value,
    /// The chat template, if the folder has one.
    pub chat_template: Option<String>,
}

impl TokenizerFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// If a file exists but cannot be read or is not valid JSON.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let mut files = Self {
            tokenizer_config: read_json(&dir.join("tokenizer_config.json"))?,
            special_tokens_map: read_json(&dir.join("special_tokens_map.json"))?,
            generation_config: read_json(&dir.join("generation_config.json"))?,
            config: read_json(&dir.join("config.json"))?,
            added_tokens: read_json(&dir.join("added_tokens.json"))?,
            chat_template: read_text(&dir.join("chat_template.jinja"))?,
        };
        if files.chat_template.is_none() {
            files.chat_template = select_template(&files.tokenizer_config["chat_template"]);
        }
        Ok(files)
    }

    /// Returns the hash of `tokenizer`, the text of `tokenizer.json`, and of the used parts of these files.
    ///
    /// # Errors
    /// If the used parts cannot be serialised, which does not happen.
    pub(crate) fn fingerprint(&self, tokenizer: &str) -> Result<blake3::Hash> {
        let used = serde_json::to_vec(&(
            tokenizer,
            &self.chat_template,
            self.special_tokens(),
            ["bos_token", "eos_token", "unk_token"].map(|role| self.token(role)),
            self.eos_token_ids(),
            self.added_tokens(),
        ))?;
        Ok(blake3::hash(&used))
    }

    /// Text of a special token such as `bos_token` or `eos_token`, if it is set.
    pub(crate) fn token(&self, role: &str) -> Option<&str> {
        [&self.tokenizer_config, &self.special_tokens_map]
            .into_iter()
            .find_map(|file| token_text(&file[role]))
    }

    /// Texts of all special tokens that the files name.
    pub(crate) fn special_tokens(&self) -> Vec<&str> {
        let mut tokens = Vec::new();
        for file in [&self.tokenizer_config, &self.special_tokens_map] {
            let Some(fields) = file.as_object() else {
                continue;
            };
            for (name, value) in fields {
                match value {
                    Value::Array(list)
                        if name == "additional_special_tokens"
                            || name == "extra_special_tokens" =>
                    {
                        tokens.extend(list.iter().filter_map(token_text));
                    }
                    _ if name.ends_with("_token") => tokens.extend(token_text(value)),
                    _ => {}
                }
            }
        }
        tokens
    }

    /// Added tokens in `tokenizer_config.json`, or else in `added_tokens.json`, sorted by id, in the format of
    /// `added_tokens` in `tokenizer.json` without `id`.
    pub(crate) fn added_tokens(&self) -> Vec<Value> {
        let flags = ["special", "normalized", "single_word", "lstrip", "rstrip"];
        let mut tokens: Vec<(u64, Value)> = Vec::new();
        if let Some(entries) = self.tokenizer_config["added_tokens_decoder"].as_object() {
            for (id, token) in entries {
                let content = &token["content"];
                let mut entry = json!({"content": content});
                for flag in flags {
                    // The defaults of `AddedToken`: tokens that are not special match normalised text.
                    let default = flag == "normalized" && token["special"] != true;
                    entry[flag] = token[flag].as_bool().unwrap_or(default).into();
                }
                if let (Ok(id), true) = (id.parse(), content.is_string()) {
                    tokens.push((id, entry));
                }
            }
        } else if let Some(entries) = self.added_tokens.as_object() {
            let special = self.special_tokens();
            for (content, id) in entries {
                let is_special = special.contains(&content.as_str());
                let entry = json!({
                    "content": content, "special": is_special, "normalized": !is_special,
                    "single_word": false, "lstrip": false, "rstrip": false,
                });
                tokens.extend(id.as_u64().map(|id| (id, entry)));
            }
        }
        tokens.sort_by_key(|(id, _)| *id);
        tokens.into_iter().map(|(_, token)| token).collect()
    }

    /// Ids of the tokens that end an answer, if `generation_config.json` or `config.json` names them.
    pub(crate) fn eos_token_ids(&self) -> Option<Vec<u32>> {
        [&self.generation_config, &self.config]
            .into_iter()
            .find_map(|file| {
                let ids = match &file["eos_token_id"] {
                    Value::Array(ids) => ids.iter().filter_map(Value::as_u64).collect(),
                    id => Vec::from_iter(id.as_u64()),
                };
                let ids: Vec<u32> = ids
                    .into_iter()
                    .filter_map(|id| id.try_into().ok())
                    .collect();
                (!ids.is_empty()).then_some(ids)
            })
    }
}

/// Returns the text of a token, which is a string or an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// Returns the template in `chat_template`. The field is the template itself, or a list of named templates, of which
/// `default`, or else the first one, is used.
fn select_template(field: &Value) -> Option<String> {
    if let Some(list) = field.as_array() {
        let default = list.iter().find(|entry| entry["name"] == "default");
        let entry = default.or(list.first())?;
        return entry["template"].as_str().map(str::to_owned);
    }
    field.as_str().map(str::to_owned)
}

fn read_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn read_json(path: &Path) -> Result<Value> {
    match read_text(path)? {
        Some(text) => serde_json::from_str(&text)
            .with_context(|| format!("{} is not valid JSON", path.display())),
        None => Ok(Value::Null),
    }
}
