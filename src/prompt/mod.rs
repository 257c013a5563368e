//! Prompt sources and templates -> [`Prompt`].
//!
//! A source is a file of JSON objects (`.jsonl`, `.json`: an object a line) or of plain text (any
//! other extension: a prompt a line). With a template each row is rendered through it; without one
//! a row carries its `messages`, and a line of text is one user message.

mod source;
mod template;

pub use template::Template;

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config;
use crate::exit::Exit;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// A conversation to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// The row's `id`, or the hash of its messages where it has none.
    pub id: String,
    pub messages: Vec<Message>,
}

/// The prompts of a run, in the order of their source.
///
/// Errors are [`Exit::Usage`]: they name file, line and what to change; and those of `check`, which is asked
/// at each row whether to go on.
pub fn load(settings: &config::Prompts, check: impl Fn() -> Result<()>) -> Result<Vec<Prompt>> {
    let template = settings.template.as_deref();
    let mut prompts = load_with(&settings.source, template, |_, _| check())?;
    prompts.truncate(settings.limit.unwrap_or(usize::MAX));
    Ok(prompts.into_iter().map(|(prompt, ())| prompt).collect())
}

/// Every row of `source` as a prompt, with what `take` keeps of it: it gets the id and the fields.
pub fn load_with<T>(
    source: &Path,
    template: Option<&Path>,
    mut take: impl FnMut(&str, Value) -> Result<T>,
) -> Result<Vec<(Prompt, T)>> {
    let template = template.map(Template::load).transpose()?;
    let mut prompts = Vec::new();
    let mut lines = Vec::new();
    source::read(source, |line, row| {
        let place = format_args!("{}:{line}", source.display());
        let messages = match &template {
            Some(template) => template
                .render(line, &row)
                .with_context(|| format!("cannot render {place}"))?,
            None => source::messages(&row)
                .map_err(|problem| Exit::Usage(format!("{place}: {problem}")))?,
        };
        let id = source::id(&row)
            .map_err(|problem| Exit::Usage(format!("{place}: {problem}")))?
            .map_or_else(|| hash(&messages), Ok)?;
        let taken = take(&id, row)?;
        prompts.push((Prompt { id, messages }, taken));
        lines.push(line);
        Ok(())
    })?;
    if prompts.is_empty() {
        return Err(Exit::Usage(format!("there is no prompt in {}", source.display())).into());
    }
    let mut line_of_id = HashMap::with_capacity(prompts.len());
    for ((prompt, _), line) in prompts.iter().zip(lines) {
        let Some(first) = line_of_id.insert(prompt.id.as_str(), line) else {
            continue;
        };
        let problem = if prompt.id == hash(&prompt.messages)? {
            format!(
                "repeats the prompt of line {first}: remove one, or set `prompts.samples` to ask \
                 for several answers"
            )
        } else {
            let id = &prompt.id;
            format!("has the id `{id}` of line {first}: give each row an id of its own")
        };
        return Err(Exit::Usage(format!("{}:{line} {problem}", source.display())).into());
    }
    Ok(prompts)
}

