//! Files of a student's folder, without the weights. transformers 4 and 5 read the same model from them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::exit::Exit;
use crate::model::config::shape::ModelConfig;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat_template::with_arguments;

/// File that lists the ids of the tokens that end an answer.
const GENERATION_CONFIG: &str = "generation_config.json";

const CHAT_TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Files of the source folder that belong to the tokenizer.
pub(crate) const TOKENIZER_FILES: [&str; 9] = [
    GENERATION_CONFIG,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
];

/// Contents of files by name, and their differences from the source files.
pub(crate) struct StudentFiles {
    pub files: Vec<(&'static str, Vec<u8>)>,
    pub changes: Vec<String>,
}

/// Returns the files of a model whose weights have the type `dtype`. The tokenizer's files are read from `dir`; `card`
/// is the text of the README.
///
/// # Errors
/// If a file cannot be read or its content is not valid.
pub(crate) fn files(
    shape: &ModelConfig,
    dtype: &str,
    (dir, tokenizer): (&Path, &Tokenizer),
    card: &str,
) -> Result<StudentFiles> {
    let (config, config_changes) = shape.to_json(dtype);
    let mut changes: Vec<String> = config_changes
        .into_iter()
        .map(|change| format!("config.json: {change}"))
        .collect();
    let config = serde_json::to_vec_pretty(&config)?;
    let mut files = vec![("config.json", config), ("README.md", card.into())];
    for name in TOKENIZER_FILES {
        let path = dir.join(name);
        if path.exists() {
            let bytes =
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            files.push((name, bytes));
        }
    }
    if set_stop_ids(&mut files, tokenizer.stop_ids())? {
        changes.push(format!(
            "{GENERATION_CONFIG}: eos_token_id lists every token that ends an answer"
        ));
    }
    if let Some(start) = tokenizer.decoder_start() {
        changes.extend(set_decoder_start(&mut files, start)?);
    }
    if dir == tokenizer.dir()
        && let Some(template) = tokenizer.source_template()
    {
        files.retain(|(name, _)| *name != CHAT_TEMPLATE);
        files.push((CHAT_TEMPLATE, template.into()));
        changes.push("chat template: `student.source_template`".into());
    }
    if dir == tokenizer.dir() && !tokenizer.template_args().is_empty() {
        set_template_args(&mut files, tokenizer.template_args())?;
        changes.push("chat template: `student.template_args` are its defaults".into());
    }
    for (name, bytes) in &mut files {
        if *name == TOKENIZER_CONFIG {
            changes.extend(rewrite_tokenizer_config(bytes)?);
        }
    }
    Ok(StudentFiles { files, changes })
}

/// Parses a JSON object, the content of the file `name`.
fn object(name: &str, bytes: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(bytes)
        .map_err(|error| Exit::Usage(format!("{name} is not a valid JSON object: {error}")).into())
}

/// Rewrites tokenizer settings of transformers 5 so that version 4 can read them. Returns a description of the change,
/// or None if no change is needed.
fn rewrite_tokenizer_config(bytes: &mut Vec<u8>) -> Result<Option<String>> {
    /// Class of any `tokenizer.json` in version 5.
    const NEW_CLASS: &str = "TokenizersBackend";
    /// The same class by the name that both versions accept.
    const OLD_CLASS: &str = "PreTrainedTokenizerFast";
    const EXTRA: &str = "extra_special_tokens";
    let mut settings = object(TOKENIZER_CONFIG, bytes)?;
    let has_new_class = settings.get("tokenizer_class").and_then(Value::as_str) == Some(NEW_CLASS);
    let has_list = settings.get(EXTRA).is_some_and(Value::is_array);
    if !has_new_class && !has_list {
        return Ok(None);
    }
    if has_new_class {
        settings.insert("tokenizer_class".into(), OLD_CLASS.into());
    }
    if has_list && let Some(tokens) = settings.remove(EXTRA) {
        settings.insert("additional_special_tokens".into(), tokens);
    }
    *bytes = serde_json::to_vec_pretty(&settings)?;
    Ok(Some(format!(
        "{TOKENIZER_CONFIG}: spelled so that transformers 4 and 5 read it"
    )))
}

/// Writes default values of variables into all chat templates.
fn set_template_args(
    files: &mut [(&str, Vec<u8>)],
    arguments: &BTreeMap<String, Value>,
) -> Result<()> {
    if arguments.is_empty() {
        return Ok(());
    }
    for (name, bytes) in files {
        if *name == CHAT_TEMPLATE {
            *bytes = with_arguments(std::str::from_utf8(bytes)?, arguments)?.into();
        } else if *name == TOKENIZER_CONFIG {
            let mut config: Value = serde_json::from_slice(bytes)?;
            let mut texts = match &mut config["chat_template"] {
                Value::Array(templates) => {
                    let texts = templates.iter_mut().map(|named| &mut named["template"]);
                    texts.collect()
                }
                Value::Null => continue,
                text => vec![text],
            };
            for text in &mut texts {
                let source = text.as_str().unwrap_or_default();
                // A template for tools may use only some of the variables.
                let used = arguments
                    .iter()
                    .filter(|(name, _)| source.contains(name.as_str()));
                let used = used
                    .map(|(name, value)| (name.clone(), value.clone()))
                    .collect();
                **text = with_arguments(source, &used)?.into();
            }
            *bytes = serde_json::to_vec_pretty(&config)?;
        }
    }
    Ok(())
}

/// Adds the first token of the decoder to `generation_config.json`, which is that of a decoder if the tokenizer is from
/// the folder of one. transformers does not generate without it. Returns a description of the change, or None if the
/// file has such a token.
fn set_decoder_start(files: &mut [(&str, Vec<u8>)], start: u32) -> Result<Option<String>> {
    const START: &str = "decoder_start_token_id";
    for (name, bytes) in files.iter_mut() {
        if *name == GENERATION_CONFIG {
            let mut settings = object(GENERATION_CONFIG, bytes)?;
            if settings.get(START).is_some_and(|id| !id.is_null()) {
                return Ok(None);
            }
            settings.insert(START.into(), start.into());
            *bytes = serde_json::to_vec_pretty(&settings)?;
            return Ok(Some(format!("{GENERATION_CONFIG}: {START} = {start}")));
        }
    }
    Ok(None)
}

/// Adds all stop ids to `eos_token_id` in `generation_config.json`. Returns true if the file was changed or
/// added.
fn set_stop_ids(files: &mut Vec<(&str, Vec<u8>)>, stop_ids: &[u32]) -> Result<bool> {
    let index = files
        .iter()
        .position(|(name, _)| *name == GENERATION_CONFIG);
    let mut settings: Map<String, Value> = match index {
        Some(index) => object(GENERATION_CONFIG, &files[index].1)?,
        None => Map::new(),
    };
    let mut ids = match settings.remove("eos_token_id") {
        Some(Value::Array(ids)) => ids,
        None | Some(Value::Null) => Vec::new(),
        Some(id) => vec![id],
    };
    let old_count = ids.len();
    for id in stop_ids.iter().copied().map(Value::from) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    if ids.len() == old_count && index.is_some() {
        return Ok(false);
    }
    settings.insert("eos_token_id".into(), ids.into());
    let text = serde_json::to_vec_pretty(&settings)?;
    match index {
        Some(index) => files[index].1 = text,
        None => files.push((GENERATION_CONFIG, text)),
    }
    Ok(true)
}
