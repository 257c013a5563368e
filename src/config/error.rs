//! Error messages for mistakes in a TOML file, with their position and a hint.

use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::exit::Exit;

/// Maximum number of valid keys that a message lists.
const MAX_LISTED_KEYS: usize = 12;

/// Jaro-Winkler similarity, from 0 to 1, that a suggested key must exceed.
const MIN_SIMILARITY: f64 = 0.7;

/// A mistake in the value of a setting.
#[derive(Debug, PartialEq)]
pub(crate) struct Mistake {
    /// Name of the setting, as `section.key`.
    pub key: &'static str,
    /// Index of the entry in `[[teachers]]` that contains the mistake; None outside `[[teachers]]`.
    pub teacher: Option<usize>,
    pub message: String,
}

impl Mistake {
    pub(crate) fn new(key: &'static str, message: impl Into<String>) -> Mistake {
        Mistake {
            key,
            teacher: None,
            message: message.into(),
        }
    }
}

/// Formats an error in `text`, the content of `path`, with file, line and column. For an unknown key, the message
/// suggests the most similar valid key. If none is similar, it ends with `hint`, after a list of the valid keys if
/// there are at most [`MAX_LISTED_KEYS`].
pub(crate) fn describe(
    path: &Path,
    text: &str,
    error: &toml::de::Error,
    hint: &str,
) -> anyhow::Error {
    let place = error
        .span()
        .map_or(String::new(), |span| line_and_column(text, span.start));
    let message = error.message();
    // serde's message: unknown field `x`, expected one of `a`, `b`
    let details = match message.strip_prefix("unknown field `") {
        Some(quoted_names) => {
            let mut names = quoted_names.split('`').step_by(2);
            let unknown = names.next().unwrap_or_default();
            let valid: Vec<&str> = names.collect();
            let list_and_hint = format!("valid keys are {}; {hint}", valid.join(", "));
            let hint = if valid.len() <= MAX_LISTED_KEYS {
                &list_and_hint
            } else {
                hint
            };
            return usage(format!(
                "{}{place}: unknown key {unknown:?}{}",
                path.display(),
                nearest(unknown, valid.into_iter(), hint)
            ));
        }
        None => message.replace('\n', " "),
    };
    let key = error
        .span()
        .and_then(|span| key_at(text, &span))
        .map_or(String::new(), |key| format!("`{key}`: "));
    usage(format!("{}{place}: {key}{details}", path.display()))
}

/// Formats the position of a byte as `:line:column`, both from 1.
pub(crate) fn line_and_column(text: &str, byte: usize) -> String {
    let before = &text[..byte.min(text.len())];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!(":{line}:{column}")
}

/// Returns the byte at which the value of a key starts in a TOML file. `keys` are the names of the tables and the key;
/// `entry` is the index of the table in an array of tables. None if the file does not set the key.
pub(crate) fn position(text: &str, keys: &[&str], entry: Option<usize>) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let (last, sections) = keys.split_last()?;
    for section in sections {
        table = match table.get(*section)?.get_ref() {
            DeValue::Table(table) => table,
            DeValue::Array(tables) => tables.get(entry?)?.get_ref().as_table()?,
            _ => return None,
        };
    }
    Some(table.get(*last)?.span().start)
}

/// Returns the `section.key` of the value at `span`. None if the text is not TOML, or has no value at `span`.
fn key_at(text: &str, span: &Range<usize>) -> Option<String> {
    let document = DeTable::parse(text).ok()?;
    let mut keys = Vec::new();
    key_in_table(document.get_ref(), span, &mut keys).then(|| keys.join("."))
}

/// Appends the names of the tables and of the key that lead to the value at `span`. Returns false if `table` does not
/// contain the span. All inner tables are searched, because the span of a table covers only its header.
fn key_in_table<'t>(table: &'t DeTable, span: &Range<usize>, keys: &mut Vec<&'t str>) -> bool {
    let contains_span = |value: &Spanned<DeValue>| {
        let outer = value.span();
        outer.start <= span.start && span.end <= outer.end
    };
    for (key, value) in table {
        keys.push(key.get_ref());
        let is_in_value = match value.get_ref() {
            DeValue::Table(table) => key_in_table(table, span, keys) || contains_span(value),
            DeValue::Array(entries) => {
                let mut tables = entries
                    .iter()
                    .filter_map(|entry| entry.get_ref().as_table());
                tables.any(|table| key_in_table(table, span, keys)) || contains_span(value)
            }
            _ => contains_span(value),
        };
        if is_in_value {
            return true;
        }
        keys.pop();
    }
    false
}

