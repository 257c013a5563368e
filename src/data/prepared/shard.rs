//! Reads examples from a safetensors file, in place.

#![allow(
    non_snake_case,
    reason = "arrays carry their shape as a suffix: see the legend in `data`"
)]

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};

use super::columns::name;
use crate::ops::mapped_file::MappedFile;

/// Bytes of a shard, mapped or in memory.
#[derive(Debug)]
pub(crate) enum ShardBytes {
    Mapped(MappedFile),
    Memory(Vec<u8>),
}

impl ShardBytes {
    fn all(&self) -> &[u8] {
        match self {
            ShardBytes::Mapped(map) => map,
            ShardBytes::Memory(bytes) => bytes,
        }
    }
}

/// A column of little-endian numbers. They are decoded from bytes, because a file in memory may be unaligned.
#[derive(Debug, Clone)]
struct ColumnView {
    /// Byte range in the file.
    bytes: Range<usize>,
    /// Bytes per number.
    width: usize,
}

impl ColumnView {
    /// Finds the column `name`, which must have one of `dtypes`. `data` is the offset of all columns in the file.
    fn find(metadata: &Metadata, data: usize, name: &str, dtypes: &[Dtype]) -> Result<Self> {
        let info = metadata
            .info(name)
            .with_context(|| format!("the column {name} is missing"))?;
        ensure!(
            dtypes.contains(&info.dtype),
            "the column {name} has another type"
        );
        let (start, end) = info.data_offsets;
        Ok(Self {
            bytes: data + start..data + end,
            width: info.dtype.bitsize() / 8,
        })
    }

    fn len(&self) -> usize {
        self.bytes.len() / self.width
    }

    fn part<'a>(&self, bytes: &'a [u8], range: Range<usize>) -> &'a [u8] {
        let column = &bytes[self.bytes.clone()];
        &column[range.start * self.width..range.end * self.width]
    }

    fn get(&self, bytes: &[u8], at: usize) -> u32 {
        value(self.part(bytes, at..at + 1))
    }

    fn values<'a>(
        &self,
        bytes: &'a [u8],
        range: Range<usize>,
    ) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.part(bytes, range).chunks_exact(self.width).map(value)
    }

    /// Returns the range of item `at`; this must be a column of ends.
    fn span(&self, bytes: &[u8], at: usize) -> Range<usize> {
        let start = at
            .checked_sub(1)
            .map_or(0, |previous| self.get(bytes, previous));
        start as usize..self.get(bytes, at) as usize
    }
}

/// Decodes a little-endian number of 1, 2 or 4 bytes.
fn value(bytes: &[u8]) -> u32 {
    match *bytes {
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        [a, b] => u32::from(u16::from_le_bytes([a, b])),
        _ => bytes.first().copied().unwrap_or_default().into(),
    }
}

/// A file that `ExampleColumns::write` wrote.
#[derive(Debug)]
pub(crate) struct PreparedShard {
    bytes: ShardBytes,
    input_ids_T: ColumnView,
    input_ends_B: ColumnView,
    source_ids_U: ColumnView,
    source_ends_B: ColumnView,
    positions_N: ColumnView,
    target_ends_B: ColumnView,
    soft_ids_NK: ColumnView,
    soft_logprobs_NK: ColumnView,
    soft_ends_N: ColumnView,
    sampled_logprobs_N: ColumnView,
    chunk_starts_C: ColumnView,
    chunk_lens_C: ColumnView,
    chunk_nlls_C: ColumnView,
    chunk_ends_B: ColumnView,
    is_exact_sample_B: ColumnView,
    lists_end_B: ColumnView,
    keys: ColumnView,
    key_ends_B: ColumnView,
}

impl PreparedShard {
    /// Reads the header. The data after it is not checked: a checksum covers it.
    ///
    /// # Errors
    /// If the header is invalid or a column is missing.
    pub(crate) fn new(bytes: ShardBytes) -> Result<Self> {
        let (length, metadata) = SafeTensors::read_metadata(bytes.all())?;
        // The file begins with the length of the header, in 8 bytes.
        let data = 8 + length;
        let column = |name, dtypes: &[Dtype]| ColumnView::find(&metadata, data, name, dtypes);
        let words = |name| column(name, &[Dtype::U32]);
        let ids = |name| column(name, &[Dtype::U16, Dtype::U32]);
        let shard = Self {
            input_ids_T: ids(name::INPUT_IDS)?,
            input_ends_B: words(name::INPUT_ENDS)?,
            source_ids_U: ids(name::SOURCE_IDS)?,
            source_ends_B: words(name::SOURCE_ENDS)?,
            positions_N: words(name::POSITIONS)?,
            target_ends_B: words(name::TARGET_ENDS)?,
            soft_ids_NK: ids(name::SOFT_IDS)?,
            soft_logprobs_NK: column(name::SOFT_LOGPROBS, &[Dtype::F32])?,
            soft_ends_N: words(name::SOFT_ENDS)?,
            sampled_logprobs_N: column(name::SAMPLED_LOGPROBS, &[Dtype::F32])?,
            chunk_starts_C: words(name::CHUNK_STARTS)?,
            chunk_lens_C: words(name::CHUNK_LENS)?,
            chunk_nlls_C: column(name::CHUNK_NLLS, &[Dtype::F32])?,
            chunk_ends_B: words(name::CHUNK_ENDS)?,
            is_exact_sample_B: column(name::IS_EXACT_SAMPLE, &[Dtype::U8])?,
            lists_end_B: column(name::LISTS_END, &[Dtype::U8])?,
            keys: column(name::KEYS, &[Dtype::U8])?,
            key_ends_B: words(name::KEY_ENDS)?,
            bytes,
        };
        let examples = [
            &shard.source_ends_B,
            &shard.target_ends_B,
            &shard.key_ends_B,
            &shard.chunk_ends_B,
            &shard.is_exact_sample_B,
            &shard.lists_end_B,
        ];
        let positions = [&shard.soft_ends_N, &shard.sampled_logprobs_N];
        if examples.iter().any(|column| column.len() != shard.len())
            || positions
                .iter()
                .any(|column| column.len() != shard.positions_N.len())
        {
            bail!("its columns have different lengths");
        }
        Ok(shard)
    }

