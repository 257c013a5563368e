//! Reading of the config from file, environment and flags, with the origin of each value.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize, Serializer};
use toml::{Table, Value};

use super::error::Mistake;
use super::settings::Config;
use crate::config::error::{describe, line_and_column, nearest, position, usage};

/// Prefix of the environment variables with settings.
const PREFIX: &str = "DISTILL_";
/// Hint in messages about unknown keys.
const KEYS_HINT: &str = "`distill config show` lists every key";

/// A config, with the origin of every value that is not a default.
#[derive(Debug)]
pub struct LoadedConfig {
    pub config: Config,
    /// Origin by `section.key`.
    pub origins: BTreeMap<String, Origin>,
}

/// Source of a value.
#[derive(Debug, Clone, PartialEq)]
pub enum Origin {
    File,
    Flag,
    /// An environment variable, by its name.
    Variable(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File => f.write_str("file"),
            Origin::Flag => f.write_str("flag"),
            Origin::Variable(name) => write!(f, "environment ({name})"),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Reads the file at `path`, the `DISTILL_*` variables in `environment`, and the `--set` flags.
///
/// # Errors
/// [`crate::exit::Exit::Usage`] for the first mistake. The message names its place: the file with line and column, the
/// variable, or `--set`.
pub fn load(
    path: &Path,
    environment: impl Iterator<Item = (OsString, OsString)>,
    flags: &[String],
) -> Result<LoadedConfig> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        usage(format!(
            "cannot read the config {}: {error}; to create a config, copy config.example.toml",
            path.display()
        ))
    })?;
    let mut table = parse_table(path, &text)?;
    let mut origins = BTreeMap::new();
    for (section, value) in &table {
        match value {
            Value::Table(keys) => origins.extend(
                keys.keys()
                    .map(|key| (format!("{section}.{key}"), Origin::File)),
            ),
            _ => {
                origins.insert(section.clone(), Origin::File);
            }
        }
    }
    let keys = all_keys()?;
    // Sorted, so that the first error does not depend on the order of the environment.
    let variables: BTreeMap<String, OsString> = environment
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value))
        .filter(|(name, _)| name.starts_with(PREFIX) && name != crate::log::VARIABLE)
        .collect();
    for (name, value) in variables {
        let suffix = name[PREFIX.len()..].to_lowercase();
        let suffix_of = |key: &str| key.replace('.', "_");
        let Some(key) = keys.iter().find(|key| suffix_of(key) == suffix) else {
            let names: Vec<String> = keys
                .iter()
                .map(|key| format!("{PREFIX}{}", suffix_of(key).to_uppercase()))
                .collect();
            return Err(usage(format!(
                "the environment variable {name} does not match a setting{}",
                nearest(&name, names.iter().map(String::as_str), KEYS_HINT)
            )));
        };
        let value = value.into_string().map_err(|_| {
            usage(format!(
                "the value of the environment variable {name} is not valid UTF-8"
            ))
        })?;
        set(&mut table, key, &value);
        check_value(key, &value, &name)?;
        origins.insert(key.clone(), Origin::Variable(name));
    }
    for flag in flags {
        let Some((key, value)) = flag.split_once('=') else {
            return Err(usage(format!(
                "--set {flag:?} is not valid: expected section.key=value"
            )));
        };
        let key = key.trim();
        if !keys.iter().any(|other| other == key) {
            // The most similar key would be a poor suggestion for a key without its section.
            let in_section = keys
                .iter()
                .find(|other| other.ends_with(&format!(".{key}")));
            let hint = match in_section {
                Some(other) => format!("; did you mean {other:?}?"),
                None => nearest(key, keys.iter().map(String::as_str), KEYS_HINT),
            };
            return Err(usage(format!("--set: `{key}` is not a setting{hint}")));
        }
        set(&mut table, key, value);
        check_value(key, value, "--set")?;
        origins.insert(key.to_string(), Origin::Flag);
    }
    complete_teachers(&mut table);
    let mut config = Config::deserialize(table)
        .map_err(|error| usage(format!("invalid value: {}", error.message())))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    resolve_paths(&mut config, folder);
    config.file = Some(path.to_owned());
    config.flags = flags.to_vec();
    if let Err(mistake) = config.validate() {
        let place = place_of(path, &text, &origins, &mistake);
        return Err(usage(format!("{place}: {}", mistake.message)));
    }
    Ok(LoadedConfig { config, origins })
}

/// Returns the place of a mistake for its message: `--set`, the environment variable, or the position in the file.
fn place_of(
    path: &Path,
    text: &str,
    origins: &BTreeMap<String, Origin>,
    mistake: &Mistake,
) -> String {
    let key: Vec<&str> = mistake.key.split('.').collect();
    let in_file = |keys: &[&str], entry: Option<usize>| {
        let start = position(text, keys, entry)?;
        Some(format!(
            "{}{}",
            path.display(),
            line_and_column(text, start)
        ))
    };
    // In an entry of `[[teachers]]`, `teacher.model` is `model`.
    let own_key = if key[0] == "teacher" { &key[1..] } else { &key };
    let from_outside = |key: &str| match origins.get(key) {
        Some(Origin::Flag) => Some("--set".to_owned()),
        Some(Origin::Variable(name)) => Some(name.clone()),
        Some(Origin::File) | None => None,
    };
    let in_entry = mistake.teacher.and_then(|entry| {
        from_outside("teachers")
            .or_else(|| in_file(&[&["teachers"], own_key].concat(), Some(entry)))
    });
    let in_teacher = || match key[0] {
        "teacher" => None,
        _ => in_file(&[&["teacher"], own_key].concat(), None),
    };
    let in_section = || from_outside(mistake.key).or_else(|| in_file(&key, None));
    // In the order of precedence: the entry of `[[teachers]]`, a table of `[teacher]` such as `teacher.sampling`, the
    // common section.
    in_entry
        .or_else(in_teacher)
        .or_else(in_section)
        .unwrap_or_else(|| path.display().to_string())
}

