//! Converts rows to examples on all cores.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Error, Result, bail};

use super::rows::{SkippedRow, TrainingRow};
use super::source::{DataSource, LineChunk, SourceReader};
use crate::config::{self, Thinking};
use crate::data::align::Mapper;
use crate::data::align::aligned::Aligned;
use crate::data::dataset::source::{OnProgress, prompt_hash};
use crate::data::groups::Selection;
use crate::data::prepared::columns::Example;
use crate::data::prepared::writer::{ExampleEntry, OutputSink, PreparedWriter, ShardWriter};
use crate::data::report;
use crate::data::report::DataReport;
use crate::data::sample_trie::SampleTrie;
use crate::data::sampling::SamplingKind;
use crate::exit::Exit;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::answer_tokens::{AnswerTokens, PromptDifference, ThinkingChange};
use crate::tokenizer::chat_template::answer_start;
use crate::tokenizer::chat_template::meter::NEEDS_DATE;

/// Prepares `source` into `sink`, whose index will contain `hash`. Returns the files if the sink is in memory.
///
/// # Errors
/// If the source cannot be read, a row of a file is invalid, the sink cannot be written, or no example is
/// left ([`Exit::Usage`], with the reasons).
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
            total: source.bytes(),
            on_progress,
        }),
        failed: AtomicBool::new(false),
    };
    if settings.sample_trie {
        let mut samples = SampleTrie::default();
        for part in join_threads(rayon::broadcast(|_| job.collect()))? {
            samples.merge(part);
        }
        job.samples = samples;
        let mut shared = job.reader.lock().unwrap_or_else(|e| e.into_inner());
        shared.reader = source.open()?;
    }
    let writer = PreparedWriter::new(sink, tokenizer.vocab_size());
    let mut report = DataReport::default();
    let mut entries: Vec<ExampleEntry> = Vec::new();
    for result in join_threads(rayon::broadcast(|_| job.run(writer.shard_writer())))? {
        report.add(result.report);
        entries.extend(result.entries);
    }
    if let Some(reason) = report.dropped.keys().find(|it| it.contains(NEEDS_DATE)) {
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
                format!("data.cache is the cache of another run: {advice}")
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

const EMPTY: &str = "the answer is empty";

/// Returns the results of all threads, or the error with the smallest line number. That is the first error of the
/// source, because chunks are assigned in order and always completed.
fn join_threads<T>(parts: Vec<Result<T, LineError>>) -> Result<Vec<T>> {
    let mut results = Vec::with_capacity(parts.len());
    let mut first: Option<LineError> = None;
    for part in parts {
        match part {
            Ok(part) => results.push(part),
            Err(failure) if first.as_ref().is_none_or(|first| failure.0 < first.0) => {
                first = Some(failure);
            }
            Err(_) => {}
        }
    }
    match first {
        Some((_, error)) => Err(error),
        None => Ok(results),
    }
}

/// An error with the number of its line.
type LineError = (u64, Error);

/// State that all threads share.
struct PrepareJob<'a> {
    source: &'a DataSource,
    settings: &'a config::DataConfig,
    selection: &'a Selection,
    tokenizer: &'a Tokenizer,
    /// `data.teacher_tokenizer`.
    teacher: Option<&'a Tokenizer>,
    /// Answers by prompt; empty unless `data.sample_trie` is set.
    samples: SampleTrie,
    reader: Mutex<SharedReader<'a>>,
    /// Set after an error of any thread, which stops the others.
    failed: AtomicBool,
}

struct SharedReader<'a> {
    reader: SourceReader,
    total: u64,
    on_progress: OnProgress<'a>,
}

/// Result of one thread.
struct ThreadResult {
    entries: Vec<ExampleEntry>,
    report: DataReport,
}

