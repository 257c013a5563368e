//! Reads the config and remembers where each value came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use toml::{Table, Value};

use super::mistake::{describe, nearest, usage};
use super::settings::{Config, Init};

const PREFIX: &str = "DISTILL_";
/// For who has lost the way.
const WHERE_KEYS_ARE: &str = "`distill config show` lists every key";

/// A config, and the origin of every value that is not a default.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    /// `section.key` to where it was set.
    pub origins: BTreeMap<String, String>,
}

/// Reads the file at `path`, the `DISTILL_*` variables among `environment` and the `--set` flags.
///
/// # Errors
/// [`crate::exit::Exit::Usage`], with file, line, column and the nearest key, where something does not fit.
pub fn load(
    path: &Path,
    environment: impl Iterator<Item = (String, String)>,
    flags: &[String],
) -> Result<Loaded> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        usage(format!(
            "cannot read the config {}: {error}; copy config.example.toml to start one",
            path.display()
        ))
    })?;
    let mut table = check_file(path, &text)?;
    let mut origins = BTreeMap::new();
    for (section, value) in &table {
        match value {
            Value::Table(keys) => origins.extend(
                keys.keys()
                    .map(|key| (format!("{section}.{key}"), "file".to_string())),
            ),
            _ => {
                origins.insert(section.clone(), "file".into());
            }
        }
    }
    let known = known_keys()?;
    // Sorted, so that the outcome does not depend on the order of the environment.
    let variables: BTreeMap<String, String> = environment
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    for (name, value) in variables {
        let wanted = name[PREFIX.len()..].to_lowercase();
        let variable = |key: &str| key.replace('.', "_");
        let Some(key) = known.iter().find(|key| variable(key) == wanted) else {
            let keys: Vec<String> = known
                .iter()
                .map(|key| format!("{PREFIX}{}", variable(key).to_uppercase()))
                .collect();
            return Err(usage(format!(
                "the environment variable {name} names no setting{}",
                nearest(&name, keys.iter().map(String::as_str), WHERE_KEYS_ARE)
            )));
        };
        set(&mut table, key, &value);
        origins.insert(key.clone(), format!("environment ({name})"));
    }
    for flag in flags {
        let Some((key, value)) = flag.split_once('=') else {
            return Err(usage(format!(
                "--set takes section.key=value, not {flag:?}"
            )));
        };
        let key = key.trim();
        if !known.iter().any(|known| known == key) {
            return Err(usage(format!(
                "--set names no setting: {key}{}",
                nearest(key, known.iter().map(String::as_str), WHERE_KEYS_ARE)
            )));
        }
        set(&mut table, key, value);
        origins.insert(key.to_string(), "flag".into());
    }
    let mut config = Config::deserialize(table)
        .map_err(|error| usage(format!("a value does not fit: {}", error.message())))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    resolve_paths(&mut config, folder);
    validate(&config)?;
    Ok(Loaded { config, origins })
}

/// Parses the text of a config file without looking at anything else.
///
/// # Errors
/// [`crate::exit::Exit::Usage`] with the place of the first mistake.
pub fn parse(path: &Path, text: &str) -> Result<Config> {
    toml::from_str(text).map_err(|error| describe(path, text, &error, WHERE_KEYS_ARE))
}

fn check_file(path: &Path, text: &str) -> Result<Table> {
    parse(path, text)?;
    text.parse()
        .with_context(|| format!("{} is no TOML file", path.display()))
}

/// Every `section.key` that exists.
fn known_keys() -> Result<Vec<String>> {
    // TOML leaves out unset options; JSON shows them as null.
    let json = serde_json::to_value(Config::default()).context("defaults serialise")?;
    let mut keys = Vec::new();
    for (section, value) in json.as_object().into_iter().flatten() {
        match value.as_object() {
            Some(fields) => keys.extend(fields.keys().map(|key| format!("{section}.{key}"))),
            None => keys.push(section.clone()),
        }
    }
    Ok(keys)
}

/// Sets `section.key` to `value`, read as TOML, or as a string where it is none.
fn set(table: &mut Table, key: &str, value: &str) {
    let parsed = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_string()));
    match key.split_once('.') {
        Some((section, key)) => {
            let section = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                section.insert(key.to_string(), parsed);
            }
        }
        None => {
            table.insert(key.to_string(), parsed);
        }
    }
}

fn resolve_paths(config: &mut Config, folder: &Path) {
    let resolve = |path: &mut PathBuf| *path = folder.join(&*path);
    resolve(&mut config.run_dir);
    resolve(&mut config.prompts.source);
    resolve(&mut config.student.path);
    for path in [
        &mut config.prompts.template,
        &mut config.data.source,
        &mut config.data.cache,
        &mut config.eval.source,
        &mut config.eval.teacher_cache,
        &mut config.eval.model,
    ] {
        path.iter_mut().for_each(resolve);
    }
}

/// What types cannot say.
fn validate(config: &Config) -> Result<()> {
    let check = |holds: bool, message: &str| {
        if holds {
            Ok(())
        } else {
            Err(usage(message.to_string()))
        }
    };
    let share = |value: f64| (0.0..=1.0).contains(&value);
    check(
        config.sampling.top_logprobs <= 20,
        "sampling.top_logprobs goes up to 20, the most that endpoints offer",
    )?;
    check(
        config.sampling.max_tokens > 0,
        "sampling.max_tokens must be at least 1",
    )?;
    check(
        config.prompts.samples > 0,
        "prompts.samples must be at least 1",
    )?;
    check(
        config.limits.concurrency > 0,
        "limits.concurrency must be at least 1",
    )?;
    for limit in [
        config.limits.requests_per_minute,
        config.limits.tokens_per_minute,
    ] {
        check(
            limit != Some(0),
            "a limit per minute must be at least 1; leave it out for none",
        )?;
    }
    check(
        config.retry.max_attempts > 0,
        "retry.max_attempts must be at least 1",
    )?;
    let waits = [
        config.retry.base_s,
        config.retry.max_s,
        config.retry.max_outage_s,
        config.teacher.timeout_s,
        config.teacher.connect_timeout_s,
    ];
    check(
        waits
            .iter()
            .all(|s| s.is_finite() && (0.0..=1e9).contains(s)),
        "times in seconds must be finite and not negative",
    )?;
    check(
        share(config.data.validation_share) && config.data.validation_share < 1.0,
        "data.validation_share must be at least 0 and below 1",
    )?;
    check(
        share(config.loss.kd_weight),
        "loss.kd_weight must lie between 0 and 1",
    )?;
    let train = &config.train;
    check(
        train.batch_size > 0 && train.micro_batch_size > 0,
        "train.batch_size and train.micro_batch_size must be at least 1",
    )?;
    check(
        train.steps.is_some() || (train.epochs.is_finite() && train.epochs > 0.0),
        "train.epochs must be above 0",
    )?;
    check(
        train.learning_rate.is_finite() && train.learning_rate >= 0.0,
        "train.learning_rate must be finite and not negative",
    )?;
    check(
        share(train.beta1) && share(train.beta2) && train.beta1 < 1.0 && train.beta2 < 1.0,
        "train.beta1 and train.beta2 must be at least 0 and below 1",
    )?;
    check(
        config.eval.batch_size > 0,
        "eval.batch_size must be at least 1",
    )?;
    let student = &config.student;
    check(
        student.init == Init::Pretrained
            || (student.num_attention_heads > 0
                && student
                    .hidden_size
                    .is_multiple_of(student.num_attention_heads)),
        "student.hidden_size must be a multiple of student.num_attention_heads",
    )
}
