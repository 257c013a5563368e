//! [`OnRow`]: the callback for a row.

use anyhow::Result;
use serde_json::Value;

use crate::exit::Exit;

/// Callback for each row, with its line or row number, counted from 1.
pub(crate) type OnRow<'a> = &'a mut dyn FnMut(usize, Value) -> Result<()>;

/// Returns a usage error.
pub(crate) fn usage(message: String) -> anyhow::Error {
    Exit::Usage(message).into()
}
