//! Reads prompt sources and templates into [`Prompt`]s.
//!
//! With a template, each row of the source is rendered into messages. Without one, the `messages` of a row are sent
//! unchanged, and the `text` of a row, or a line of plain text, becomes one user message.
//!
//! | file | content |
//! |---|---|
//! | `source/` | rows of JSON, CSV, TSV, Parquet and plain text files |
//! | `row` | messages, request fields and id of a row |
//! | `template` | rendering a row into a conversation |
//! | `guard` | memory limit of a template |
//! | `message` | one turn of a conversation |
//! | `control_tokens` | names of control tokens |
//!
//! Invariants: every error about a row names the file and the line, or the position of the row in a JSON array or a
//! Parquet file. All prompts are read and rendered before the first request. Every prompt has a unique id.

pub(crate) mod control_tokens;
pub(crate) mod guard;
pub mod message;
pub(crate) mod row;
pub(crate) mod source;
pub(crate) mod template;

pub use row::RawRequest;
pub use template::Template;

use crate::prompt::message::Message;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::config;
use crate::exit::Exit;

/// A conversation that the teacher continues.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// `id` of the row, or the hash of the prompt if the row has none.
    pub id: String,
    pub messages: Vec<Message>,
    /// Parts of the row that are sent unchanged, if it has any.
    pub raw: Option<Box<RawRequest>>,
}

impl Prompt {
    /// Creates a prompt without raw parts.
    pub fn plain(id: impl Into<String>, messages: Vec<Message>) -> Prompt {
        Prompt {
            id: id.into(),
            messages,
            raw: None,
        }
    }

    /// Returns 128 bits of the prompt's BLAKE3 hash, in hex.
    fn hash(&self) -> Result<String> {
        let bytes = match &self.raw {
            None => serde_json::to_vec(&self.messages)?,
            Some(raw) => serde_json::to_vec(&(&self.messages, &raw.messages, &raw.fields))?,
        };
        Ok(blake3::hash(&bytes).to_hex()[..32].to_string())
    }
}

/// Maximum number of field names in the warning about unsent fields.
const MAX_LISTED_FIELDS: usize = 8;

/// Loads the prompts of a run, in the order of the source. Calls `check` for each row; an error of `check`, for example
/// after Ctrl-C, stops the loading.
///
/// # Errors
/// [`Exit::Usage`] with the file, the line and the change to make; and the errors of `check`.
pub fn load(
    settings: &config::PromptsConfig,
    check: impl Fn() -> Result<()>,
) -> Result<Vec<Prompt>> {
    let template = settings.template.as_deref();
    let mut unsent = BTreeSet::new();
    let mut prompts = load_with(&settings.source, template, |_, row| {
        for name in row::unsent_fields(&row) {
            if unsent.len() < MAX_LISTED_FIELDS && !unsent.contains(name) {
                unsent.insert(name.to_owned());
            }
        }
        check()
    })?;
    if template.is_none() && !unsent.is_empty() {
        let names: Vec<_> = unsent.iter().map(|name| format!("`{name}`")).collect();
        tracing::warn!(
            "{}: these fields of the rows are not sent: {}; set `prompts.template` to use them",
            settings.source.display(),
            names.join(", ")
        );
    }
    prompts.truncate(settings.limit.unwrap_or(usize::MAX));
    Ok(prompts.into_iter().map(|(prompt, ())| prompt).collect())
}

