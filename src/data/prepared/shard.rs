//! A safetensors file of examples, read in place.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};

use super::columns::name;
use crate::ops::mapped_file::MappedFile;

/// The bytes of a file, wherever they are.
#[derive(Debug)]
pub enum Bytes {
    Mapped(MappedFile),
    Memory(Vec<u8>),
}

impl Bytes {
    fn all(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Memory(bytes) => bytes,
        }
    }
}

/// A column of unsigned numbers. They are put together from their bytes: those of a file in memory
/// need not be aligned.
#[derive(Debug, Clone)]
struct Column {
    /// Where it lies in the file.
    bytes: Range<usize>,
    width: usize,
}

impl Column {
    fn of(metadata: &Metadata, data: usize, name: &str, dtypes: &[Dtype]) -> Result<Self> {
        let info = metadata
            .info(name)
            .with_context(|| format!("it has no {name}"))?;
        ensure!(dtypes.contains(&info.dtype), "{name} is of another type");
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

    /// The part that ends at the `at`-th of the ends in this column.
    fn span(&self, bytes: &[u8], at: usize) -> Range<usize> {
        let start = at
            .checked_sub(1)
            .map_or(0, |before| self.get(bytes, before));
        start as usize..self.get(bytes, at) as usize
    }
}

/// A number of 1, 2 or 4 bytes, little end first.
fn value(bytes: &[u8]) -> u32 {
    match *bytes {
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        [a, b] => u32::from(u16::from_le_bytes([a, b])),
        _ => bytes.first().copied().unwrap_or_default().into(),
    }
}

/// A file as `Columns::write` makes it.
#[derive(Debug)]
pub struct Shard {
    bytes: Bytes,
    input_ids: Column,
    input_ends: Column,
    positions: Column,
    target_ends: Column,
    soft_ids: Column,
    soft_logprobs: Column,
    soft_ends: Column,
    drawn: Column,
    chunk_starts: Column,
    chunk_lens: Column,
    chunk_nlls: Column,
    chunk_ends: Column,
    exact: Column,
    lists_end: Column,
    keys: Column,
    key_ends: Column,
}

impl Shard {
    /// # Errors
    /// If the header is none, or not that of such a file. What lies behind it is for a checksum.
    pub fn new(bytes: Bytes) -> Result<Self> {
        let (length, metadata) = SafeTensors::read_metadata(bytes.all())?;
        let column = |name, dtypes: &[Dtype]| Column::of(&metadata, 8 + length, name, dtypes);
        let words = |name| column(name, &[Dtype::U32]);
        let ids = |name| column(name, &[Dtype::U16, Dtype::U32]);
        let shard = Self {
            input_ids: ids(name::INPUT_IDS)?,
            input_ends: words(name::INPUT_ENDS)?,
            positions: words(name::POSITIONS)?,
            target_ends: words(name::TARGET_ENDS)?,
            soft_ids: ids(name::SOFT_IDS)?,
            soft_logprobs: column(name::SOFT_LOGPROBS, &[Dtype::F32])?,
            soft_ends: words(name::SOFT_ENDS)?,
            drawn: column(name::DRAWN, &[Dtype::F32])?,
            chunk_starts: words(name::CHUNK_STARTS)?,
            chunk_lens: words(name::CHUNK_LENS)?,
            chunk_nlls: column(name::CHUNK_NLLS, &[Dtype::F32])?,
            chunk_ends: words(name::CHUNK_ENDS)?,
            exact: column(name::EXACT, &[Dtype::U8])?,
            lists_end: column(name::LISTS_END, &[Dtype::U8])?,
            keys: column(name::KEYS, &[Dtype::U8])?,
            key_ends: words(name::KEY_ENDS)?,
            bytes,
        };
        let examples = [
            &shard.target_ends,
            &shard.key_ends,
            &shard.chunk_ends,
            &shard.exact,
            &shard.lists_end,
        ];
        let positions = [&shard.soft_ends, &shard.drawn];
        if examples.iter().any(|column| column.len() != shard.len())
            || positions
                .iter()
                .any(|column| column.len() != shard.positions.len())
        {
            bail!("its columns do not fit each other");
        }
        Ok(shard)
    }

    /// Examples in it.
    pub(crate) fn len(&self) -> usize {
        self.input_ends.len()
    }