/// Parses the text of a config file, without the environment and without validation.
///
/// # Errors
/// [`crate::exit::Exit::Usage`] with the position of the first mistake.
pub fn parse(path: &Path, text: &str) -> Result<Config> {
    toml::from_str(text).map_err(|error| describe(path, text, &error, KEYS_HINT))
}

/// Checks the text of a config file as [`parse`] does, and returns it as a table.
fn parse_table(path: &Path, text: &str) -> Result<Table> {
    parse(path, text)?;
    text.parse()
        .with_context(|| format!("{} is not a TOML file", path.display()))
}

/// Returns the name of every setting, as `section.key`.
fn all_keys() -> Result<Vec<String>> {
    // TOML omits unset options; JSON has them as null.
    let json = serde_json::to_value(Config::default())
        .context("internal error: cannot serialise the default config")?;
    let mut keys = Vec::new();
    for (section, value) in json.as_object().into_iter().flatten() {
        match value.as_object() {
            Some(fields) => keys.extend(fields.keys().map(|key| format!("{section}.{key}"))),
            None => keys.push(section.clone()),
        }
    }
    Ok(keys)
}

/// Sets `section.key` to `value`, parsed as TOML, or as a string if it is not valid TOML.
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

/// Checks the type of a value. The error names the setting and `origin`, the source of the value.
fn check_value(key: &str, value: &str, origin: &str) -> Result<()> {
    let mut table = Table::new();
    set(&mut table, key, value);
    Config::deserialize(table).map_err(|error| {
        let message = error.message();
        usage(format!(
            "{origin}: `{key}` = {value:?} is not valid: {message}"
        ))
    })?;
    Ok(())
}

/// Copies defaults into the teachers. Keys that an entry of `[[teachers]]` omits come from `[teacher]`. Keys that the
/// `sampling`, `limits` or `price` table of a teacher omits come from the section with the same name.
fn complete_teachers(table: &mut Table) {
    let section = |name: &str| match table.get(name) {
        Some(Value::Table(section)) => section.clone(),
        _ => Table::new(),
    };
    let mut common = section("teacher");
    // Only `[teacher]` may be a local teacher: entries of `[[teachers]]` do not inherit these keys.
    for name in ["local", "cotrain", "cotrain_rate"] {
        common.remove(name);
    }
    let sections = ["sampling", "limits", "price"].map(|name| (name, section(name)));
    let complete = |teacher: &mut Table| {
        for (name, section) in &sections {
            if let Some(Value::Table(values)) = teacher.get_mut(*name) {
                fill(values, section);
            }
        }
    };
    for (name, value) in table.iter_mut() {
        match (name.as_str(), value) {
            ("teacher", Value::Table(teacher)) => complete(teacher),
            ("teachers", Value::Array(teachers)) => {
                for teacher in teachers.iter_mut().filter_map(Value::as_table_mut) {
                    fill(teacher, &common);
                    complete(teacher);
                }
            }
            _ => {}
        }
    }
}

/// Inserts the defaults of the keys that `values` does not have.
fn fill(values: &mut Table, defaults: &Table) {
    for (key, value) in defaults {
        values.entry(key).or_insert_with(|| value.clone());
    }
}

/// Prepends `folder`, the folder of the config file, to the relative paths of the config.
fn resolve_paths(config: &mut Config, folder: &Path) {
    let resolve = |path: &mut PathBuf| *path = folder.join(&*path);
    resolve(&mut config.run_dir);
    resolve(&mut config.prompts.source);
    resolve(&mut config.student.path);
    let teachers = config.teachers.iter_mut().chain([&mut config.teacher]);
    for teacher in teachers {
        let files = [
            &mut teacher.api_key_file,
            &mut teacher.ca_file,
            &mut teacher.client_certificate,
        ];
        files.into_iter().flatten().for_each(resolve);
    }
    let teachers = config.teachers.iter_mut().chain([&mut config.teacher]);
    let samplings = teachers.filter_map(|teacher| teacher.sampling.as_mut());
    for sampling in samplings.chain([&mut config.sampling]) {
        sampling.schema.iter_mut().for_each(resolve);
    }
    for path in [
        &mut config.teacher.local,
        &mut config.on_policy.tokenizer,
        &mut config.prompts.template,
        &mut config.data.source,
        &mut config.data.cache,
        &mut config.data.teacher_tokenizer,
        &mut config.eval.source,
        &mut config.eval.teacher_cache,
        &mut config.eval.model,
    ] {
        path.iter_mut().for_each(resolve);
    }
}
