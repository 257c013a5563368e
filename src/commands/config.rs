//! `distill config show`: prints the effective config.

use anyhow::Result;
use serde_json::{Value, json};

use crate::cli::{ConfigAction, ConfigArgs, GlobalArgs};
use crate::terminal::sanitise;

/// Prints every setting with its value and the origin of the value.
pub fn run(args: &ConfigArgs, global: &GlobalArgs) -> Result<()> {
    let ConfigAction::Show(file) = &args.action;
    let loaded = super::load_config(file)?;
    if global.json {
        let origins = &loaded.origins;
        return super::print_json(
            &json!({ "version": 1, "config": loaded.config, "origins": origins }),
        );
    }
    let mut text = String::new();
    let mut line = |key: &str, value: &Value| {
        let origin = loaded
            .origins
            .get(key)
            .map_or("default".to_owned(), |origin| origin.to_string());
        text.push_str(&format!("{key} = {value}  # {origin}\n"));
    };
    let config = serde_json::to_value(&loaded.config)?;
    for (section, value) in config.as_object().into_iter().flatten() {
        match value.as_object() {
            Some(keys) => {
                for (key, value) in keys {
                    line(&format!("{section}.{key}"), value);
                }
            }
            None => line(section, value),
        }
    }
    super::print(&sanitise(&text))
}
