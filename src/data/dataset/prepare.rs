//! Prepares the examples of a source on all cores.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

use super::example_builder::ExampleBuilder;
use super::rows::{SkippedRow, TrainingRow};
use super::source::{DataSource, LineChunk, OnProgress, SourceError, SourceReader};
use crate::config;
use crate::data::groups::Selection;
use crate::data::prepared::writer::{ExampleEntry, OutputSink, PreparedWriter, ShardWriter};
use crate::data::report;
use crate::data::report::DataReport;
use crate::data::sample_trie::SampleTrie;
use crate::exit::Exit;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat_template::meter::NEEDS_DATE;

/// Writes the examples of `source` to `sink`, with `hash` in its index. Returns the files by name if the sink is in
/// memory, else nothing.
///
/// # Errors
/// If the source cannot be read, a row of a file is invalid, the sink cannot be written, or no row makes an example
/// ([`Exit::Usage`], with the reasons).
pub(crate) fn run(
    source: &DataSource,
    (settings, selection): (&config::DataConfig, &Selection),
    tokenizer: &Tokenizer,
    sink: OutputSink,
    hash: &str,
    on_progress: OnProgress<'_>,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let teacher = settings.teacher_tokenizer.as_deref();
    let teacher = teacher.map(Tokenizer::load).transpose()?;
    let mut job = PrepareJob {
        source,
        settings,
        selection,
        tokenizer,
        teacher: teacher.as_ref(),
        samples: SampleTrie::default(),
        reader: Mutex::new(SharedReader {
            reader: source.open()?,
            total_bytes: source.bytes(),
            on_progress,
        }),
        has_failed: AtomicBool::new(false),
    };
    if settings.sample_trie {
        let mut samples = SampleTrie::default();
        for thread_samples in join_threads(rayon::broadcast(|_| job.collect_samples()))? {
            samples.merge(thread_samples);
        }
        job.samples = samples;
        let mut shared = job.reader.lock().unwrap_or_else(|e| e.into_inner());
        shared.reader = source.open()?;
    }
    let writer = PreparedWriter::new(sink, tokenizer.vocab_size());
    let mut report = DataReport::default();
    let mut entries: Vec<ExampleEntry> = Vec::new();
    for result in join_threads(rayon::broadcast(|_| {
        job.write_examples(writer.shard_writer())
    }))? {
        report.add(result.report);
        entries.extend(result.entries);
    }
    if let Some(reason) = report
        .dropped
        .keys()
        .find(|reason| reason.contains(NEEDS_DATE))
    {
        bail!(Exit::Usage(reason.clone()));
    }
    if entries.is_empty() {
        let mut reasons: Vec<String> = report.groups.lines();
        reasons.extend((!report.dropped.is_empty()).then(|| report::by_reason(&report.dropped)));
        if reasons.is_empty() {
            reasons.push("the source is empty".into());
        }
        if let Some(advice) = report.groups.advice() {
            reasons.push(if settings.cache.is_some() {
                format!("`data.cache` is the cache of another run: {advice}")
            } else if report.groups.has_only_mocks() {
                format!("run `distill harvest` with a real endpoint, or {advice}")
            } else {
                format!("run `distill harvest`, or {advice}")
            });
        }
        bail!(Exit::Usage(format!(
            "no example can be made of the {} records in {}: {}",
            report.records,
            source.path().display(),
            reasons.join("\n")
        )));
    }
    writer.finish(entries, hash, report)
}

/// Returns the results of all threads, or the error with the smallest line number. It is the first error of the
/// source, because threads take chunks in the order of the source and process them to the end.
fn join_threads<T>(thread_results: Vec<Result<T, SourceError>>) -> Result<Vec<T>> {
    let mut results = Vec::with_capacity(thread_results.len());
    let mut first_error: Option<SourceError> = None;
    for result in thread_results {
        match result {
            Ok(result) => results.push(result),
            Err(error)
                if first_error
                    .as_ref()
                    .is_none_or(|first| error.line < first.line) =>
            {
                first_error = Some(error);
            }
            Err(_) => {}
        }
    }
    match first_error {
        Some(first) => Err(first.error),
        None => Ok(results),
    }
}

