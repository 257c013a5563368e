//! Order of the examples: the place of each example in the shards, and the hash of its prompt.

use std::io::{self, Write};

use anyhow::{Context, Result, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use super::columns::{SafetensorsHeader, write_all};

const PLACES: &str = "places";
const PROMPT_HASHES: &str = "prompt_hashes";

/// Writes a safetensors file of `places` (B), the examples' indices in all shards end to end, and the hashes of their
/// prompts (B).
///
/// # Errors
/// If `out` cannot be written.
pub(crate) fn write(places: &[u32], prompt_hashes: &[u32], out: &mut dyn Write) -> io::Result<()> {
    let mut header = SafetensorsHeader::default();
    header.add(PLACES, "U32", 4, places.len());
    header.add(PROMPT_HASHES, "U32", 4, prompt_hashes.len());
    header.write(out)?;
    write_all(out, places, u32::to_le_bytes)?;
    write_all(out, prompt_hashes, u32::to_le_bytes)
}

/// Reads the places (B) and hashes (B) that [`write`] wrote.
///
/// # Errors
/// If `bytes` is not a safetensors file with both columns.
pub(crate) fn read(bytes: &[u8]) -> Result<(Vec<u32>, Vec<u32>)> {
    let file = SafeTensors::deserialize(bytes)?;
    let column = |name: &str| -> Result<Vec<u32>> {
        let view = file
            .tensor(name)
            .with_context(|| format!("the column {name} is missing"))?;
        ensure!(
            view.dtype() == Dtype::U32,
            "the column {name} has another type"
        );
        let words = view.data().as_chunks::<4>().0.iter();
        Ok(words.map(|word| u32::from_le_bytes(*word)).collect())
    };
    Ok((column(PLACES)?, column(PROMPT_HASHES)?))
}
