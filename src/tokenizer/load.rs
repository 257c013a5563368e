//! Loads a model folder's tokenizer, with the changes that keep control tokens out of text.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use tokenizers::Model;

use crate::config::{self, StudentInit, StudentType};
use crate::exit::Exit;
use crate::ops::process;
use crate::prompt::control_tokens::is_control_name;
use crate::tokenizer::added::{self, AddedTokenSearch};
use crate::tokenizer::chat_template::{TOKEN_VARIABLES, with_arguments};
use crate::tokenizer::files::TokenizerFiles;
use crate::tokenizer::pieces::PieceCache;
use crate::tokenizer::seq2seq_tokens::{DEFAULT_TEMPLATE, Seq2SeqTokens};
use crate::tokenizer::source::{self, TokenizerJson};
use crate::tokenizer::token_bytes::{TokenByteMap, has_part};
use crate::tokenizer::{ChatTemplate, Tokenizer};

/// Maximum size of a vocabulary. A larger id means a damaged file, and its table would exhaust the memory.
const MAX_VOCABULARY: usize = 1 << 24;

impl Tokenizer {
    /// Loads `tokenizer.json`, the chat template (`chat_template.jinja`, or the field of
    /// `tokenizer_config.json`) and the special tokens from a Hugging Face model folder.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing, or it or another of these files is damaged. A missing chat template is an error
    /// only once a conversation is encoded.
    pub fn load(dir: &Path) -> Result<Self> {
        load(dir, &LoadOptions::default())
    }

    /// Loads the tokenizer of a student with the variables and the date of its chat template.
    ///
    /// # Errors
    /// As [`Self::load`], and [`Exit::Usage`] if `student.path` has no `tokenizer.json`.
    pub fn for_student(settings: &config::StudentConfig) -> Result<Self> {
        if !settings.path.join("tokenizer.json").exists() {
            let advice = missing_tokenizer_advice(&settings.path);
            bail!(Exit::Usage(format!(
                "`student.path` = {} has no tokenizer.json: {}",
                settings.path.display(),
                advice.unwrap_or("set it to the student's Hugging Face folder".into())
            )));
        }
        let options = LoadOptions {
            template_args: settings.template_args.clone(),
            source_template: settings.source_template.clone(),
            is_encoder_decoder: match settings.init {
                StudentInit::Random => Some(settings.model_type == StudentType::T5),
                StudentInit::Pretrained | StudentInit::Layers => None,
            },
        };
        let mut tokenizer = load(&settings.path, &options)?;
        if let Some(date) = settings.template_date {
            tokenizer.set_date(date.into());
        }
        tokenizer.check_source_template()?;
        Ok(tokenizer)
    }
}

/// Returns the advice for a folder without tokenizer.json that has the tokenizer in SentencePiece's format, as older
/// folders of T5 and llama do.
fn missing_tokenizer_advice(dir: &Path) -> Option<String> {
    let files = ["spiece.model", "tokenizer.model"];
    let file = files.iter().find(|file| dir.join(file).exists())?;
    Some(format!(
        "convert its {file} with transformers: `AutoTokenizer.from_pretrained({dir:?}).save_pretrained({dir:?})`"
    ))
}

/// Settings of the student that apply to its tokenizer.
#[derive(Debug, Default)]
pub(crate) struct LoadOptions {
    /// Default values of variables of the chat template.
    pub template_args: BTreeMap<String, Value>,
    /// `student.source_template`.
    pub source_template: Option<String>,
    /// Whether the model is an encoder-decoder; None if `config.json` decides.
    pub is_encoder_decoder: Option<bool>,
}

/// Loads a folder.
pub(crate) fn load(dir: &Path, options: &LoadOptions) -> Result<Tokenizer> {
    let tokenizer = read(dir, options);
    // Reading allocates two strings per merge, more than a million for a large vocabulary.
    process::trim_memory();
    tokenizer
}

