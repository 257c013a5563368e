//! TODO

use crate::exit::Exit;
use anyhow::Result;
use serde_json::Map;
use serde_json::Value;

pub(crate) fn unsupported<T>(what: String) -> Result<T> {
    Err(Exit::Usage(what).into())
}

/// Without fields that are null, which are as good as absent to transformers.
pub(crate) fn without_nulls(json: &Map<String, Value>) -> Value {
    let fields = json.iter().filter(|(_, value)| !value.is_null());
    let fields = fields.map(|(name, value)| (name.clone(), value.clone()));
    Value::Object(fields.collect())
}

pub(crate) fn check_layer_count(layers: usize) -> Result<()> {
    if layers == 0 || layers > MAX_LAYERS {
        return unsupported(format!(
            "its number of layers of {layers} is not that of a model"
        ));
    }
    Ok(())
}

pub(crate) const MAX_LAYERS: usize = 1 << 12;