/// Loads every row of `source` as a prompt. Pairs each prompt with the result of `map_row`, which gets the prompt's id
/// and the row.
pub fn load_with<T>(
    source: &Path,
    template: Option<&Path>,
    mut map_row: impl FnMut(&str, Value) -> Result<T>,
) -> Result<Vec<(Prompt, T)>> {
    let template = template.map(Template::load).transpose()?;
    let mut prompts = Vec::new();
    let mut row_numbers = Vec::new();
    source::read(source, &mut |number, row| {
        let location = format_args!("{}:{number}", source.display());
        let usage = |problem| Exit::Usage(format!("{location}: {problem}"));
        let fields = row::request_fields(&row);
        let (messages, raw_messages) = match &template {
            Some(template) => {
                let messages = template.render(number, &row);
                (
                    messages.with_context(|| format!("cannot render {location}"))?,
                    None,
                )
            }
            None => row::messages(&row).map_err(usage)?,
        };
        let is_empty =
            |message: &Message| message.role == "user" && message.content.trim().is_empty();
        if messages.last().is_some_and(is_empty) {
            return Err(
                usage("the last message is empty: fill it, or remove the row".into()).into(),
            );
        }
        let raw = RawRequest {
            messages: raw_messages,
            fields,
        };
        let mut prompt = Prompt {
            id: row::id(&row).map_err(usage)?.unwrap_or_default(),
            messages,
            raw: (!raw.is_empty()).then(|| Box::new(raw)),
        };
        if prompt.id.is_empty() {
            prompt.id = prompt.hash()?;
        }
        let mapped = map_row(&prompt.id, row)?;
        prompts.push((prompt, mapped));
        row_numbers.push(number);
        Ok(())
    })?;
    if prompts.is_empty() {
        return Err(Exit::Usage(format!("{} contains no prompts", source.display())).into());
    }
    check_unique_ids(source, &prompts, row_numbers)?;
    Ok(prompts)
}