impl PrepareJob<'_> {
    /// Prepares rows on one thread.
    fn run(&self, mut writer: ShardWriter) -> Result<ThreadResult, LineError> {
        let mut builder = self.builder();
        self.each_row(|number, row| {
            builder.report.records += 1;
            for row in builder.add(number, row, &mut writer)? {
                let kept = builder.report.kept;
                builder.add(number, Ok(row), &mut writer)?;
                builder.report.split += builder.report.kept - kept;
            }
            Ok(())
        })?;
        let entries = writer.finish().map_err(|error| (u64::MAX, error))?;
        Ok(ThreadResult {
            entries,
            report: builder.report,
        })
    }

    /// Collects the answers to the same prompts on one thread, before [`Self::run`].
    fn collect(&self) -> Result<SampleTrie, LineError> {
        let mut builder = self.builder();
        let mut samples = SampleTrie::default();
        self.each_row(|_, row| {
            // Rows that are left out are counted by `run`.
            builder.collect(row, &mut samples);
            Ok(())
        })?;
        Ok(samples)
    }

    fn builder(&self) -> ExampleBuilder<'_> {
        let tokenizers = (self.tokenizer, self.teacher);
        ExampleBuilder::new(self.source, self.settings, tokenizers, &self.samples)
    }

    /// Calls `each` with rows until none are left, or any thread has an error.
    fn each_row(
        &self,
        mut each: impl FnMut(u64, Result<TrainingRow, Box<SkippedRow>>) -> Result<()>,
    ) -> Result<(), LineError> {
        let mut chunk = LineChunk::default();
        let mut read_all = || {
            while !self.failed.load(Ordering::Relaxed) && self.next(&mut chunk)? {
                let selected = (self.settings, self.selection);
                chunk.rows(self.source, selected, &mut each)?;
            }
            Ok(())
        };
        let result = read_all();
        if result.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    fn next(&self, chunk: &mut LineChunk) -> Result<bool, LineError> {
        let mut shared = self.reader.lock().unwrap_or_else(|e| e.into_inner());
        let SharedReader {
            reader,
            total,
            on_progress,
        } = &mut *shared;
        let mut read = || -> Result<bool> {
            let is_more = reader.next(chunk)?;
            on_progress(reader.bytes(), *total)?;
            Ok(is_more)
        };
        read().map_err(|error| (reader.number(), error))
    }
}

/// Converts rows to examples on one thread, and counts them.
pub(super) struct ExampleBuilder<'a> {
    tokenizer: &'a Tokenizer,
    samples: &'a SampleTrie,
    mapper: Mapper<'a>,
    settings: &'a config::DataConfig,
    in_file: bool,
    report: DataReport,
}

/// Key in [`DataReport::thinking`].
const SEPARATE_REASONING: &str =
    "without the reasoning that the endpoint returned in a field of its own";

/// A row as token ids and labels.
pub(super) struct TokenizedRow {
    pub(super) input_ids: Vec<u32>,
    pub(super) labels: Vec<Range<usize>>,
    /// Soft labels of the answer whose first token is `answer`.
    pub(super) soft: Aligned,
    pub(super) answer: usize,
    /// Reason if there are no soft labels.
    pub(super) ce_only: Option<String>,
    /// Number of supervised answers.
    answers: u64,
    /// Number of supervised answers without an end-of-turn token.
    without_end: u64,
    /// Changes to the thinking of supervised answers that the template does not print.
    thinking: Vec<ThinkingChange>,
    pub(super) difference: Option<PromptDifference>,
    /// Indices of answers that need separate examples: their prefix here differs from the generation prompt.
    pub(super) separate: Vec<usize>,
}

impl<'a> ExampleBuilder<'a> {
    /// Creates a builder with the tokenizers of the student and of `data.teacher_tokenizer`.
    pub(super) fn new(
        source: &DataSource,
        settings: &'a config::DataConfig,
        (tokenizer, teacher): (&'a Tokenizer, Option<&'a Tokenizer>),
        samples: &'a SampleTrie,
    ) -> Self {
        ExampleBuilder {
            tokenizer,
            samples,
            mapper: Mapper::new(tokenizer, settings.top_logprobs).with_teacher(teacher),
            settings,
            in_file: matches!(source, DataSource::File(_)),
            report: DataReport::default(),
        }
    }