/// Returns `; did you mean ...?` with the candidate that is most similar to `word`, or `; ` and `otherwise` if none is
/// similar.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl Iterator<Item = &'a str>,
    otherwise: &str,
) -> String {
    candidates
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(similarity, _)| *similarity > MIN_SIMILARITY)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(format!("; {otherwise}"), |(_, best)| {
            format!("; did you mean {best:?}?")
        })
}

/// Returns an [`Exit::Usage`] error, with API keys in the message replaced by `[key]`.
pub(crate) fn usage(message: String) -> anyhow::Error {
    // The message may quote an API key that was written into the wrong field.
    Exit::Usage(hide_keys(&message)).into()
}

/// Replaces API keys of well-known providers in a message by `[key]`. A key may follow any character that is not an
/// ASCII letter or digit, and an escaped line break or tab of a quoted value.
pub(crate) fn hide_keys(text: &str) -> String {
    replace_keys(text, |before| {
        let is_escaped = ["\\n", "\\t", "\\r"]
            .iter()
            .any(|end| before.ends_with(end));
        is_escaped || !before.ends_with(|c: char| c.is_ascii_alphanumeric())
    })
}

/// Returns true if a word of the text is an API key of a well-known provider.
pub(crate) fn contains_key(text: &str) -> bool {
    replace_keys(text, |before| !before.ends_with(is_key_char)) != text
}

/// Replaces API keys by `[key]`. `may_start_after` returns true if a key may start after the given text.
fn replace_keys(text: &str, may_start_after: impl Fn(&str) -> bool) -> String {
    let mut replaced = String::with_capacity(text.len());
    let mut remaining = text;
    while let Some(next) = remaining.chars().next() {
        let position = text.len() - remaining.len();
        let end = remaining.find(|c| !is_key_char(c));
        let word = &remaining[..end.unwrap_or(remaining.len())];
        let is_key = word.len() >= MIN_KEY_LENGTH
            && KEY_PREFIXES.iter().any(|prefix| word.starts_with(prefix))
            && word.bytes().any(|byte| byte.is_ascii_digit())
            && may_start_after(&text[..position]);
        if is_key {
            replaced.push_str("[key]");
            remaining = &remaining[word.len()..];
        } else {
            replaced.push(next);
            remaining = &remaining[next.len_utf8()..];
        }
    }
    replaced
}

fn is_key_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// Minimum length of an API key in bytes; shorter texts are placeholders or names.
pub(crate) const MIN_KEY_LENGTH: usize = 16;

/// Prefixes of the API keys of well-known providers.
pub(crate) const KEY_PREFIXES: [&str; 14] = [
    "sk-", "sk_", "gsk_", "hf_", "xai-", "pplx-", "AIza", "r8_", "nvapi-", "fw_", "tgp_", "csk-",
    "ya29.", "eyJ",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_hidden_wherever_they_start() {
        let key = "sk-proj-Ab12Cd34Ef56Gh78";
        for text in [
            key.to_owned(),
            format!("`teacher.headers.{key}`"),
            format!("{:?}", format!("\n{key}")),
            format!("{:?}", format!("x\t{key}\r{key}")),
            format!("ü{key}"),
        ] {
            assert!(!hide_keys(&text).contains("Ab12"), "{}", hide_keys(&text));
        }
        for text in [
            "task-proj-Ab12Cd34Ef56Gh78",
            "sk-learn",
            "é sk-sentence-pair-model",
        ] {
            assert_eq!(hide_keys(text), text);
        }
        assert!(contains_key(key) && !contains_key("https://api.sk-region-1234567890.example.com"));
    }
}
