//! Columns of examples in memory, and the safetensors file that they become.

#![allow(
    non_snake_case,
    reason = "arrays carry their shape as a suffix: see the legend in `data`"
)]

use std::io::{self, Write};
use std::ops::Range;

use serde_json::{Map, json};

use crate::data::align::aligned::Aligned;

/// A tokenised conversation with its labels.
pub(crate) struct Example<'a> {
    /// Name of the example in errors: the cache key, or the line number in a file of conversations.
    pub key: &'a str,
    pub input_ids_T: &'a [u32],
    /// Token ids of the source, for an encoder-decoder; else empty.
    pub source_ids_U: &'a [u32],
    /// Ranges of `input_ids_T` to predict, in order: the answers with their end-of-turn tokens. No range starts at 0,
    /// because no token predicts the first one.
    pub labels: &'a [Range<usize>],
    /// Soft labels of the answer that starts at index `answer`.
    pub soft: &'a Aligned,
    /// Index in `input_ids_T` of the first token of the answer with soft labels.
    pub answer: usize,
    /// True if this answer was sampled from the distribution of its logprobs.
    pub is_exact_sample: bool,
}

/// Examples end to end: B examples of T tokens in total, with N supervised positions, their soft labels (NK) and C
/// chunks.
#[derive(Debug, Default)]
pub(crate) struct ExampleColumns {
    input_ids_T: Vec<u32>,
    /// End of each example in `input_ids_T`.
    input_ends_B: Vec<u32>,
    /// Token ids of the sources of an encoder-decoder.
    source_ids_U: Vec<u32>,
    /// End of each example in `source_ids_U`.
    source_ends_B: Vec<u32>,
    /// Index of each supervised position in the tokens of its example. The label is the next token.
    positions_N: Vec<u32>,
    /// End of each example in `positions_N`.
    target_ends_B: Vec<u32>,
    soft_ids_NK: Vec<u32>,
    soft_logprobs_NK: Vec<f32>,
    /// End of each position's labels in `soft_ids_NK`.
    soft_ends_N: Vec<u32>,
    /// Logprob of a label from outside the top-k; see [`Aligned::sampled_logprob`]. NaN stands for None.
    sampled_logprobs_N: Vec<f32>,
    /// First position of each chunk, counted in its example.
    chunk_starts_C: Vec<u32>,
    /// Number of positions of each chunk.
    chunk_lens_C: Vec<u32>,
    /// Negative log-likelihood of each chunk under the teacher.
    chunk_nlls_C: Vec<f32>,
    /// End of each example in `chunk_starts_C`.
    chunk_ends_B: Vec<u32>,
    /// See [`Example::is_exact_sample`]: 0 stands for false, 1 for true.
    is_exact_sample_B: Vec<u8>,
    /// See [`Aligned::lists_end`]: 0 stands for None, 1 for false, 2 for true.
    lists_end_B: Vec<u8>,
    /// Bytes of all keys.
    keys: Vec<u8>,
    /// End of each example in `keys`.
    key_ends_B: Vec<u32>,
}

/// Names of the columns in a file.
pub(crate) mod name {
    pub(crate) const INPUT_IDS: &str = "input_ids";
    pub(crate) const INPUT_ENDS: &str = "input_ends";
    pub(crate) const SOURCE_IDS: &str = "source_ids";
    pub(crate) const SOURCE_ENDS: &str = "source_ends";
    pub(crate) const POSITIONS: &str = "positions";
    pub(crate) const TARGET_ENDS: &str = "target_ends";
    pub(crate) const SOFT_IDS: &str = "soft_ids";
    pub(crate) const SOFT_LOGPROBS: &str = "soft_logprobs";
    pub(crate) const SOFT_ENDS: &str = "soft_ends";
    pub(crate) const SAMPLED_LOGPROBS: &str = "drawn";
    pub(crate) const CHUNK_STARTS: &str = "chunk_starts";
    pub(crate) const CHUNK_LENS: &str = "chunk_lens";
    pub(crate) const CHUNK_NLLS: &str = "chunk_nlls";
    pub(crate) const CHUNK_ENDS: &str = "chunk_ends";
    pub(crate) const IS_EXACT_SAMPLE: &str = "exact";
    pub(crate) const LISTS_END: &str = "lists_end";
    pub(crate) const KEYS: &str = "keys";
    pub(crate) const KEY_ENDS: &str = "key_ends";
}

impl ExampleColumns {
    /// B, the number of examples.
    pub(crate) fn len(&self) -> usize {
        self.input_ends_B.len()
    }