/// Inputs and shared state of all threads.
struct PrepareJob<'a> {
    source: &'a DataSource,
    settings: &'a config::DataConfig,
    selection: &'a Selection,
    tokenizer: &'a Tokenizer,
    /// `data.teacher_tokenizer`.
    teacher: Option<&'a Tokenizer>,
    /// Answers of the source by prompt, for soft labels; empty unless `data.sample_trie` is set.
    samples: SampleTrie,
    reader: Mutex<SharedReader<'a>>,
    /// Set after an error in any thread. The other threads finish their chunk and stop.
    has_failed: AtomicBool,
}

/// Reader of the source, and the progress of reading.
struct SharedReader<'a> {
    reader: SourceReader,
    /// Size of the source in bytes.
    total_bytes: u64,
    on_progress: OnProgress<'a>,
}

/// Result of one thread.
struct ThreadResult {
    entries: Vec<ExampleEntry>,
    report: DataReport,
}

impl PrepareJob<'_> {
    /// Converts rows to examples on one thread until no rows are left.
    fn write_examples(&self, mut writer: ShardWriter) -> Result<ThreadResult, SourceError> {
        let mut builder = self.builder();
        self.each_row(|number, row| {
            builder.report.records += 1;
            for separate_row in builder.add(number, row, &mut writer)? {
                let kept_before = builder.report.kept;
                builder.add(number, Ok(separate_row), &mut writer)?;
                builder.report.split += builder.report.kept - kept_before;
            }
            Ok(())
        })?;
        let entries = writer.finish().map_err(|error| SourceError {
            line: u64::MAX,
            error,
        })?;
        Ok(ThreadResult {
            entries,
            report: builder.report,
        })
    }

    /// Collects the answers by prompt on one thread. Runs before [`Self::write_examples`].
    fn collect_samples(&self) -> Result<SampleTrie, SourceError> {
        let mut builder = self.builder();
        let mut samples = SampleTrie::default();
        self.each_row(|_, row| {
            // `write_examples` counts the rows that are left out.
            builder.collect_sample(row, &mut samples);
            Ok(())
        })?;
        Ok(samples)
    }

    fn builder(&self) -> ExampleBuilder<'_> {
        let tokenizers = (self.tokenizer, self.teacher);
        ExampleBuilder::new(self.source, self.settings, tokenizers, &self.samples)
    }

    /// Calls `each` with the line number and the row, until no rows are left or a thread has an error.
    fn each_row(
        &self,
        mut each: impl FnMut(u64, Result<TrainingRow, Box<SkippedRow>>) -> Result<()>,
    ) -> Result<(), SourceError> {
        let mut chunk = LineChunk::default();
        let mut read_all = || {
            while !self.has_failed.load(Ordering::Relaxed) && self.read_chunk(&mut chunk)? {
                let selected = (self.settings, self.selection);
                chunk.rows(self.source, selected, &mut each)?;
            }
            Ok(())
        };
        let result = read_all();
        if result.is_err() {
            self.has_failed.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Reads the next lines of the source into `chunk`. Returns false at the end.
    fn read_chunk(&self, chunk: &mut LineChunk) -> Result<bool, SourceError> {
        let mut shared = self.reader.lock().unwrap_or_else(|e| e.into_inner());
        let SharedReader {
            reader,
            total_bytes,
            on_progress,
        } = &mut *shared;
        let mut read = || -> Result<bool> {
            let has_lines = reader.next(chunk)?;
            on_progress(reader.bytes(), *total_bytes)?;
            Ok(has_lines)
        };
        read().map_err(|error| SourceError {
            line: reader.number(),
            error,
        })
    }
}
