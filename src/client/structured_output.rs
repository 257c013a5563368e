//! Structured output: a JSON schema that requests send to the endpoint. Answers are validated against it, since some
//! endpoints ignore it.

use std::path::Path;

use anyhow::Result;
use jsonschema::Validator;
use serde_json::{Value, json};

use crate::exit::Exit;

/// A JSON schema of answers, with its compiled validator.
pub struct StructuredOutput {
    name: String,
    schema: Value,
    validator: Validator,
}

impl StructuredOutput {
    /// Reads the schema from a file, and its name from the file name.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the file cannot be read, or is not a valid JSON schema.
    pub fn load(path: &Path) -> Result<StructuredOutput> {
        let text = crate::fs::read_to_string(path)
            .map_err(|error| Exit::Usage(format!("cannot read `sampling.schema`: {error:#}")))?;
        let schema: Value = serde_json::from_str(&text).map_err(|error| {
            Exit::Usage(format!(
                "{}:{}: invalid JSON: {error}",
                path.display(),
                error.line()
            ))
        })?;
        let validator = jsonschema::validator_for(&schema).map_err(|error| {
            Exit::Usage(format!(
                "{} is not a valid JSON schema: {error}",
                path.display()
            ))
        })?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        // OpenAI allows at most 64 of these characters in a name.
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

    /// Returns the `response_format` field of the request body.
    pub fn response_format(&self) -> Value {
        json!({
            "type": "json_schema",
            "json_schema": {"name": self.name, "schema": self.schema, "strict": true},
        })
    }

    /// Returns a description of the first violation of the schema, or None if the answer is valid. Equal violations have
    /// equal descriptions, so that they can be counted.
    pub fn violation(&self, answer: &str) -> Option<String> {
        let Ok(value) = serde_json::from_str::<Value>(answer) else {
            return Some("schema: no JSON".into());
        };
        let error = self.validator.iter_errors(&value).next()?;
        // Indexes are replaced by `*`, so that violations in different items of a list have the same text.
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
    fn answers_are_validated_against_the_schema() {
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

    /// Versions of the validator treat these schemas of older drafts differently.
    #[test]
    fn schemas_of_older_drafts_keep_their_meaning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.json");
        let cases = [
            (
                r#"{"$schema":"http://json-schema.org/schema#","type":"integer"}"#,
                "1",
            ),
            (
                r#"{"$schema":"http://json-schema.org/draft-04/schema#","type":"integer"}"#,
                "18446744073709551616",
            ),
        ];
        for (schema, answer) in cases {
            std::fs::write(&path, schema).unwrap();
            let structured = StructuredOutput::load(&path).unwrap();
            assert_eq!(structured.violation(answer), None, "{schema}");
        }
        let schema = r#"{"$schema":"http://json-schema.org/draft-07/schema#","prefixItems":[{"type":"integer"}],"items":{"type":"string"}}"#;
        std::fs::write(&path, schema).unwrap();
        let structured = StructuredOutput::load(&path).unwrap();
        assert!(structured.violation(r#"[1,"a"]"#).is_some());
    }

    #[test]
    fn invalid_schema_error_names_the_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.json");
        for (text, part) in [
            ("{\n\"type\":", "s.json:2"),
            (r#"{"type": 3}"#, "not a valid JSON schema"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = StructuredOutput::load(&path).err().unwrap();
            assert!(format!("{error:#}").contains(part), "{error:#}");
            assert_eq!(Exit::code_of(&error), 2);
        }
        let missing = StructuredOutput::load(&dir.path().join("none.json"));
        assert_eq!(Exit::code_of(&missing.err().unwrap()), 2);
    }
}
