//! One Parquet file with all that a record holds for training.
//!
//! Nested columns are written by Dremel's levels (Melnik et al. 2010, section 4): beside each value
//! stands at which depth a list goes on (its repetition level) and how deep its path exists (its
//! definition level); where a list is empty or a value missing, the levels stand alone.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use parquet::basic::{Compression, Type};
use parquet::data_type::{
    BoolType, ByteArray, ByteArrayType, DataType, DoubleType, FloatType, Int32Type, Int64Type,
};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

use crate::cache::raw_token::RawToken;
use crate::cache::record::{Logprobs, Record};
use crate::export::rows::{ExportReport, ExportRow, ExportRows};
use crate::fs::AtomicFile;

/// Lists as the format's LIST annotation wants them, in three levels, so that every reader sees
/// lists. `messages` is what was asked; `raw` is as in the cache, `position:rank:hex`.
const SCHEMA: &str = "message distill {
    required binary prompt_id (STRING);
    required int32 sample (INTEGER(32,false));
    required group messages (LIST) {
        repeated group list {
            required group element {
                required binary role (STRING);
                required binary content (STRING);
            }
        }
    }
    required binary answer (STRING);
    required binary reasoning (STRING);
    required binary finish_reason (STRING);
    required binary model (STRING);
    required binary endpoint (STRING);
    optional int64 prompt_tokens;
    optional int64 completion_tokens;
    optional double cost_usd;
    required binary sent_at (STRING);
    optional group logprobs {
        required group token (LIST) {
            repeated group list { required binary element (STRING); }
        }
        required group logprob (LIST) {
            repeated group list { optional float element; }
        }
        required group top (LIST) {
            repeated group list {
                required group element (LIST) {
                    repeated group list { required binary element (STRING); }
                }
            }
        }
        required group top_logprob (LIST) {
            repeated group list {
                required group element (LIST) {
                    repeated group list { optional float element; }
                }
            }
        }
        required group raw (LIST) {
            repeated group list { required binary element (STRING); }
        }
        required boolean matches_text;
    }
}";

/// A row group is written once it holds so many values or bytes of text: about 100 MB of memory.
const GROUP_VALUES: usize = 1 << 19;
const GROUP_BYTES: usize = 32 << 20;

pub(super) fn write(
    mut rows: ExportRows<impl Iterator<Item = Result<Record>>>,
    out: &Path,
    force: bool,
) -> Result<ExportReport> {
    let schema = parse_message_type(SCHEMA).context("the Parquet schema")?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .build();
    let file = AtomicFile::create(out)?;
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties))
        .context("could not begin the Parquet file")?;
    let mut group = RowGroup::default();
    while let Some(row) = rows.next()? {
        group.add(&row);
        rows.report.rows += 1;
        if group.is_full() {
            group.write(&mut writer)?;
        }
    }
    group.write(&mut writer)?;
    let report = rows.finish()?;
    let file = writer
        .into_inner()
        .context("could not end the Parquet file")?;
    file.commit(force)?;
    Ok(report)
}

/// The rows of a row group, by column in the order of [`SCHEMA`].
#[derive(Default)]
struct RowGroup {
    rows: usize,
    /// Of text.
    bytes: usize,
    prompt_id: LeafColumn<ByteArrayType>,
    sample: LeafColumn<Int32Type>,
    role: LeafColumn<ByteArrayType>,
    content: LeafColumn<ByteArrayType>,
    answer: LeafColumn<ByteArrayType>,
    reasoning: LeafColumn<ByteArrayType>,
    finish_reason: LeafColumn<ByteArrayType>,
    model: LeafColumn<ByteArrayType>,
    endpoint: LeafColumn<ByteArrayType>,
    prompt_tokens: LeafColumn<Int64Type>,
    completion_tokens: LeafColumn<Int64Type>,
    cost_usd: LeafColumn<DoubleType>,
    sent_at: LeafColumn<ByteArrayType>,
    token: LeafColumn<ByteArrayType>,
    logprob: LeafColumn<FloatType>,
    top: LeafColumn<ByteArrayType>,
    top_logprob: LeafColumn<FloatType>,
    raw: LeafColumn<ByteArrayType>,
    matches_text: LeafColumn<BoolType>,
}

impl RowGroup {
    fn add(&mut self, row: &ExportRow) {
        let ExportRow { record, prompt } = row;
        self.rows += 1;
        self.bytes += prompt.iter().map(|m| m.content.len()).sum::<usize>()
            + record.answer.text.len()
            + record.answer.reasoning.len();
        self.prompt_id.one(text(&record.prompt_id));
        // The bits of an unsigned number, as the annotation says.
        self.sample.one(record.sample.cast_signed());
        self.role
            .list(0, prompt.iter().map(|m| Some(text(&m.role))));
        let contents = prompt.iter().map(|m| Some(text(&m.content)));
        self.content.list(0, contents);
        self.answer.one(text(&record.answer.text));
        self.reasoning.one(text(&record.answer.reasoning));
        self.finish_reason.one(text(&record.answer.finish_reason));
        self.model.one(text(&record.model));
        self.endpoint.one(text(&record.endpoint));
        let tokens = |count: u64| i64::try_from(count).ok();
        let usage = record.usage.as_ref();
        self.prompt_tokens
            .optional(usage.and_then(|usage| tokens(usage.prompt_tokens)));
        self.completion_tokens
            .optional(usage.and_then(|usage| tokens(usage.completion_tokens)));
        self.cost_usd.optional(record.cost_usd);
        self.sent_at.one(text(&record.timing.sent_at));
        match &record.logprobs {
            Some(logprobs) => self.add_logprobs(logprobs),
            None => self.add_no_logprobs(),
        }
    }