    /// Returns the approximate size of the file in bytes. Counts only the columns of 32-bit words per token, position
    /// or soft label, and the keys.
    pub(crate) fn bytes(&self) -> usize {
        let words = self.input_ids_T.len()
            + self.source_ids_U.len()
            + 3 * self.positions_N.len()
            + 2 * self.soft_ids_NK.len();
        4 * words + self.keys.len()
    }

    /// Removes all examples, so that the columns can be filled for another file.
    pub(crate) fn clear(&mut self) {
        self.input_ids_T.clear();
        self.input_ends_B.clear();
        self.source_ids_U.clear();
        self.source_ends_B.clear();
        self.positions_N.clear();
        self.target_ends_B.clear();
        self.soft_ids_NK.clear();
        self.soft_logprobs_NK.clear();
        self.soft_ends_N.clear();
        self.sampled_logprobs_N.clear();
        self.chunk_starts_C.clear();
        self.chunk_lens_C.clear();
        self.chunk_nlls_C.clear();
        self.chunk_ends_B.clear();
        self.is_exact_sample_B.clear();
        self.lists_end_B.clear();
        self.keys.clear();
        self.key_ends_B.clear();
    }

    /// Appends an example. Returns a hash of its content.
    pub(crate) fn push(&mut self, example: &Example) -> blake3::Hash {
        let first_target = self.positions_N.len();
        let first_soft = self.soft_ids_NK.len();
        self.keys.extend_from_slice(example.key.as_bytes());
        self.key_ends_B.push(self.keys.len() as u32);
        self.input_ids_T.extend_from_slice(example.input_ids_T);
        self.input_ends_B.push(self.input_ids_T.len() as u32);
        self.source_ids_U.extend_from_slice(example.source_ids_U);
        self.source_ends_B.push(self.source_ids_U.len() as u32);
        let first_chunk = self.chunk_starts_C.len();
        let mut chunks = example.soft.chunks().iter().peekable();
        for label_index in example.labels.iter().cloned().flatten() {
            self.positions_N.push(label_index as u32 - 1);
            let mut sampled_logprob = None;
            if let Some(at) = label_index.checked_sub(example.answer) {
                if let Some(chunk) = chunks.next_if(|chunk| chunk.start == at) {
                    self.chunk_starts_C
                        .push((self.positions_N.len() - first_target - 1) as u32);
                    self.chunk_lens_C.push(chunk.len as u32);
                    self.chunk_nlls_C.push(chunk.nll);
                }
                let (ids, logprobs) = example.soft.soft(at);
                self.soft_ids_NK.extend_from_slice(ids);
                self.soft_logprobs_NK.extend_from_slice(logprobs);
                sampled_logprob = example.soft.sampled_logprob(at);
            }
            self.sampled_logprobs_N
                .push(sampled_logprob.unwrap_or(f32::NAN));
            self.soft_ends_N.push(self.soft_ids_NK.len() as u32);
        }
        self.target_ends_B.push(self.positions_N.len() as u32);
        self.chunk_ends_B.push(self.chunk_starts_C.len() as u32);
        self.is_exact_sample_B.push(example.is_exact_sample.into());
        let lists_end = example
            .soft
            .lists_end
            .map_or(0, |lists| 1 + u8::from(lists));
        self.lists_end_B.push(lists_end);

        let mut hash = ContentHasher::default();
        hash.bytes(example.key.as_bytes());
        hash.words(example.input_ids_T.iter().copied());
        hash.words(self.positions_N[first_target..].iter().copied());
        let ends = self.soft_ends_N[first_target..].iter();
        hash.words(ends.map(|end| end - first_soft as u32));
        hash.words(self.soft_ids_NK[first_soft..].iter().copied());
        hash.words(
            self.soft_logprobs_NK[first_soft..]
                .iter()
                .map(|l| l.to_bits()),
        );
        hash.words(
            self.sampled_logprobs_N[first_target..]
                .iter()
                .map(|l| l.to_bits()),
        );
        hash.words(self.chunk_starts_C[first_chunk..].iter().copied());
        hash.words(self.chunk_lens_C[first_chunk..].iter().copied());
        hash.words(self.chunk_nlls_C[first_chunk..].iter().map(|l| l.to_bits()));
        hash.bytes(&[example.is_exact_sample.into(), lists_end]);
        // Examples without a source keep the hash that earlier versions computed.
        if !example.source_ids_U.is_empty() {
            hash.words(example.source_ids_U.iter().copied());
        }
        hash.0.finalize()
    }

