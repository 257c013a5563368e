//! Checks and errors that the readers of `config.json` share.

use anyhow::Result;
use serde_json::{Map, Value};

use crate::exit::Exit;

/// Maximum number of layers of a model.
const MAX_LAYERS: usize = 1 << 12;

/// Returns a usage error about `config.json`.
pub(crate) fn config_error<T>(message: String) -> Result<T> {
    Err(Exit::Usage(message).into())
}

/// Removes fields that are null: transformers treats them as absent.
pub(crate) fn without_nulls(json: &Map<String, Value>) -> Value {
    let fields = json.iter().filter(|(_, value)| !value.is_null());
    let fields = fields.map(|(name, value)| (name.clone(), value.clone()));
    Value::Object(fields.collect())
}

/// Checks the number of layers, before anything is allocated per layer.
///
/// # Errors
/// If there are no layers, or more than [`MAX_LAYERS`].
pub(crate) fn check_layer_count(layers: usize) -> Result<()> {
    if layers == 0 || layers > MAX_LAYERS {
        return config_error(format!(
            "the number of layers is {layers}; expected 1 to {MAX_LAYERS}"
        ));
    }
    Ok(())
}

/// Default of `initializer_range`.
pub(super) fn default_range() -> f64 {
    0.02
}