fn read(dir: &Path, options: &LoadOptions) -> Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    let json_text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let advice = missing_tokenizer_advice(dir);
            bail!(Exit::Usage(format!(
                "{} does not exist: {}",
                path.display(),
                advice.unwrap_or("a model folder needs a tokenizer.json".into())
            )))
        }
        json_text => json_text.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let invalid = || format!("{} is not a valid tokenizer", path.display());
    let mut tokenizer = TokenizerJson::parse(&json_text).with_context(invalid)?;
    let mut files = TokenizerFiles::read(dir)?;
    let seq2seq = seq2seq_tokens(&files, &tokenizer, options.is_encoder_decoder)?;
    let has_own_template = files.chat_template.is_some() || options.source_template.is_some();
    set_template(&mut files.chat_template, seq2seq, options, dir)?;
    let fingerprint = files.fingerprint(&json_text)?;
    drop(json_text);

    added::add_missing(&mut tokenizer, &files);
    let control_ids = mark_control_tokens(&mut tokenizer, &files);
    let TokenizerJson { json, model } = tokenizer;
    let build = |json: &Value, model| source::build(json, model).with_context(invalid);
    let continuing = without_prefix_space(&json);
    let continuing = continuing
        .map(|json| build(&json, model.clone()))
        .transpose()?;
    let text_tokenizer = build(&json, model)?;
    let added_around = match seq2seq {
        Some(_) => added_around(&text_tokenizer)?,
        None => Default::default(),
    };
    let mut control = text_tokenizer.get_added_vocabulary().clone();
    control.set_encode_special_tokens(false);

    let mut special = control_ids;
    let mut plain_added = Vec::new();
    for (&id, token) in control.get_added_tokens_decoder() {
        if token.special {
            special.insert(id);
        } else {
            plain_added.push((id, token.clone()));
        }
    }
    let stop_ids = files.eos_token_ids().unwrap_or_else(|| {
        let eos = files
            .token("eos_token")
            .and_then(|t| text_tokenizer.token_to_id(t));
        eos.into_iter().collect()
    });
    // An ordinary token, such as a line break, may also end answers. It remains part of texts.
    let is_control = |id: &&u32| {
        text_tokenizer
            .id_to_token(**id)
            .is_some_and(|name| is_control_name(&name))
    };
    special.extend(stop_ids.iter().filter(is_control));

    let vocabulary = text_tokenizer.get_model().get_vocab();
    let ids = vocabulary.values().chain(control.get_vocab().values());
    let vocab_size = ids.max().map_or(0, |&id| id as usize + 1);
    if vocab_size > MAX_VOCABULARY {
        bail!(Exit::Usage(format!(
            "a token in {} has the id {}, which is too large for a vocabulary",
            path.display(),
            vocab_size - 1
        )));
    }
    let unknown = json["model"]["unk_token"]
        .as_str()
        .or(files.token("unk_token"))
        .and_then(|token| text_tokenizer.token_to_id(token))
        .or_else(|| json["model"]["unk_id"].as_u64()?.try_into().ok());
    let space_after_control = !adds_space_only_at_start(&json["pre_tokenizer"]);
    // Added tokens split a text into pieces. The pre-tokenizer `Metaspace` adds its space after all of them are found:
    // each piece gets one. A normalizer adds its space before the added tokens with `normalized` are found: the piece
    // after such a token gets none.
    let is_metaspace = has_part(&json["pre_tokenizer"], "Metaspace");
    let adds_space = space_after_control && continuing.is_some();
    let before_space: HashSet<u32> = plain_added
        .iter()
        .filter(|(_, token)| adds_space && (is_metaspace || !token.normalized))
        .map(|(id, _)| *id)
        .collect();
    // An added token that is also in the vocabulary, such as Gemma's runs of spaces, gets its bytes from its spelling
    // in the vocabulary.
    plain_added
        .retain(|(id, token)| !special.contains(id) && vocabulary.get(&token.content) != Some(id));
    let bytes = TokenByteMap::new(&json, &vocabulary, &plain_added, |id| special.contains(&id));
    let template = files.chat_template.as_deref().map(|source| {
        let tokens = TOKEN_VARIABLES.map(|name| (name, files.token(name)));
        // Templates expect these two variables to be defined.
        let defaults = [("bos_token", Some("")), ("eos_token", Some(""))];
        ChatTemplate::with_tokens(source, defaults.into_iter().chain(tokens))
    });
    let mut tokenizer = Tokenizer {
        dir: dir.into(),
        plain_added: AddedTokenSearch::new(
            text_tokenizer.get_added_vocabulary(),
            &json["normalizer"],
        )?,
        before_space,
        space_after_control,
        prepends_by_normalizer: has_part(&json["normalizer"], "Prepend"),
        text: text_tokenizer,
        continuing,
        control,
        special,
        unknown,
        bytes,
        stop_ids,
        end_of_turn: Box::default(),
        vocab_size,
        template,
        fingerprint,
        date: String::new(),
        pieces: PieceCache::new(&json),
        template_args: options.template_args.clone(),
        seq2seq,
        added_around,
        has_own_template,
        source_template: options.source_template.clone(),
    };
    // The eos token of a base model may differ from the end-of-turn token of its template.
    tokenizer.end_of_turn = tokenizer.find_end_of_turn().unwrap_or_default();
    if let Some(end) = tokenizer.end_of_turn()
        && !tokenizer.stop_ids.contains(&end)
    {
        tokenizer.stop_ids.push(end);
    }
    Ok(tokenizer)
}

