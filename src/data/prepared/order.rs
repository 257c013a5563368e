//! The order of the examples: where each lies, and the hash of its prompt.

use std::io::{self, Write};

use anyhow::{Context, Result, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use super::columns::{Header, write_all};

const PLACES: &str = "places";
const PROMPT_HASHES: &str = "prompt_hashes";

/// Writes `places` (B), the examples' numbers in all shards end to end, and the hashes of their
/// prompts (B), as a safetensors file.
///
/// # Errors
/// Where `out` cannot be written.
pub(crate) fn write(places: &[u32], prompt_hashes: &[u32], out: &mut dyn Write) -> io::Result<()> {
    let mut header = Header::default();
    header.add(PLACES, "U32", 4, places.len());
    header.add(PROMPT_HASHES, "U32", 4, prompt_hashes.len());
    header.write(out)?;
    write_all(out, places, u32::to_le_bytes)?;
    write_all(out, prompt_hashes, u32::to_le_bytes)
}

/// Reads what [`write`] wrote: places and hashes (B each).
///
/// # Errors
/// Where these are no such bytes.
pub(crate) fn read(bytes: &[u8]) -> Result<(Vec<u32>, Vec<u32>)> {
    let file = SafeTensors::deserialize(bytes)?;
    let column = |name: &str| -> Result<Vec<u32>> {
        let view = file.tensor(name).with_context(|| format!("no {name}"))?;
        ensure!(view.dtype() == Dtype::U32, "{name} is of another type");
        let words = view.data().as_chunks::<4>().0.iter();
        Ok(words.map(|word| u32::from_le_bytes(*word)).collect())
    };
    Ok((column(PLACES)?, column(PROMPT_HASHES)?))
}
