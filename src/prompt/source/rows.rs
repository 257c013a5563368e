//! [`OnRow`]: the callback for each row of a prompt file.

use anyhow::Result;
use serde_json::Value;

use crate::exit::Exit;

/// Callback that gets the number of each row and the row. The number is the line at which the row starts, or the
/// position of the row in a JSON array or a Parquet file, counted from 1.
pub(crate) type OnRow<'a> = &'a mut dyn FnMut(usize, Value) -> Result<()>;

/// Returns a usage error.
pub(crate) fn usage(message: String) -> anyhow::Error {
    Exit::Usage(message).into()
}
