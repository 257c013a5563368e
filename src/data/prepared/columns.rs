//! Examples in memory, column by column, and the file that they become.

use std::io::{self, Write};
use std::ops::Range;

use serde_json::{Map, json};

use crate::data::align::aligned::Aligned;

/// A tokenised conversation with what it teaches.
pub struct Example<'a> {
    /// The cache key, or the row's number in a file of conversations: names the example in errors.
    pub key: &'a str,
    /// (T)
    pub input_ids: &'a [u32],
    /// The tokens to predict: the answers with their end-of-turn tokens. In order, none at 0, since
    /// nothing predicts the first token.
    pub labels: &'a [Range<usize>],
    /// The soft labels of the answer whose first token is `answer`.
    pub soft: &'a Aligned,
    pub answer: usize,
    /// Was that answer drawn from the very distribution that its logprobs tell?
    pub exact: bool,
}

/// Examples end to end: B of T tokens in all, with N supervised positions and S soft labels.
#[derive(Debug, Default)]
pub(crate) struct Columns {
    /// (T)
    input_ids: Vec<u32>,
    /// Where each example ends in `input_ids` (B); likewise the other ends.
    input_ends: Vec<u32>,
    /// Index in its example of the token that predicts: the label is the token behind it (N).
    positions: Vec<u32>,
    /// (B)
    target_ends: Vec<u32>,
    /// (S)
    soft_ids: Vec<u32>,
    soft_logprobs: Vec<f32>,
    /// (N)
    soft_ends: Vec<u32>,
    /// The logprob of a label from outside the top-k; see [`Aligned::drawn`]. NaN is none (N).
    drawn: Vec<f32>,
    /// Of chunks: their first position, counted in the example's, how many they are, and the
    /// teacher's negative log-likelihood (C).
    chunk_starts: Vec<u32>,
    chunk_lens: Vec<u32>,
    chunk_nlls: Vec<f32>,
    /// (B)
    chunk_ends: Vec<u32>,
    /// 1 or 0 (B).
    exact: Vec<u8>,
    /// See [`Aligned::lists_end`]: 0 is none, 1 false, 2 true (B).
    lists_end: Vec<u8>,
    /// Bytes of all keys.
    keys: Vec<u8>,
    /// (B)
    key_ends: Vec<u32>,
}

/// The names of the columns in a file.
pub(crate) mod name {
    pub(crate) const INPUT_IDS: &str = "input_ids";
    pub(crate) const INPUT_ENDS: &str = "input_ends";
    pub(crate) const POSITIONS: &str = "positions";
    pub(crate) const TARGET_ENDS: &str = "target_ends";
    pub(crate) const SOFT_IDS: &str = "soft_ids";
    pub(crate) const SOFT_LOGPROBS: &str = "soft_logprobs";
    pub(crate) const SOFT_ENDS: &str = "soft_ends";
    pub(crate) const DRAWN: &str = "drawn";
    pub(crate) const CHUNK_STARTS: &str = "chunk_starts";
    pub(crate) const CHUNK_LENS: &str = "chunk_lens";
    pub(crate) const CHUNK_NLLS: &str = "chunk_nlls";
    pub(crate) const CHUNK_ENDS: &str = "chunk_ends";
    pub(crate) const EXACT: &str = "exact";
    pub(crate) const LISTS_END: &str = "lists_end";
    pub(crate) const KEYS: &str = "keys";
    pub(crate) const KEY_ENDS: &str = "key_ends";
}

impl Columns {
    /// B
    pub(crate) fn len(&self) -> usize {
        self.input_ends.len()
    }

    /// About as many bytes as the file will have.
    pub(crate) fn bytes(&self) -> usize {
        let words = self.input_ids.len() + 3 * self.positions.len() + 2 * self.soft_ids.len();
        4 * words + self.keys.len()
    }

    /// Makes room for another file.
    pub(crate) fn clear(&mut self) {
        self.input_ids.clear();
        self.input_ends.clear();
        self.positions.clear();
        self.target_ends.clear();
        self.soft_ids.clear();
        self.soft_logprobs.clear();
        self.soft_ends.clear();
        self.drawn.clear();
        self.chunk_starts.clear();
        self.chunk_lens.clear();
        self.chunk_nlls.clear();
        self.chunk_ends.clear();
        self.exact.clear();
        self.lists_end.clear();
        self.keys.clear();
        self.key_ends.clear();
    }