    /// Adds the answer of the row to `samples`.
    pub(super) fn collect(
        &mut self,
        row: Result<TrainingRow, Box<SkippedRow>>,
        samples: &mut SampleTrie,
    ) {
        if let Ok((_, tokenized)) = row.and_then(|row| self.tokenize(row)) {
            let (prompt, answer) = tokenized.input_ids.split_at(tokenized.answer);
            samples.add(prompt, answer);
        }
    }

    /// Writes the example of the row. Returns rows for its answers that need separate examples.
    fn add<'r>(
        &mut self,
        number: u64,
        row: Result<TrainingRow<'r>, Box<SkippedRow>>,
        writer: &mut ShardWriter,
    ) -> Result<Vec<TrainingRow<'r>>> {
        let tokenized = row.and_then(|row| self.tokenize(row));
        let report = &mut self.report;
        let (row, tokenized) = match tokenized {
            Ok(tokenized) => tokenized,
            Err(skipped) => {
                match (&skipped.group, skipped.exclusion) {
                    (Some(group), Some(exclusion)) => report.groups.left_out(group, exclusion),
                    _ => increment(&mut report.dropped, skipped.reason),
                }
                return Ok(Vec::new());
            }
        };
        row.group.iter().for_each(|group| report.groups.used(group));
        report.kept += 1;
        report.tokens += tokenized.input_ids.len() as u64;
        report.positions += tokenized.labels.iter().map(|l| l.len() as u64).sum::<u64>();
        if let Some(reason) = tokenized.ce_only {
            increment(&mut report.ce_only, reason);
        }
        report.answers += tokenized.answers;
        report.without_end += tokenized.without_end;
        if row.has_reasoning && self.settings.thinking != Thinking::Drop {
            increment(&mut report.thinking, SEPARATE_REASONING.into());
        }
        for change in tokenized.thinking {
            increment(&mut report.thinking, change.to_string());
        }
        if let Some(difference) = tokenized.difference {
            let shown = format!(
                "{:?} for generation, {:?} in a conversation",
                difference.generation, difference.conversation
            );
            report.count_difference(shown, 1);
        }
        report.positions_over_one += tokenized.soft.positions_over_one;
        report
            .logprob_check
            .count(row.sampling, tokenized.soft.agreement);
        report
            .logprob_check
            .count_top_k(row.sampling, tokenized.soft.in_top_k);
        let soft = (0..tokenized.soft.len()).filter(|&at| tokenized.soft.is_soft(at));
        let soft_positions = soft.count() as u64;
        report.soft_positions += soft_positions;
        let exact = row.sampling == SamplingKind::Exact;
        report.with_soft_labels += u64::from(soft_positions > 0);
        report.exact_samples += u64::from(soft_positions > 0 && exact);
        report.ends += u64::from(tokenized.soft.lists_end.is_some());
        report.ends_listed += u64::from(tokenized.soft.lists_end == Some(true));
        let example = Example {
            key: &row.key,
            input_ids_T: &tokenized.input_ids,
            labels: &tokenized.labels,
            soft: &tokenized.soft,
            answer: tokenized.answer,
            is_exact_sample: exact,
        };
        // Rows of a file are ordered by line and message, records of a cache by key.
        let order = if self.in_file { "" } else { &*row.key };
        let message = row.message.unwrap_or(0).min(u16::MAX.into()) as u64;
        writer.push(
            (order, (number << 16) + message),
            prompt_hash(&row.prompt_id),
            tokenized.soft.mapped_mass,
            &example,
        )?;
        let others = tokenized.separate.into_iter();
        Ok(others.map(|message| row.up_to(message)).collect())
    }

    /// Tokenises a row.
    ///
    /// # Errors
    /// The reason if the row makes no example.
    pub(super) fn tokenize<'r>(
        &mut self,
        row: TrainingRow<'r>,
    ) -> Result<(TrainingRow<'r>, TokenizedRow), Box<SkippedRow>> {
        match self.try_tokenize(&row) {
            Ok(tokenized) => Ok((row, tokenized)),
            Err(reason) => Err(Box::new(SkippedRow {
                key: row.key,
                prompt_id: row.prompt_id,
                group: row.group,
                exclusion: None,
                reason,
            })),
        }
    }

    /// Tokenises a row, or returns the reason to leave it out.
    fn try_tokenize(&mut self, row: &TrainingRow) -> Result<TokenizedRow, String> {
        let conversation =
            self.tokenizer
                .conversation_at(&row.messages, row.every_answer, row.date);
        let conversation = conversation.map_err(|e| format!("{e:#}"))?;
        let mut input_ids = conversation.ids;
        let Some((last, earlier)) = conversation.answers.split_last() else {
            return Err("no answer".into());
        };
        let mut labels = Vec::new();
        let supervised_from = |answer: &AnswerTokens| match self.settings.thinking {
            Thinking::Context => answer.after_thinking,
            Thinking::Supervise | Thinking::Drop => answer.supervised.start,
        };
        let mut separate = Vec::new();
        // No token predicts the first one.
        let mut supervise = |range: Range<usize>| labels.push(range.start.max(1)..range.end);
        if row.every_answer {
            for answer in earlier {
                if answer.follows_generation_prompt {
                    supervise(supervised_from(answer)..answer.supervised.end);
                } else {
                    separate.push(answer.message);
                }
            }
        }
        let end = if row.ended {
            last.supervised.end
        } else {
            last.tokens.end
        };
        supervise(supervised_from(last)..end);
        labels.retain(|range| !range.is_empty());
        if labels.is_empty() {
            return Err(EMPTY.into());
        }
        let max_length = self.settings.max_length;
        if end > max_length {
            return Err(format!(
                "longer than {max_length} tokens (data.max_length, or the context of the model)"
            ));
        }
        let answers = labels.len() as u64;
        let supervised = earlier
            .iter()
            .filter(|answer| row.every_answer && answer.follows_generation_prompt);
        let changed = supervised.clone().chain([last]);
        let thinking = changed.filter_map(|answer| answer.thinking).collect();
        let without_end = supervised
            .chain(row.ended.then_some(last))
            .filter(|answer| answer.supervised.end == answer.tokens.end)
            .count() as u64;

        let content = &row.messages[last.message].content;
        let answer = supervised_from(last);
        let mut kept = last.text.clone();
        if self.settings.thinking != Thinking::Supervise {
            // An answer may be empty without its thinking.
            let start = answer_start(content);
            if content[start..].trim().is_empty() {
                return Err(EMPTY.into());
            }
            kept.start = kept.start.max(start);
        }
        // A thinking-only answer is empty after a prompt that closes a block of thinking.
        if content[kept.clone()].trim().is_empty() {
            return Err(EMPTY.into());
        }
        // The teacher chose the token that ends the answer, but not the template text after it.
        let end_of_teacher = end.min(last.tokens.end + 1);
        let aligned = match &row.logprobs {
            None => Err(report::NO_LOGPROBS.into()),
            Some(logprobs) => self
                .mapper
                .align(
                    logprobs,
                    content.as_bytes(),
                    kept,
                    &input_ids[answer..end_of_teacher],
                    row.top_logprobs,
                )
                .map_err(|mismatch| mismatch.to_string()),
        };
        // The text after the last answer is not trained on.
        input_ids.truncate(end);
        let (soft, ce_only) = match aligned {
            Ok(aligned) => {
                let has_soft = (0..aligned.len()).any(|at| aligned.is_soft(at));
                let has_none = !has_soft && aligned.chunks().is_empty();
                (aligned, has_none.then(|| "no usable logprobs".to_owned()))
            }
            Err(reason) => {
                let (prompt, answer_ids) = input_ids.split_at(answer);
                match self.samples.soft_labels(prompt, answer_ids) {
                    Some(mut shares) => {
                        // Shares include the ends of answers, as any token.
                        shares.lists_end = Some(true);
                        (shares, None)
                    }
                    None => (Aligned::default(), Some(reason)),
                }
            }
        };
        Ok(TokenizedRow {
            input_ids,
            labels,
            soft,
            answer,
            ce_only,
            answers,
            without_end,
            thinking,
            difference: conversation.difference,
            separate,
        })
    }
}

fn increment(counts: &mut BTreeMap<String, u64>, reason: String) {
    *counts.entry(reason).or_default() += 1;
}
