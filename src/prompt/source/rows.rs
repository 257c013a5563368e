//! TODO

use crate::exit::Exit;
use anyhow::Result;
use serde_json::Value;

/// Callback for each row, with its line or row number, from 1.
pub(crate) type OnRow<'a> = &'a mut dyn FnMut(usize, Value) -> Result<()>;

pub(crate) fn usage(message: String) -> anyhow::Error {
    Exit::Usage(message).into()
}