    /// Example `index`, which is less than [`Self::len`].
    pub fn example(&self, index: usize) -> ExampleView<'_> {
        ExampleView { shard: self, index }
    }
}

/// A tokenised conversation of T tokens, of which N are supervised: the answers and their
/// end-of-turn tokens. Borrowed from its shard.
#[derive(Debug, Clone, Copy)]
pub struct ExampleView<'a> {
    shard: &'a Shard,
    index: usize,
}

impl<'a> ExampleView<'a> {
    fn bytes(self) -> &'a [u8] {
        self.shard.bytes.all()
    }

    fn targets(self) -> Range<usize> {
        self.shard.target_ends.span(self.bytes(), self.index)
    }

    fn soft(self) -> Range<usize> {
        let (bytes, targets, ends) = (self.bytes(), self.targets(), &self.shard.soft_ends);
        if targets.is_empty() {
            return 0..0;
        }
        ends.span(bytes, targets.start).start..ends.span(bytes, targets.end - 1).end
    }

    /// The cache key, or the row's number in a file of conversations: names the example in errors.
    pub fn key(self) -> &'a str {
        let (bytes, shard) = (self.bytes(), self.shard);
        let range = shard.key_ends.span(bytes, self.index);
        std::str::from_utf8(shard.keys.part(bytes, range)).unwrap_or_default()
    }

    /// T
    pub fn tokens(self) -> usize {
        self.shard.input_ends.span(self.bytes(), self.index).len()
    }

    /// N
    pub fn supervised(self) -> usize {
        self.targets().len()
    }

    /// (T)
    pub fn input_ids(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        let (bytes, shard) = (self.bytes(), self.shard);
        let range = shard.input_ends.span(bytes, self.index);
        shard.input_ids.values(bytes, range)
    }

    /// Index in `input_ids` of each token that predicts; the label is the token behind it (N).
    pub fn positions(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.shard.positions.values(self.bytes(), self.targets())
    }

    /// Where the soft labels of each position end, in those of the example (N).
    pub fn soft_ends(self) -> impl ExactSizeIterator<Item = usize> + use<'a> {
        let start = self.soft().start;
        let ends = self.shard.soft_ends.values(self.bytes(), self.targets());
        ends.map(move |end| end as usize - start)
    }

    /// The logprob of each label that the teacher emitted from outside its top-k, -inf where it is
    /// not known (N).
    pub fn drawn(self) -> impl ExactSizeIterator<Item = Option<f32>> + use<'a> {
        let values = self.shard.drawn.values(self.bytes(), self.targets());
        values.map(|bits| Some(f32::from_bits(bits)).filter(|logprob| !logprob.is_nan()))
    }

    /// The positions that spell what the teacher cuts into other tokens, counted among the supervised
    /// ones, with the negative log-likelihood of that text under the teacher.
    pub fn chunks(self) -> impl Iterator<Item = (Range<usize>, f32)> + use<'a> {
        let (bytes, shard) = (self.bytes(), self.shard);
        let range = shard.chunk_ends.span(bytes, self.index);
        let starts = shard.chunk_starts.values(bytes, range.clone());
        let lens = shard.chunk_lens.values(bytes, range.clone());
        let nlls = shard.chunk_nlls.values(bytes, range).map(f32::from_bits);
        starts.zip(lens).zip(nlls).map(|((start, len), nll)| {
            let start = start as usize;
            (start..start + len as usize, nll)
        })
    }

    /// Was the answer drawn from the very distribution that its logprobs tell?
    pub fn is_exact(self) -> bool {
        self.shard.exact.get(self.bytes(), self.index) != 0
    }

    /// Where the answer ends its turn: did the teacher say how likely that was?
    pub fn lists_end(self) -> Option<bool> {
        match self.shard.lists_end.get(self.bytes(), self.index) {
            0 => None,
            lists => Some(lists == 2),
        }
    }

    /// The student tokens of the soft labels of all positions.
    pub fn soft_ids(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.shard.soft_ids.values(self.bytes(), self.soft())
    }

    /// Their logprobs, as the teacher gave them to the last bit.
    pub fn soft_logprobs(self) -> impl ExactSizeIterator<Item = f32> + use<'a> {
        let values = self.shard.soft_logprobs.values(self.bytes(), self.soft());
        values.map(f32::from_bits)
    }
}