/// Returns the tokens that the tokenizer adds before and after a text.
fn added_around(tokenizer: &tokenizers::Tokenizer) -> Result<[Vec<u32>; 2]> {
    let encode = |text, add_special| {
        let encoding = tokenizer.encode(text, add_special);
        let encoding = encoding.map_err(|e| anyhow!(e).context("the tokenizer failed"))?;
        anyhow::Ok(encoding.get_ids().to_vec())
    };
    let (text, with_added) = (encode("a", false)?, encode("a", true)?);
    // A second text, because an added token may be one of the first.
    let (other, other_with_added) = (encode("b", false)?, encode("b", true)?);
    let start = (0..with_added.len()).find(|&start| {
        with_added[start..].starts_with(&text)
            && other_with_added
                .get(start..)
                .is_some_and(|ids| ids.starts_with(&other))
    });
    Ok(match start {
        Some(start) if !text.is_empty() => [
            with_added[..start].to_vec(),
            with_added[start + text.len()..].to_vec(),
        ],
        _ => Default::default(),
    })
}

/// Returns the tokens around the answers of an encoder-decoder; None for a decoder. `is_encoder_decoder` is None if
/// `config.json` decides.
fn seq2seq_tokens(
    files: &TokenizerFiles,
    tokenizer: &TokenizerJson,
    is_encoder_decoder: Option<bool>,
) -> Result<Option<Seq2SeqTokens>> {
    if is_encoder_decoder == Some(false) {
        return Ok(None);
    }
    let from_config = Seq2SeqTokens::from_config(&files.config);
    if let Some(tokens) = from_config {
        return Ok(Some(with_end_of_tokenizer(tokens, files, tokenizer)));
    }
    if is_encoder_decoder.is_none() {
        return Ok(None);
    }
    let id = |role: &str, default: &str| {
        let name = files.token(role).unwrap_or(default);
        tokenizer.id(name).ok_or_else(|| {
            Exit::Usage(format!(
                "the tokenizer of an encoder-decoder needs {role}, and its vocabulary has no {name:?}: set {role} in \
                 tokenizer_config.json"
            ))
        })
    };
    Ok(Some(Seq2SeqTokens {
        start: id("pad_token", "<pad>")?,
        end: id("eos_token", "</s>")?,
    }))
}

/// Returns `tokens` with the tokenizer's eos token as the end, if config.json lists it among others. Warns if it does not
/// list it.
fn with_end_of_tokenizer(
    tokens: Seq2SeqTokens,
    files: &TokenizerFiles,
    tokenizer: &TokenizerJson,
) -> Seq2SeqTokens {
    let name = files.token("eos_token");
    let Some(eos) = name.and_then(|name| tokenizer.id(name)) else {
        return tokens;
    };
    let listed = files.eos_token_ids().unwrap_or_default();
    if eos == tokens.end || listed.contains(&eos) {
        return Seq2SeqTokens { end: eos, ..tokens };
    }
    tracing::warn!(
        "answers end with the token {}, the eos_token_id of config.json, and not with the tokenizer's eos_token, {eos}",
        tokens.end
    );
    tokens
}

/// Sets the template of the messages: the chat template with its arguments, or the source template of an
/// encoder-decoder.
fn set_template(
    template: &mut Option<String>,
    seq2seq: Option<Seq2SeqTokens>,
    options: &LoadOptions,
    dir: &Path,
) -> Result<()> {
    if options.source_template.is_some() && seq2seq.is_none() {
        bail!(Exit::Usage(format!(
            "`student.source_template` is for an encoder-decoder such as T5, and {} is a decoder, whose \
             prompts its chat template formats: remove it",
            dir.display()
        )));
    }
    if seq2seq.is_some() {
        if !options.template_args.is_empty() {
            bail!(Exit::Usage(format!(
                "`student.template_args` are variables of a chat template, and {} is an encoder-decoder: write their \
                 values into `student.source_template`",
                dir.display()
            )));
        }
        if let Some(source) = &options.source_template {
            *template = Some(source.clone());
        }
        template.get_or_insert_with(|| DEFAULT_TEMPLATE.to_owned());
    }
    if let Some(template) = template {
        *template = with_arguments(template, &options.template_args)?;
    }
    Ok(())
}