    fn add_logprobs(&mut self, logprobs: &Logprobs) {
        let Logprobs {
            token,
            logprob,
            top,
            top_logprob,
            raw,
            matches_text,
        } = logprobs;
        self.bytes += token
            .iter()
            .chain(top.iter().flatten())
            .map(String::len)
            .sum::<usize>();
        self.token
            .list(1, token.iter().map(|token| Some(text(token))));
        self.logprob.list(1, logprob.iter().copied());
        let tops = top
            .iter()
            .map(|top| top.iter().map(|token| Some(text(token))));
        self.top.lists(1, tops);
        let top_logprobs = top_logprob.iter().map(|top| top.iter().copied());
        self.top_logprob.lists(1, top_logprobs);
        self.raw
            .list(1, raw.iter().map(|token| Some(text(&raw_text(token)))));
        self.matches_text.optional(Some(*matches_text));
    }

    fn add_no_logprobs(&mut self) {
        self.token.push(0, 0, None);
        self.logprob.push(0, 0, None);
        self.top.push(0, 0, None);
        self.top_logprob.push(0, 0, None);
        self.raw.push(0, 0, None);
        self.matches_text.optional(None);
    }

    fn is_full(&self) -> bool {
        let values = self.rows.max(self.top.levels()).max(self.content.levels());
        values >= GROUP_VALUES || self.bytes >= GROUP_BYTES
    }

    /// Writes what is there and empties it.
    fn write(&mut self, writer: &mut SerializedFileWriter<AtomicFile>) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        let group = std::mem::take(self);
        let write = || -> parquet::errors::Result<()> {
            let mut into = writer.next_row_group()?;
            group.prompt_id.write(&mut into)?;
            group.sample.write(&mut into)?;
            group.role.write(&mut into)?;
            group.content.write(&mut into)?;
            group.answer.write(&mut into)?;
            group.reasoning.write(&mut into)?;
            group.finish_reason.write(&mut into)?;
            group.model.write(&mut into)?;
            group.endpoint.write(&mut into)?;
            group.prompt_tokens.write(&mut into)?;
            group.completion_tokens.write(&mut into)?;
            group.cost_usd.write(&mut into)?;
            group.sent_at.write(&mut into)?;
            group.token.write(&mut into)?;
            group.logprob.write(&mut into)?;
            group.top.write(&mut into)?;
            group.top_logprob.write(&mut into)?;
            group.raw.write(&mut into)?;
            group.matches_text.write(&mut into)?;
            into.close()?;
            Ok(())
        };
        write().context("could not write a row group")
    }
}

/// The values of a leaf of the schema, with the levels of each place where one stands or is missing.
struct LeafColumn<T: DataType> {
    values: Vec<T::T>,
    definition: Vec<i16>,
    repetition: Vec<i16>,
}

impl<T: DataType> Default for LeafColumn<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            definition: Vec::new(),
            repetition: Vec::new(),
        }
    }
}

impl<T: DataType> LeafColumn<T> {
    fn levels(&self) -> usize {
        self.definition.len()
    }

    fn push(&mut self, repetition: i16, definition: i16, value: Option<T::T>) {
        self.repetition.push(repetition);
        self.definition.push(definition);
        self.values.extend(value);
    }

    /// The value of a required leaf.
    fn one(&mut self, value: T::T) {
        self.push(0, 0, Some(value));
    }

    /// The value of a leaf one of whose steps is optional.
    fn optional(&mut self, value: Option<T::T>) {
        self.push(0, i16::from(value.is_some()), value);
    }

    /// A list at the definition level `outer`. A missing item stands in a list whose items are
    /// optional, where a value lies one level deeper.
    fn list(&mut self, outer: i16, items: impl Iterator<Item = Option<T::T>>) {
        self.items(outer, 0, 1, items);
    }

    /// A list of lists at the definition level `outer`.
    fn lists<I: Iterator<Item = Option<T::T>>>(
        &mut self,
        outer: i16,
        lists: impl Iterator<Item = I>,
    ) {
        let mut repetition = 0;
        for items in lists {
            self.items(outer + 1, repetition, 2, items);
            repetition = 1;
        }
        if repetition == 0 {
            self.push(0, outer, None);
        }
    }

    /// Items of a list that begins at the level `first` and goes on at the level `next`.
    fn items(
        &mut self,
        outer: i16,
        first: i16,
        next: i16,
        items: impl Iterator<Item = Option<T::T>>,
    ) {
        // In the schema the items of lists of numbers may be missing, those of lists of text not.
        let may_miss = T::get_physical_type() == Type::FLOAT;
        let mut repetition = first;
        for item in items {
            let depth = outer + 1 + i16::from(may_miss && item.is_some());
            self.push(repetition, depth, item);
            repetition = next;
        }
        if repetition == first {
            self.push(first, outer, None);
        }
    }

    fn write(
        self,
        group: &mut SerializedRowGroupWriter<'_, AtomicFile>,
    ) -> parquet::errors::Result<()> {
        let Some(mut column) = group.next_column()? else {
            return Err(parquet::errors::ParquetError::General(
                "more columns than the schema has".into(),
            ));
        };
        column.typed::<T>().write_batch(
            &self.values,
            Some(&self.definition),
            Some(&self.repetition),
        )?;
        column.close()
    }
}

fn text(text: &str) -> ByteArray {
    ByteArray::from(text)
}

fn raw_text(token: &RawToken) -> String {
    format!("{}:{}:{}", token.position, token.rank, token.hex)
}