    /// Writes a safetensors file, with token ids of 16 bits if `uses_u16_ids`, else of 32 bits.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub(crate) fn write(&self, uses_u16_ids: bool, out: &mut dyn Write) -> io::Result<()> {
        // Wider numbers come first, so that each column is aligned.
        let words = [
            (name::INPUT_ENDS, &self.input_ends_B),
            (name::SOURCE_ENDS, &self.source_ends_B),
            (name::POSITIONS, &self.positions_N),
            (name::TARGET_ENDS, &self.target_ends_B),
            (name::SOFT_ENDS, &self.soft_ends_N),
            (name::KEY_ENDS, &self.key_ends_B),
            (name::CHUNK_STARTS, &self.chunk_starts_C),
            (name::CHUNK_LENS, &self.chunk_lens_C),
            (name::CHUNK_ENDS, &self.chunk_ends_B),
        ];
        let ids = [
            (name::INPUT_IDS, &self.input_ids_T),
            (name::SOURCE_IDS, &self.source_ids_U),
            (name::SOFT_IDS, &self.soft_ids_NK),
        ];
        let (id_type, id_width) = if uses_u16_ids { ("U16", 2) } else { ("U32", 4) };
        let mut header = SafetensorsHeader::default();
        header.add(name::SOFT_LOGPROBS, "F32", 4, self.soft_logprobs_NK.len());
        header.add(
            name::SAMPLED_LOGPROBS,
            "F32",
            4,
            self.sampled_logprobs_N.len(),
        );
        header.add(name::CHUNK_NLLS, "F32", 4, self.chunk_nlls_C.len());
        for (name, values) in words {
            header.add(name, "U32", 4, values.len());
        }
        for (name, values) in ids {
            header.add(name, id_type, id_width, values.len());
        }
        header.add(name::IS_EXACT_SAMPLE, "U8", 1, self.is_exact_sample_B.len());
        header.add(name::LISTS_END, "U8", 1, self.lists_end_B.len());
        header.add(name::KEYS, "U8", 1, self.keys.len());
        header.write(out)?;

        write_all(out, &self.soft_logprobs_NK, f32::to_le_bytes)?;
        write_all(out, &self.sampled_logprobs_N, f32::to_le_bytes)?;
        write_all(out, &self.chunk_nlls_C, f32::to_le_bytes)?;
        for (_, values) in words {
            write_all(out, values, u32::to_le_bytes)?;
        }
        for (_, values) in ids {
            if uses_u16_ids {
                write_all(out, values, |id| (id as u16).to_le_bytes())?;
            } else {
                write_all(out, values, u32::to_le_bytes)?;
            }
        }
        out.write_all(&self.is_exact_sample_B)?;
        out.write_all(&self.lists_end_B)?;
        out.write_all(&self.keys)
    }
}

/// Header of a safetensors file.
#[derive(Default)]
pub(crate) struct SafetensorsHeader {
    tensors: Map<String, serde_json::Value>,
    /// End of the last column, in bytes after the header.
    end: usize,
}

impl SafetensorsHeader {
    /// Adds the next column: `count` values of `width` bytes each.
    pub(crate) fn add(&mut self, name: &str, dtype: &str, width: usize, count: usize) {
        let start = self.end;
        self.end += width * count;
        let tensor = json!({"dtype": dtype, "shape": [count], "data_offsets": [start, self.end]});
        self.tensors.insert(name.into(), tensor);
    }

    /// Writes the header and its length.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut text = serde_json::to_vec(&self.tensors)?;
        // The format requires data aligned to 8 bytes, and pads the header with white space.
        text.resize(text.len().next_multiple_of(8), b' ');
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(&text)
    }
}

/// Number of values that [`write_all`] encodes at a time.
const VALUES_PER_WRITE: usize = 1 << 12;

/// Writes numbers in little-endian order, as the format requires.
pub(crate) fn write_all<T: Copy, const N: usize>(
    out: &mut dyn Write,
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(N * VALUES_PER_WRITE);
    for values in values.chunks(VALUES_PER_WRITE) {
        buffer.clear();
        buffer.extend(values.iter().flat_map(|&value| bytes(value)));
        out.write_all(&buffer)?;
    }
    Ok(())
}

/// Hashes lists with their lengths, so that different contents never give the same bytes.
#[derive(Default)]
struct ContentHasher(blake3::Hasher);

impl ContentHasher {
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