/// Marks the control tokens in `added_tokens` as special, and adds entries for control tokens that only the other files
/// name. Returns the ids of all marked and added tokens.
fn mark_control_tokens(tokenizer: &mut TokenizerJson, files: &TokenizerFiles) -> HashSet<u32> {
    let special_names: HashSet<&str> = files.special_tokens().into_iter().collect();
    let stop_ids: HashSet<u64> = files
        .eos_token_ids()
        .unwrap_or_default()
        .into_iter()
        .map(u64::from)
        .collect();
    let mut control_ids = HashSet::new();
    let mut added_names = HashSet::new();
    let added = tokenizer.json["added_tokens"].as_array_mut();
    for token in added.into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or_default().to_owned();
        let id = token["id"].as_u64();
        if special_names.contains(content.as_str())
            || (id.is_some_and(|id| stop_ids.contains(&id)) && !content.trim().is_empty())
            || (content.starts_with("<|") && content.ends_with("|>"))
        {
            token["special"] = true.into();
            control_ids.extend(id.and_then(|id| u32::try_from(id).ok()));
        }
        added_names.insert(content);
    }
    for content in special_names {
        let (Some(id), false) = (tokenizer.id(content), added_names.contains(content)) else {
            continue;
        };
        control_ids.insert(id);
        if let Some(added) = tokenizer.json["added_tokens"].as_array_mut() {
            added.push(added::special_entry(content, id.into()));
        }
    }
    control_ids
}

/// Returns the tokenizer without the space that it adds before a text, and without added tokens that are not special.
/// Returns None if the tokenizer does not add a space.
fn without_prefix_space(tokenizer: &Value) -> Option<Value> {
    let mut changed = tokenizer.clone();
    let mut is_removed = false;
    keep_spaces_between_words(&mut changed);
    for part in ["normalizer", "pre_tokenizer"] {
        remove_prefix_space(&mut changed[part], &mut is_removed);
    }
    if let Some(added) = changed["added_tokens"].as_array_mut() {
        added.retain(|token| token["special"] == true);
    }
    is_removed.then_some(changed)
}

/// Replaces the pre-tokenizers of T5, `WhitespaceSplit` and a `Metaspace` that adds a space to each word: without the
/// latter, the former would drop all spaces. The replacement drops the same white space, but keeps one space between two
/// words and before a text that begins with white space.
fn keep_spaces_between_words(tokenizer: &mut Value) {
    if tokenizer["pre_tokenizer"]["type"] == "Sequence" {
        let mut steps = Vec::new();
        flatten(tokenizer["pre_tokenizer"].take(), &mut steps);
        tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps});
    }
    let steps = tokenizer.pointer_mut("/pre_tokenizer/pretokenizers");
    let Some(steps) = steps.and_then(Value::as_array_mut) else {
        return;
    };
    let splits_first = steps
        .first()
        .is_some_and(|step| step["type"] == "WhitespaceSplit");
    let adds_to_words = steps
        .get(1)
        .is_some_and(|step| match step["prepend_scheme"].as_str() {
            Some(scheme) => step["type"] == "Metaspace" && scheme == "always",
            None => step["type"] == "Metaspace" && step["add_prefix_space"] != false,
        });
    if !splits_first || !adds_to_words {
        return;
    }
    steps.remove(0);
    let normalizer = tokenizer["normalizer"].take();
    let before = (!normalizer.is_null()).then_some(normalizer);
    let one_space = json!({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "});
    let no_space_at_end = json!({"type": "Strip", "strip_left": false, "strip_right": true});
    let normalizers: Vec<Value> = before
        .into_iter()
        .chain([one_space, no_space_at_end])
        .collect();
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": normalizers});
}

/// Appends a pre-tokenizer to `steps`: a sequence as its steps.
fn flatten(mut pre_tokenizer: Value, steps: &mut Vec<Value>) {
    match pre_tokenizer["pretokenizers"].take() {
        Value::Array(inner) => inner.into_iter().for_each(|step| flatten(step, steps)),
        _ => steps.push(pre_tokenizer),
    }
}

/// Removes the step that adds a space before a text, and sets `is_removed` if there was one.
fn remove_prefix_space(part: &mut Value, is_removed: &mut bool) {
    match part["type"].as_str() {
        Some("Prepend") => {
            *is_removed = true;
            *part = Value::Null;
        }
        Some("Metaspace") if part["prepend_scheme"] != "never" => {
            *is_removed = true;
            part["prepend_scheme"] = "never".into();
            part["add_prefix_space"] = false.into();
        }
        Some("ByteLevel") if part["add_prefix_space"] == true => {
            *is_removed = true;
            part["add_prefix_space"] = false.into();
        }
        Some("Sequence") => {
            for steps in ["normalizers", "pretokenizers"] {
                if let Some(steps) = part[steps].as_array_mut() {
                    steps
                        .iter_mut()
                        .for_each(|step| remove_prefix_space(step, is_removed));
                    steps.retain(|step| !step.is_null());
                }
            }
        }
        _ => {}
    }
}

/// Returns true for `Metaspace` with the scheme `first`, which adds the space only at the start of a text. Everything
/// else that adds a space also adds it after each control token.
fn adds_space_only_at_start(pre_tokenizer: &Value) -> bool {
    has_part(pre_tokenizer, "Metaspace") && pre_tokenizer.to_string().contains(r#""first""#)
}
