//! Structured output: a JSON schema that is passed to the endpoint, and that its answers are held
//! to. An endpoint that does not enforce a schema ignores it in silence.

use std::path::Path;

use anyhow::{Context, Result};
use jsonschema::Validator;
use serde_json::{Value, json};

use crate::exit::Exit;

pub struct StructuredOutput {
    name: String,
    schema: Value,
    validator: Validator,
}

impl StructuredOutput {
    /// Reads the schema; its name is that of its file.
    ///
    /// # Errors
    /// [`Exit::Usage`] where the file is no JSON schema.
    pub fn load(path: &Path) -> Result<StructuredOutput> {
        let text = crate::fs::read_to_string(path).context("cannot read `sampling.schema`")?;
        let schema: Value = serde_json::from_str(&text).map_err(|error| {
            Exit::Usage(format!(
                "{}:{}: no JSON: {error}",
                path.display(),
                error.line()
            ))
        })?;
        let validator = jsonschema::validator_for(&schema).map_err(|error| {
            Exit::Usage(format!("{} is no JSON schema: {error}", path.display()))
        })?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        // OpenAI's rule for names.
        let name: String = stem
            .chars()
            .map(|char| match char {
                'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' => char,
                _ => '_',
            })
            .take(64)
            .collect();
        Ok(StructuredOutput {
            name,
            schema,
            validator,
        })
    }

    /// The field of the request body.
    pub fn response_format(&self) -> Value {
        json!({
            "type": "json_schema",
            "json_schema": {"name": self.name, "schema": self.schema, "strict": true},
        })
    }

    /// Why the answer does not satisfy the schema, in words that are the same for the same fault;
    /// None where it does.
    pub fn violation(&self, answer: &str) -> Option<String> {
        let Ok(value) = serde_json::from_str::<Value>(answer) else {
            return Some("schema: no JSON".into());
        };
        let error = self.validator.iter_errors(&value).next()?;
        // An index would make a reason of its own for each item.
        let path: Vec<_> = error.instance_path().as_str().split('/').collect();
        let path = path.iter().map(|part| match part.parse::<usize>() {
            Ok(_) => "*",
            Err(_) => part,
        });
        let place = match path.collect::<Vec<_>>().join("/").as_str() {
            "" => "the answer".to_string(),
            path => format!("`{path}`"),
        };
        let keyword = error
            .schema_path()
            .as_str()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_string();
        Some(format!("schema: {place} against `{keyword}`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_held_to_the_schema() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("my call.json");
        let schema = r#"{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"],"additionalProperties":false}"#;
        std::fs::write(&path, schema).unwrap();
        let structured = StructuredOutput::load(&path).unwrap();
        let format = structured.response_format();
        assert_eq!(format["json_schema"]["name"], "my_call");
        assert_eq!(format["json_schema"]["schema"]["required"][0], "n");
        let cases = [
            (r#"{"n": 3}"#, None),
            (r#"{"n": "3"}"#, Some("schema: `/n` against `type`")),
            (r#"{}"#, Some("schema: the answer against `required`")),
            (
                r#"{"n": 1, "m": 2}"#,
                Some("schema: the answer against `additionalProperties`"),
            ),
            ("sure! {\"n\": 3}", Some("schema: no JSON")),
        ];
        for (answer, expected) in cases {
            assert_eq!(
                structured.violation(answer).as_deref(),
                expected,
                "{answer}"
            );
        }
    }

    #[test]
    fn what_is_no_schema_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.json");
        for (text, part) in [
            ("{\n\"type\":", "s.json:2"),
            (r#"{"type": 3}"#, "no JSON schema"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = StructuredOutput::load(&path).err().unwrap();
            assert!(format!("{error:#}").contains(part), "{error:#}");
            assert_eq!(Exit::code_of(&error), 2);
        }
        assert!(StructuredOutput::load(&dir.path().join("none.json")).is_err());
    }
}
