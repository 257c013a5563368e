//! One Parquet file with all training data of each record.
//!
//! Nested columns are written with Dremel's levels (Melnik et al. 2010, section 4). The repetition level of a value
//! is the depth of the list that it continues; its definition level is the depth to which its path exists. An empty
//! list or a missing value has levels but no value.

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

/// Lists have the three levels of the format's LIST annotation, so that every reader recognises them. `messages` is
/// the request; `raw` is `position:rank:hex`, as in the cache.
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

/// Number of values in a column at which a row group is written. With [`GROUP_BYTES`], a row group uses about 100 MB of
/// memory.
const GROUP_VALUES: usize = 1 << 19;
/// Number of bytes of text at which a row group is written.
const GROUP_BYTES: usize = 32 << 20;

/// Writes the export to `out`.
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

/// Rows of a row group, by column in the order of [`SCHEMA`].
#[derive(Default)]
struct RowGroup {
    rows: usize,
    /// Bytes of text.
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
        self.prompt_id.required(text(&record.prompt_id));
        // The annotation declares the bits as unsigned.
        self.sample.required(record.sample.cast_signed());
        self.role
            .list(0, prompt.iter().map(|m| Some(text(&m.role))));
        let contents = prompt.iter().map(|m| Some(text(&m.content)));
        self.content.list(0, contents);
        self.answer.required(text(&record.answer.text));
        self.reasoning.required(text(&record.answer.reasoning));
        self.finish_reason
            .required(text(&record.answer.finish_reason));
        self.model.required(text(&record.model));
        self.endpoint.required(text(&record.endpoint));
        let signed = |count: u64| i64::try_from(count).ok();
        let usage = record.usage.as_ref();
        self.prompt_tokens
            .optional(usage.and_then(|usage| signed(usage.prompt_tokens)));
        self.completion_tokens
            .optional(usage.and_then(|usage| signed(usage.completion_tokens)));
        self.cost_usd.optional(record.cost_usd);
        self.sent_at.required(text(&record.timing.sent_at));
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

    /// Writes the rows, if there are any, and clears the group.
    fn write(&mut self, writer: &mut SerializedFileWriter<AtomicFile>) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        let group = std::mem::take(self);
        let write = || -> parquet::errors::Result<()> {
            let mut row_group = writer.next_row_group()?;
            group.prompt_id.write(&mut row_group)?;
            group.sample.write(&mut row_group)?;
            group.role.write(&mut row_group)?;
            group.content.write(&mut row_group)?;
            group.answer.write(&mut row_group)?;
            group.reasoning.write(&mut row_group)?;
            group.finish_reason.write(&mut row_group)?;
            group.model.write(&mut row_group)?;
            group.endpoint.write(&mut row_group)?;
            group.prompt_tokens.write(&mut row_group)?;
            group.completion_tokens.write(&mut row_group)?;
            group.cost_usd.write(&mut row_group)?;
            group.sent_at.write(&mut row_group)?;
            group.token.write(&mut row_group)?;
            group.logprob.write(&mut row_group)?;
            group.top.write(&mut row_group)?;
            group.top_logprob.write(&mut row_group)?;
            group.raw.write(&mut row_group)?;
            group.matches_text.write(&mut row_group)?;
            row_group.close()?;
            Ok(())
        };
        write().context("could not write a row group")
    }
}

/// Values of a leaf of the schema, and the levels of each value and of each missing value.
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

    /// Appends the value of a required leaf.
    fn required(&mut self, value: T::T) {
        self.push(0, 0, Some(value));
    }

    /// Appends the value of a leaf with one optional level.
    fn optional(&mut self, value: Option<T::T>) {
        self.push(0, i16::from(value.is_some()), value);
    }

    /// Appends a list at the definition level `outer`. If the items of the list are optional, a present item has a
    /// definition level one higher than a missing item.
    fn list(&mut self, outer: i16, items: impl Iterator<Item = Option<T::T>>) {
        self.items(outer, 0, 1, items);
    }

    /// Appends a list of lists at the definition level `outer`.
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

    /// Appends the items of a list at the definition level `outer`. The first item has the repetition level
    /// `first_repetition`, the others have `next_repetition`.
    fn items(
        &mut self,
        outer: i16,
        first_repetition: i16,
        next_repetition: i16,
        items: impl Iterator<Item = Option<T::T>>,
    ) {
        // In the schema, the items of lists of floats are optional, and the items of lists of texts required.
        let is_optional = T::get_physical_type() == Type::FLOAT;
        let mut repetition = first_repetition;
        for item in items {
            let definition = outer + 1 + i16::from(is_optional && item.is_some());
            self.push(repetition, definition, item);
            repetition = next_repetition;
        }
        if repetition == first_repetition {
            self.push(first_repetition, outer, None);
        }
    }

    fn write(
        self,
        group: &mut SerializedRowGroupWriter<'_, AtomicFile>,
    ) -> parquet::errors::Result<()> {
        let Some(mut column) = group.next_column()? else {
            return Err(parquet::errors::ParquetError::General(
                "the Parquet schema has fewer columns than the writer".into(),
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