    /// Number of examples.
    pub(crate) fn len(&self) -> usize {
        self.input_ends_B.len()
    }

    /// Returns example `index`, which must be less than the number of examples.
    pub(crate) fn example(&self, index: usize) -> ExampleView<'_> {
        ExampleView { shard: self, index }
    }
}

/// A tokenised conversation of T tokens, borrowed from its shard. N of them are supervised: the answers and their
/// end-of-turn tokens.
#[derive(Debug, Clone, Copy)]
pub struct ExampleView<'a> {
    shard: &'a PreparedShard,
    index: usize,
}

impl<'a> ExampleView<'a> {
    fn bytes(self) -> &'a [u8] {
        self.shard.bytes.all()
    }

    fn targets(self) -> Range<usize> {
        self.shard.target_ends_B.span(self.bytes(), self.index)
    }

    fn soft(self) -> Range<usize> {
        let bytes = self.bytes();
        let targets = self.targets();
        let ends = &self.shard.soft_ends_N;
        if targets.is_empty() {
            return 0..0;
        }
        ends.span(bytes, targets.start).start..ends.span(bytes, targets.end - 1).end
    }

    /// Name of the example in errors: the cache key, or the line number in a file of conversations.
    pub fn key(self) -> &'a str {
        let bytes = self.bytes();
        let shard = self.shard;
        let range = shard.key_ends_B.span(bytes, self.index);
        std::str::from_utf8(shard.keys.part(bytes, range)).unwrap_or_default()
    }

    /// Number of tokens (T), the source included.
    pub fn tokens(self) -> usize {
        let input = self.shard.input_ends_B.span(self.bytes(), self.index);
        input.len() + self.source().len()
    }

    fn source(self) -> Range<usize> {
        self.shard.source_ends_B.span(self.bytes(), self.index)
    }

    /// Token ids of the source, for an encoder-decoder; else empty.
    pub fn source_ids(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.shard.source_ids_U.values(self.bytes(), self.source())
    }

    /// N, the number of supervised positions.
    pub fn supervised(self) -> usize {
        self.targets().len()
    }

    /// Token ids (T).
    pub fn input_ids(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        let bytes = self.bytes();
        let shard = self.shard;
        let range = shard.input_ends_B.span(bytes, self.index);
        shard.input_ids_T.values(bytes, range)
    }

    /// Index in `input_ids` of each supervised position; the label is the next token (N).
    pub fn positions(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.shard.positions_N.values(self.bytes(), self.targets())
    }

    /// End of each position's soft labels in [`Self::soft_ids`] (N).
    pub(crate) fn soft_ends(self) -> impl ExactSizeIterator<Item = usize> + use<'a> {
        let start = self.soft().start;
        let ends = self.shard.soft_ends_N.values(self.bytes(), self.targets());
        ends.map(move |end| end as usize - start)
    }

    /// Logprob of each label that the teacher emitted from outside its top-k; -inf if unknown, None for other labels
    /// (N).
    pub(crate) fn sampled_logprobs(self) -> impl ExactSizeIterator<Item = Option<f32>> + use<'a> {
        let values = self
            .shard
            .sampled_logprobs_N
            .values(self.bytes(), self.targets());
        values.map(|bits| Some(f32::from_bits(bits)).filter(|logprob| !logprob.is_nan()))
    }

    /// Chunks: ranges of supervised positions whose text the teacher splits differently, with the negative
    /// log-likelihood of the text under the teacher.
    pub fn chunks(self) -> impl Iterator<Item = (Range<usize>, f32)> + use<'a> {
        let bytes = self.bytes();
        let shard = self.shard;
        let range = shard.chunk_ends_B.span(bytes, self.index);
        let starts = shard.chunk_starts_C.values(bytes, range.clone());
        let lens = shard.chunk_lens_C.values(bytes, range.clone());
        let nlls = shard.chunk_nlls_C.values(bytes, range).map(f32::from_bits);
        starts.zip(lens).zip(nlls).map(|((start, len), nll)| {
            let start = start as usize;
            (start..start + len as usize, nll)
        })
    }

    /// Returns true if the answer was sampled from the distribution of its logprobs.
    pub fn is_exact_sample(self) -> bool {
        self.shard.is_exact_sample_B.get(self.bytes(), self.index) != 0
    }

    /// Whether the teacher's logprobs include the end of the turn; None if the answer does not end its turn, or
    /// could not be aligned with its logprobs.
    pub fn lists_end(self) -> Option<bool> {
        match self.shard.lists_end_B.get(self.bytes(), self.index) {
            0 => None,
            lists => Some(lists == 2),
        }
    }

    /// Student tokens of the soft labels, position after position (NK).
    pub(crate) fn soft_ids(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.shard.soft_ids_NK.values(self.bytes(), self.soft())
    }

    /// Logprobs of the soft labels (NK), bit-identical to the output of the aligner.
    pub(crate) fn soft_logprobs(self) -> impl ExactSizeIterator<Item = f32> + use<'a> {
        let values = self
            .shard
            .soft_logprobs_NK
            .values(self.bytes(), self.soft());
        values.map(f32::from_bits)
    }
}
