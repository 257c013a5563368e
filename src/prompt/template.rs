//! [`Template`]: renders a row into a conversation.

use std::path::Path;

use anyhow::Result;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde::Deserialize;
use serde_json::Value;

use super::guard::MemoryGuard;
use crate::exit::Exit;
use crate::prompt::message::Message;

/// Maximum number of template instructions per rendered message.
const FUEL: u64 = 2_000_000;

/// Content of a template file; `prompts/plain.toml` documents it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TemplateFile {
    system: Option<String>,
    user: String,
    #[serde(default)]
    examples: Vec<FewShotExample>,
}

/// A few-shot example. It is sent unchanged: braces in it are not rendered.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FewShotExample {
    user: String,
    assistant: String,
}

/// A parsed template file.
pub struct Template {
    /// Contains the template `user` and, if the file has one, `system`.
    environment: Environment<'static>,
    has_system: bool,
    examples: Vec<FewShotExample>,
    guard: MemoryGuard,
}

impl Template {
    /// Loads and parses the template file at `path`.
    pub fn load(path: &Path) -> Result<Template> {
        let place = path.display();
        let text = std::fs::read_to_string(path)
            .map_err(|error| Exit::Usage(format!("cannot read the template {place}: {error}")))?;
        let file: TemplateFile = toml::from_str(&text)
            .map_err(|error| Exit::Usage(format!("the template {place} is invalid: {error}")))?;

        let mut environment = Environment::new();
        // A field that is missing in a row must not become an empty prompt, which would cost money.
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        // An endless loop must fail instead of blocking the run.
        environment.set_fuel(Some(FUEL));
        let has_system = file.system.is_some();
        for (name, source) in [("system", file.system), ("user", Some(file.user))] {
            if let Some(source) = source {
                environment
                    .add_template_owned(name, source)
                    .map_err(|error| {
                        Exit::Usage(format!("`{name}` in the template {place}: {error}"))
                    })?;
            }
        }
        Ok(Template {
            environment,
            has_system,
            examples: file.examples,
            guard: MemoryGuard::new(path),
        })
    }

    /// Renders the conversation of one row: the system message, the examples, the user message. If the row exceeds the
    /// memory limit, the process ends with a message that names `row_number`.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the template uses an undefined variable or cannot be rendered. The message does not name the
    /// row.
    pub fn render(&self, row_number: usize, row: &Value) -> Result<Vec<Message>> {
        let mut messages = Vec::with_capacity(2 + 2 * self.examples.len());
        if self.has_system {
            messages.push(Message::new(
                "system",
                self.render_one("system", row_number, row)?,
            ));
        }
        for example in &self.examples {
            messages.push(Message::new("user", example.user.clone()));
            messages.push(Message::new("assistant", example.assistant.clone()));
        }
        messages.push(Message::new(
            "user",
            self.render_one("user", row_number, row)?,
        ));
        Ok(messages)
    }

    fn render_one(&self, name: &str, row_number: usize, row: &Value) -> Result<String> {
        let template = self.environment.get_template(name)?;
        let rendered = self
            .guard
            .watch_row(row_number, || template.render(Serde(row)));
        rendered.map_err(|error| {
            let variables = template.undeclared_variables(true);
            let missing = missing_variables(&variables, row);
            let problem = if error.kind() == ErrorKind::UndefinedError && !missing.is_empty() {
                let fields = row
                    .as_object()
                    .map_or(String::new(), |row| quote(row.keys()));
                let fields = if fields.is_empty() {
                    "no fields".to_owned()
                } else {
                    format!("only {fields}")
                };
                let missing = quote(missing);
                format!("`{name}` of the template uses {missing}, but the row has {fields}")
            } else {
                error.to_string()
            };
            Exit::Usage(problem).into()
        })
    }
}

/// Returns the variables (`a` or `a.b`) that the row does not have, sorted.
fn missing_variables<'a>(
    variables: &'a std::collections::HashSet<String>,
    row: &Value,
) -> Vec<&'a String> {
    let mut missing: Vec<_> = variables
        .iter()
        .filter(|path| {
            path.split('.')
                .try_fold(row, |value, field| value.get(field))
                .is_none()
        })
        .collect();
    missing.sort();
    missing
}

/// Formats names as a list: `` `a`, `b` ``.
fn quote<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let quoted: Vec<_> = names.into_iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}