fn check_unique_ids<T>(
    source: &Path,
    prompts: &[(Prompt, T)],
    row_numbers: Vec<usize>,
) -> Result<()> {
    let source = source.display();
    let mut number_of_id = HashMap::with_capacity(prompts.len());
    for ((prompt, _), number) in prompts.iter().zip(row_numbers) {
        let Some(first) = number_of_id.insert(prompt.id.as_str(), number) else {
            continue;
        };
        let problem = if prompt.id == prompt.hash()? {
            format!(
                "the same prompt as {source}:{first}: remove one, or set `prompts.samples` to request several answers"
            )
        } else {
            let id = &prompt.id;
            format!("the same id `{id}` as {source}:{first}: give each row a unique id")
        };
        return Err(Exit::Usage(format!("{source}:{number}: {problem}")).into());
    }
    Ok(())
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

    /// Returns the message of the error, which must be a usage error.
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
    fn each_line_of_text_is_a_prompt() {
        let prompts = load("p.txt", "\u{feff}one\r\n\r\n  two \nthree", "").unwrap();
        assert_eq!(contents(&prompts), ["one", "  two ", "three"]);
        assert_eq!(prompts[0].0.id.len(), 32);
        assert_ne!(prompts[0].0.id, prompts[1].0.id);
    }

    #[test]
    fn rows_have_messages_or_fill_a_template() {
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
        for part in ["p.jsonl:2: `user`", "`question`", "only `text`, `id`"] {
            assert!(missing.contains(part), "{part} is not in: {missing}");
        }
        let cases = [
            ("p.jsonl", "{}", "p.jsonl:1: the row is empty"),
            (
                "p.jsonl",
                "{\"prompt\":1}",
                "p.jsonl:1: the row has no `messages`, but `prompt`: set `prompts.template`",
            ),
            ("p.jsonl", "[1]", "p.jsonl:1: not a JSON object"),
            (
                "p.jsonl",
                "{\"messages\":[]}",
                "p.jsonl:1: `messages` is empty",
            ),
            (
                "p.jsonl",
                "\n{\"messages\":[{\"role\":1}]}",
                "p.jsonl:2: `messages[0]` has a `role` that is not a string",
            ),
            (
                "p.jsonl",
                "{\"messages\":[{\"content\":\"x\"}]}",
                "p.jsonl:1: `messages[0]` has no `role`",
            ),
            (
                "p.jsonl",
                "{\"id\":\"\",\"text\":\"x\"}",
                "p.jsonl:1: `id` is empty",
            ),
            (
                "p.jsonl",
                "{\"id\":true,\"text\":\"x\"}",
                "p.jsonl:1: `id` is neither a string nor a number",
            ),
            ("p.txt", " \n", "p.txt contains no prompts"),
        ];
        for (name, content, expected) in cases {
            let message = problem(load(name, content, ""));
            assert!(
                message.contains(expected),
                "{expected} is not in: {message}"
            );
        }
        let message = problem(load("p.jsonl", "{}", TEMPLATE));
        assert!(message.ends_with("but the row has no fields"), "{message}");
    }

    #[test]
    fn repeated_prompts_and_ids_are_refused() {
        let row = r#"{"id":"a","messages":[{"role":"user","content":"x"}]}"#;
        let cases = [
            (
                "p.txt",
                "a\nb\na".to_owned(),
                [":3: the same prompt as ", "p.txt:1: "],
            ),
            (
                "p.jsonl",
                format!("{row}\n\n{row}"),
                [":3: the same id `a` as ", "p.jsonl:1: "],
            ),
        ];
        for (name, content, parts) in cases {
            let message = problem(load(name, &content, ""));
            for part in parts {
                assert!(message.contains(part), "{part} is not in: {message}");
            }
        }
    }

    #[test]
    fn csv_tsv_and_json_arrays_are_read() {
        let csv = "id,question\r\n7,\"say \"\"hi\"\",\ntwice\"\n8,2+2\n";
        let prompts = load("p.csv", csv, r#"user = "{{ question }}""#).unwrap();
        assert_eq!(contents(&prompts), ["say \"hi\",\ntwice", "2+2"]);
        assert_eq!(prompts[1].0.id, "8");
        let prompts = load("p.tsv", "\u{feff}text\tnote\na, b\tx\n", "").unwrap();
        assert_eq!(contents(&prompts), ["a, b"]);
        let array = " \n[\n {\"text\": \"a\"},\n {\"text\": \"b\"}\n]\n";
        assert_eq!(contents(&load("p.json", array, "").unwrap()), ["a", "b"]);
        let lines = "{\"text\":\"a\"}\n{\"text\":\"b\"}";
        assert_eq!(contents(&load("p.json", lines, "").unwrap()), ["a", "b"]);
    }

    #[test]
    fn json_lines_error_of_a_valid_row_does_not_blame_the_format() {
        let message = problem(load("p.json", "{\"text\":\"a\"}\n{\"a\":1}", ""));
        assert!(!message.contains("an array of objects"), "{message}");
        assert!(
            message.contains("p.json:2: the row has no `messages`"),
            "{message}"
        );
    }

    #[test]
    fn unsupported_and_malformed_sources_are_refused() {
        let cases = [
            ("p.xlsx", "x", "suffix `.xlsx`"),
            ("p.png", "x", "suffix `.png`"),
            ("p.jsonl.zst", "x", "suffix `.zst`"),
            (
                "p.csv",
                "a,b\n1\n",
                "p.csv:2: the header has 2 columns, but this row has 1",
            ),
            (
                "p.csv",
                "id,text\n1,\"hello\n2,x\n",
                "p.csv:2: a quoted field in this row is not closed",
            ),
            (
                "p.csv",
                "a,a\n1,2\n",
                "p.csv:1: the header names two columns \"a\"",
            ),
            (
                "p.csv",
                "a, \n1,2\n",
                "p.csv:1: column 2 of the header has no name",
            ),
            ("p.parquet.gz", "x", "must not be compressed with gzip"),
            (
                "p.json",
                "[{\"text\":\"a\"}, 3]",
                "row 2 is not a JSON object",
            ),
            ("p.json", "[{\"text\":\"a\"}", "EOF"),
            (
                "p.json",
                "[{\"text\":\"a\"}, {}]",
                "p.json:2: the row is empty",
            ),
            ("p.json", "{\n\"text\":\"a\"}", "an array of objects"),
            ("p.txt", "a\0b", "p.txt:1: the line contains a NUL byte"),
            ("p.txt", "a\rb\rc", "a \\r without a \\n"),
        ];
        for (name, content, expected) in cases {
            let message = problem(load(name, content, ""));
            assert!(
                message.contains(expected),
                "{expected} is not in: {message}"
            );
        }
        let utf16: Vec<u8> = "\u{feff}hi"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("p.txt");
        std::fs::write(&source, utf16).unwrap();
        let message = problem(load_with(&source, None, |_, row| Ok(row)));
        assert!(message.contains("UTF-16"), "{message}");
        if !cfg!(feature = "parquet") {
            let message = problem(load("p.parquet", "x", ""));
            assert!(message.contains("--features parquet"), "{message}");
        }
    }

    #[test]
    fn gzip_bomb_is_refused() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("p.txt.gz");
        let file = std::fs::File::create(&source).unwrap();
        let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::best());
        let block = vec![b'\n'; 1 << 20];
        for _ in 0..400 {
            packed.write_all(&block).unwrap();
        }
        packed.finish().unwrap();
        let message = problem(load_with(&source, None, |_, row| Ok(row)));
        assert!(message.contains("decompresses to more than"), "{message}");
    }

    #[test]
    fn messages_and_tools_are_sent_unchanged() {
        let row = r#"{"tools":[{"type":"function"}],"n":3,"messages":[{"role":"user","name":"ann","content":[{"type":"text","text":"we"},{"type":"text","text":"ather?"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"c1"}]},{"role":"tool","tool_call_id":"c1","content":"sunny"}]}"#;
        let prompts = load("p.jsonl", row, "").unwrap();
        assert_eq!(contents(&prompts), ["weather?", "", "sunny"]);
        let raw = prompts[0].0.raw.as_ref().unwrap();
        let row: Value = serde_json::from_str(row).unwrap();
        assert_eq!(raw.messages.as_ref(), Some(&row["messages"]));
        assert_eq!(
            Value::from(raw.fields.clone()),
            serde_json::json!({"tools": row["tools"]})
        );
        // Rows that differ only in their tools are different prompts.
        let plain = |extra: &str| {
            format!("{{{extra}\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}]}}")
        };
        let rows = format!("{}\n{}", plain(""), plain("\"tools\":[1],"));
        let prompts = load("p.jsonl", &rows, "").unwrap();
        assert!(prompts[0].0.raw.is_none() && prompts[1].0.raw.is_some());

        let message = |content: &str| {
            format!("{{\"messages\":[{{\"role\":\"user\",\"content\":{content}}}]}}")
        };
        for (content, expected) in [
            (
                r#"[{"type":"image_url","image_url":{"url":"x"}}]"#,
                "`messages[0]` has a part of type \"image_url\"",
            ),
            (r#"[{"type":"input_audio"}]"#, "input_audio"),
            ("null", "`messages[0]` has no `content`"),
            (r#"[{"type":"text"}]"#, "no string `text`"),
            ("3", "neither a string nor a list of parts"),
        ] {
            let message = problem(load("p.jsonl", &message(content), ""));
            assert!(
                message.contains(expected),
                "{expected} is not in: {message}"
            );
        }
    }

    #[test]
    fn endless_template_runs_out_of_fuel() {
        let template = r#"user = "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}""#;
        let message = problem(load("p.txt", "x", template));
        assert!(message.contains("fuel"), "{message}");
    }

    #[test]
    fn a_template_with_an_unknown_key_or_a_syntax_error_is_refused() {
        let message = problem(load("p.txt", "x", "user = \"a\"\nsytem = \"b\""));
        assert!(message.contains("sytem"), "{message}");
        let message = problem(load("p.txt", "x", "user = \"{{ text\""));
        assert!(message.contains("`user`"), "{message}");
    }

    #[test]
    fn shipped_template_renders_a_line_of_text() {
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
    fn template_tests_optional_fields_with_is_defined() {
        let template = r#"user = "{% if hint is defined %}{{ hint }}: {% endif %}{{ text }}""#;
        assert_eq!(contents(&load("p.txt", "x", template).unwrap()), ["x"]);
    }
}