    /// Appends an example. Returns a hash of all that is in it.
    pub(crate) fn push(&mut self, example: &Example) -> blake3::Hash {
        let (first_target, first_soft) = (self.positions.len(), self.soft_ids.len());
        self.keys.extend_from_slice(example.key.as_bytes());
        self.key_ends.push(self.keys.len() as u32);
        self.input_ids.extend_from_slice(example.input_ids);
        self.input_ends.push(self.input_ids.len() as u32);
        let first_chunk = self.chunk_starts.len();
        let mut chunks = example.soft.chunks().iter().peekable();
        for at in example.labels.iter().cloned().flatten() {
            self.positions.push(at as u32 - 1);
            let mut drawn = None;
            if let Some(at) = at.checked_sub(example.answer) {
                if let Some(chunk) = chunks.next_if(|chunk| chunk.start == at) {
                    self.chunk_starts
                        .push((self.positions.len() - first_target - 1) as u32);
                    self.chunk_lens.push(chunk.len as u32);
                    self.chunk_nlls.push(chunk.nll);
                }
                let (ids, logprobs) = example.soft.soft(at);
                self.soft_ids.extend_from_slice(ids);
                self.soft_logprobs.extend_from_slice(logprobs);
                drawn = example.soft.drawn(at);
            }
            self.drawn.push(drawn.unwrap_or(f32::NAN));
            self.soft_ends.push(self.soft_ids.len() as u32);
        }
        self.target_ends.push(self.positions.len() as u32);
        self.chunk_ends.push(self.chunk_starts.len() as u32);
        self.exact.push(example.exact.into());
        let lists_end = example
            .soft
            .lists_end
            .map_or(0, |lists| 1 + u8::from(lists));
        self.lists_end.push(lists_end);

        let mut hash = Hash::default();
        hash.bytes(example.key.as_bytes());
        hash.words(example.input_ids.iter().copied());
        hash.words(self.positions[first_target..].iter().copied());
        let ends = self.soft_ends[first_target..].iter();
        hash.words(ends.map(|end| end - first_soft as u32));
        hash.words(self.soft_ids[first_soft..].iter().copied());
        hash.words(self.soft_logprobs[first_soft..].iter().map(|l| l.to_bits()));
        hash.words(self.drawn[first_target..].iter().map(|l| l.to_bits()));
        hash.words(self.chunk_starts[first_chunk..].iter().copied());
        hash.words(self.chunk_lens[first_chunk..].iter().copied());
        hash.words(self.chunk_nlls[first_chunk..].iter().map(|l| l.to_bits()));
        hash.bytes(&[example.exact.into(), lists_end]);
        hash.0.finalize()
    }

    /// Writes a safetensors file. `narrow`: with token ids of 16 bits.
    ///
    /// # Errors
    /// Where `out` cannot be written.
    pub(crate) fn write(&self, narrow: bool, out: &mut dyn Write) -> io::Result<()> {
        // Wide numbers come first, so that each column is aligned.
        let words = [
            (name::INPUT_ENDS, &self.input_ends),
            (name::POSITIONS, &self.positions),
            (name::TARGET_ENDS, &self.target_ends),
            (name::SOFT_ENDS, &self.soft_ends),
            (name::KEY_ENDS, &self.key_ends),
            (name::CHUNK_STARTS, &self.chunk_starts),
            (name::CHUNK_LENS, &self.chunk_lens),
            (name::CHUNK_ENDS, &self.chunk_ends),
        ];
        let ids = [
            (name::INPUT_IDS, &self.input_ids),
            (name::SOFT_IDS, &self.soft_ids),
        ];
        let (id_type, id_width) = if narrow { ("U16", 2) } else { ("U32", 4) };
        let mut header = Header::default();
        header.add(name::SOFT_LOGPROBS, "F32", 4, self.soft_logprobs.len());
        header.add(name::DRAWN, "F32", 4, self.drawn.len());
        header.add(name::CHUNK_NLLS, "F32", 4, self.chunk_nlls.len());
        for (name, values) in words {
            header.add(name, "U32", 4, values.len());
        }
        for (name, values) in ids {
            header.add(name, id_type, id_width, values.len());
        }
        header.add(name::EXACT, "U8", 1, self.exact.len());
        header.add(name::LISTS_END, "U8", 1, self.lists_end.len());
        header.add(name::KEYS, "U8", 1, self.keys.len());
        header.write(out)?;

        write_all(out, &self.soft_logprobs, f32::to_le_bytes)?;
        write_all(out, &self.drawn, f32::to_le_bytes)?;
        write_all(out, &self.chunk_nlls, f32::to_le_bytes)?;
        for (_, values) in words {
            write_all(out, values, u32::to_le_bytes)?;
        }
        for (_, values) in ids {
            match narrow {
                true => write_all(out, values, |id| (id as u16).to_le_bytes())?,
                false => write_all(out, values, u32::to_le_bytes)?,
            }
        }
        out.write_all(&self.exact)?;
        out.write_all(&self.lists_end)?;
        out.write_all(&self.keys)
    }
}

/// The beginning of a safetensors file.
#[derive(Default)]
pub(crate) struct Header {
    tensors: Map<String, serde_json::Value>,
    end: usize,
}

impl Header {
    /// The next column: `count` values of `width` bytes each.
    pub(crate) fn add(&mut self, name: &str, dtype: &str, width: usize, count: usize) {
        let start = self.end;
        self.end += width * count;
        let tensor = json!({"dtype": dtype, "shape": [count], "data_offsets": [start, self.end]});
        self.tensors.insert(name.into(), tensor);
    }

    /// # Errors
    /// Where `out` cannot be written.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut text = serde_json::to_vec(&self.tensors)?;
        // The format wants the data aligned to 8 bytes, and white space at the end of the header.
        text.resize(text.len().next_multiple_of(8), b' ');
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(&text)
    }
}

/// Writes numbers, little end first, as the format demands.
pub(crate) fn write_all<T: Copy, const N: usize>(
    out: &mut dyn Write,
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(N << 12);
    for values in values.chunks(1 << 12) {
        buffer.clear();
        buffer.extend(values.iter().flat_map(|&value| bytes(value)));
        out.write_all(&buffer)?;
    }
    Ok(())
}

/// Hashes lists with their lengths, so that no two contents give the same bytes.
#[derive(Default)]
struct Hash(blake3::Hasher);

impl Hash {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn words(&mut self, words: impl ExactSizeIterator<Item = u32>) {
        let mut bytes = Vec::with_capacity(4 * words.len());
        for word in words {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        self.bytes(&bytes);
    }
}