/// 128 bits of BLAKE3 in hex: short enough to read, long enough never to collide.
fn hash(messages: &[Message]) -> Result<String> {
    let bytes = serde_json::to_vec(messages)?;
    Ok(blake3::hash(&bytes).to_hex()[..32].to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loads `content` written as `name`, through `template` if it is not empty.
    fn load(name: &str, content: &str, template: &str) -> Result<Vec<(Prompt, Value)>> {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join(name);
        std::fs::write(&source, content).unwrap();
        let template_path = dir.path().join("template.toml");
        std::fs::write(&template_path, template).unwrap();
        let template = (!template.is_empty()).then_some(template_path.as_path());
        load_with(&source, template, |_, row| Ok(row))
    }

    /// The whole message of the error, and that it is one of usage.
    fn problem<T: std::fmt::Debug>(result: Result<T>) -> String {
        let error = result.unwrap_err();
        assert_eq!(Exit::code_of(&error), 2, "{error:#}");
        format!("{error:#}")
    }

    fn contents(prompts: &[(Prompt, Value)]) -> Vec<&str> {
        prompts
            .iter()
            .flat_map(|(prompt, _)| &prompt.messages)
            .map(|message| message.content.as_str())
            .collect()
    }

    const TEMPLATE: &str = r#"
        system = "Be brief."
        user = "Q: {{ question }}"
        examples = [{ user = "Q: 1+1", assistant = "2" }]
    "#;

    #[test]
    fn text_is_a_prompt_a_line() {
        let prompts = load("p.txt", "\u{feff}one\r\n\r\n  two \nthree", "").unwrap();
        assert_eq!(contents(&prompts), ["one", "  two ", "three"]);
        assert_eq!(prompts[0].0.id.len(), 32);
        assert_ne!(prompts[0].0.id, prompts[1].0.id);
    }

    #[test]
    fn rows_carry_messages_or_fill_a_template() {
        let messages = r#"{"id": 7, "messages": [{"role": "user", "content": "hi"}]}"#;
        let prompts = load("p.jsonl", &format!("\u{feff}{messages}\r\n\n"), "").unwrap();
        assert_eq!(prompts[0].0.id, "7");
        assert_eq!(contents(&prompts), ["hi"]);

        let prompts = load("p.jsonl", r#"{"id":"a","question":"2+2"}"#, TEMPLATE).unwrap();
        assert_eq!(contents(&prompts), ["Be brief.", "Q: 1+1", "2", "Q: 2+2"]);
        assert_eq!(prompts[0].1["question"], "2+2");
    }

    #[test]
    fn text_fills_a_template_as_text() {
        let prompts = load("p.txt", "x", r#"user = "say {{ text }}""#).unwrap();
        assert_eq!(contents(&prompts), ["say x"]);
    }

    #[test]
    fn errors_name_the_row_and_what_is_wrong() {
        let missing = problem(load(
            "p.jsonl",
            "{\"question\":1}\n{\"text\":1,\"id\":2}",
            TEMPLATE,
        ));
        for part in ["p.jsonl:2", "row 2", "`question`", "`text`, `id`"] {
            assert!(missing.contains(part), "{part} is not in: {missing}");
        }
        let cases = [
            ("p.jsonl", "{}", "p.jsonl:1: there is no `messages`"),
            ("p.jsonl", "[1]", "p.jsonl:1: not a JSON object"),
            (
                "p.jsonl",
                "{\"messages\":[]}",
                "p.jsonl:1: `messages` is empty",
            ),
            (
                "p.jsonl",
                "\n{\"messages\":[{\"role\":1}]}",
                "p.jsonl:2: `messages`",
            ),
            ("p.txt", "a\nb\na", "p.txt:3 repeats the prompt of line 1"),
            ("p.txt", " \n", "there is no prompt in"),
        ];
        for (name, content, expected) in cases {
            let message = problem(load(name, content, ""));
            assert!(
                message.contains(expected),
                "{expected} is not in: {message}"
            );
        }
        let rows = r#"{"id":"a","messages":[{"role":"user","content":"x"}]}"#;
        let message = problem(load("p.jsonl", &format!("{rows}\n\n{rows}"), ""));
        assert!(
            message.contains("p.jsonl:3 has the id `a` of line 1"),
            "{message}"
        );
    }

    #[test]
    fn a_template_with_an_unknown_key_or_a_syntax_error_is_refused() {
        let message = problem(load("p.txt", "x", "user = \"a\"\nsytem = \"b\""));
        assert!(message.contains("sytem"), "{message}");
        let message = problem(load("p.txt", "x", "user = \"{{ text\""));
        assert!(message.contains("`user`"), "{message}");
    }

    #[test]
    fn the_template_that_ships_renders_a_line_of_text() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("prompts/plain.toml");
        let row = serde_json::json!({ "text": "say hi" });
        let messages = Template::load(&path).unwrap().render(1, &row).unwrap();
        let roles: Vec<_> = messages
            .iter()
            .map(|message| message.role.as_str())
            .collect();
        assert_eq!(roles, ["system", "user"]);
        assert_eq!(messages[1].content, "say hi");
    }

    #[test]
    fn optional_fields_are_asked_for_with_is_defined() {
        let template = r#"user = "{% if hint is defined %}{{ hint }}: {% endif %}{{ text }}""#;
        assert_eq!(contents(&load("p.txt", "x", template).unwrap()), ["x"]);
    }
}
