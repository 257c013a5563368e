//! Error messages for mistakes in a TOML file, with their position and a hint.

use std::path::Path;

use crate::exit::Exit;

/// Maximum number of valid keys that a message lists.
const MAX_LISTED_KEYS: usize = 12;

/// Formats an error in `text`, the content of `path`, with file, line and column. For an unknown key the message names
/// the nearest valid key, or ends with `otherwise`.
pub(crate) fn describe(
    path: &Path,
    text: &str,
    error: &toml::de::Error,
    otherwise: &str,
) -> anyhow::Error {
    let place = error.span().map_or(String::new(), |span| {
        let before = &text[..span.start.min(text.len())];
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        format!(":{line}:{column}")
    });
    let message = error.message();
    // serde's message: unknown field `x`, expected one of `a`, `b`
    let hint = match message.strip_prefix("unknown field `") {
        Some(rest) => {
            let mut quoted = rest.split('`').step_by(2);
            let unknown = quoted.next().unwrap_or_default();
            let fields: Vec<&str> = rest.split('`').skip(2).step_by(2).collect();
            let all = format!("valid keys are {}; {otherwise}", fields.join(", "));
            let otherwise = if fields.len() <= MAX_LISTED_KEYS {
                &all
            } else {
                otherwise
            };
            return usage(format!(
                "{}{place}: unknown key {unknown:?}{}",
                path.display(),
                nearest(unknown, fields.into_iter(), otherwise)
            ));
        }
        None => message.replace('\n', " "),
    };
    usage(format!("{}{place}: {hint}", path.display()))
}

/// Returns `; did you mean ...?` if a candidate is similar to `word`, else `; ` and `otherwise`.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl Iterator<Item = &'a str>,
    otherwise: &str,
) -> String {
    candidates
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(format!("; {otherwise}"), |(_, best)| {
            format!("; did you mean {best:?}?")
        })
}

/// Returns an [`Exit::Usage`] error.
pub(crate) fn usage(message: String) -> anyhow::Error {
    // The message may quote an API key that was written into the wrong field.
    Exit::Usage(hide_keys(&message)).into()
}

/// Replaces API keys in a text by `[key]`.
pub(crate) fn hide_keys(text: &str) -> String {
    let is_key_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let mut hidden = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(is_key_char) {
        hidden.push_str(&rest[..start]);
        let word = &rest[start..];
        let end = word.find(|c| !is_key_char(c)).unwrap_or(word.len());
        let (word, after) = word.split_at(end);
        let is_key = word.len() >= SHORTEST_KEY
            && PREFIXES.iter().any(|prefix| word.starts_with(prefix))
            && word.bytes().any(|byte| byte.is_ascii_digit());
        hidden.push_str(if is_key { "[key]" } else { word });
        rest = after;
    }
    hidden.push_str(rest);
    hidden
}

/// Minimum length of an API key; shorter texts are placeholders or names.
pub(crate) const SHORTEST_KEY: usize = 16;

/// Prefixes of the API keys of well-known providers.
pub(crate) const PREFIXES: [&str; 14] = [
    "sk-", "sk_", "gsk_", "hf_", "xai-", "pplx-", "AIza", "r8_", "nvapi-", "fw_", "tgp_", "csk-",
    "ya29.", "eyJ",
];
