//! Reads the rows of a Parquet file.

use std::fs::File;
use std::path::Path;

use anyhow::Result;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::prompt::source::rows::{OnRow, usage};

pub(crate) fn read(path: &Path, on_row: OnRow<'_>) -> Result<()> {
    let problem = |error: &dyn std::fmt::Display| {
        usage(format!(
            "cannot read the prompts in {}: {error}",
            path.display()
        ))
    };
    let file = File::open(path).map_err(|error| problem(&error))?;
    let reader = SerializedFileReader::new(file).map_err(|error| problem(&error))?;
    let rows = reader.get_row_iter(None).map_err(|error| problem(&error))?;
    for (index, row) in rows.enumerate() {
        let row = row.map_err(|error| problem(&error))?;
        on_row(index + 1, row.to_json_value())?;
    }
    Ok(())
}
