//! Rows into examples, on all cores, a few at a time.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Error, Result, bail};

use super::rows::{Row, Skipped};
use super::source::{Portion, Reader, Source};
use crate::config::{self, Thinking};
use crate::data::align::Mapper;
use crate::data::align::aligned::Aligned;
use crate::data::dataset::source::{OnProgress, prompt_hash};
use crate::data::groups::Selection;
use crate::data::prepared::columns::Example;
use crate::data::prepared::writer::{Entry, Part, Sink, Writer};
use crate::data::report;
use crate::data::report::Report;
use crate::data::sample_trie::Samples;
use crate::data::sampling::Sampling;
use crate::exit::Exit;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::answer_tokens::{AnswerTokens, Difference, ThinkingChange};
use crate::tokenizer::chat_template::answer_start;
use crate::tokenizer::chat_template::meter::NEEDS_DATE;

/// Prepares `source` into `sink`, whose index tells `hash`. Returns the files where the sink is
/// memory.
///
/// # Errors
/// If the source cannot be read, a row of a file is none, the sink cannot be written, or no example
/// is left ([`Exit::Usage`], with the reasons).
pub(crate) fn run(
    source: &Source,
    (settings, selection): (&config::DataConfig, &Selection),
    tokenizer: &Tokenizer,
    sink: Sink,
    hash: &str,
    on_progress: OnProgress<'_>,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let teacher = settings.teacher_tokenizer.as_deref();
    let teacher = teacher.map(Tokenizer::load).transpose()?;
    let mut work = Work {
        source,
        settings,
        selection,
        tokenizer,
        teacher: teacher.as_ref(),
        samples: Samples::default(),
        reading: Mutex::new(Reading {
            reader: source.open()?,
            total: source.bytes(),
            on_progress,
        }),
        failed: AtomicBool::new(false),
    };
    if settings.sample_trie {
        let mut samples = Samples::default();
        for part in all(rayon::broadcast(|_| work.collect()))? {
            samples.merge(part);
        }
        work.samples = samples;
        let mut reading = work.reading.lock().unwrap_or_else(|e| e.into_inner());
        reading.reader = source.open()?;
    }
    let writer = Writer::new(sink, tokenizer.vocab_size());
    let mut report = Report::default();
    let mut entries: Vec<Entry> = Vec::new();
    for done in all(rayon::broadcast(|_| work.run(writer.part())))? {
        report.add(done.report);
        entries.extend(done.entries);
    }
    if let Some(reason) = report.dropped.keys().find(|it| it.contains(NEEDS_DATE)) {
        bail!(Exit::Usage(reason.clone()));
    }
    if entries.is_empty() {
        let mut reasons: Vec<String> = report.groups.lines();
        reasons.extend((!report.dropped.is_empty()).then(|| report::by_reason(&report.dropped)));
        if reasons.is_empty() {
            reasons.push("it is empty".into());
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

/// What the threads made, or the first error by the number of its line: portions are handed out in order
/// and finished.
fn all<T>(parts: Vec<Result<T, Failure>>) -> Result<Vec<T>> {
    let mut made = Vec::with_capacity(parts.len());
    let mut first: Option<Failure> = None;
    for part in parts {
        match part {
            Ok(part) => made.push(part),
            Err(failure) if first.as_ref().is_none_or(|first| failure.0 < first.0) => {
                first = Some(failure);
            }
            Err(_) => {}
        }
    }
    match first {
        Some((_, error)) => Err(error),
        None => Ok(made),
    }
}

/// An error with the number of its line.
type Failure = (u64, Error);

/// What all threads share.
struct Work<'a> {
    source: &'a Source,
    settings: &'a config::DataConfig,
    selection: &'a Selection,
    tokenizer: &'a Tokenizer,
    /// `data.teacher_tokenizer`.
    teacher: Option<&'a Tokenizer>,
    /// Empty where they are not asked for.
    samples: Samples,
    reading: Mutex<Reading<'a>>,
    /// One has an error: the others need not go on.
    failed: AtomicBool,
}

struct Reading<'a> {
    reader: Reader,
    total: u64,
    on_progress: OnProgress<'a>,
}

/// What one thread has done.
struct Done {
    entries: Vec<Entry>,
    report: Report,
}

impl Work<'_> {
    /// What each thread does.
    fn run(&self, mut part: Part) -> Result<Done, Failure> {
        let mut preparing = self.preparing();
        self.each_row(|number, row| {
            preparing.report.records += 1;
            for row in preparing.add(number, row, &mut part)? {
                let kept = preparing.report.kept;
                preparing.add(number, Ok(row), &mut part)?;
                preparing.report.split += preparing.report.kept - kept;
            }
            Ok(())
        })?;
        let entries = part.finish().map_err(|error| (u64::MAX, error))?;
        Ok(Done {
            entries,
            report: preparing.report,
        })
    }

    /// What each thread does before, where answers to the same prompt are merged.
    fn collect(&self) -> Result<Samples, Failure> {
        let mut preparing = self.preparing();
        let mut samples = Samples::default();
        self.each_row(|_, row| {
            // A row that is left out is counted when it is prepared.
            preparing.collect(row, &mut samples);
            Ok(())
        })?;
        Ok(samples)
    }

    fn preparing(&self) -> Preparing<'_> {
        let tokenizers = (self.tokenizer, self.teacher);
        Preparing::new(self.source, self.settings, tokenizers, &self.samples)
    }

    /// Calls `work` with the rows that are handed to this thread, until there are none, or any thread
    /// has an error.
    fn each_row(
        &self,
        mut work: impl FnMut(u64, Result<Row, Box<Skipped>>) -> Result<()>,
    ) -> Result<(), Failure> {
        let mut portion = Portion::default();
        let mut through = || {
            while !self.failed.load(Ordering::Relaxed) && self.next(&mut portion)? {
                let selected = (self.settings, self.selection);
                portion.rows(self.source, selected, &mut work)?;
            }
            Ok(())
        };
        let done = through();
        if done.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        done
    }

    fn next(&self, portion: &mut Portion) -> Result<bool, Failure> {
        let mut reading = self.reading.lock().unwrap_or_else(|e| e.into_inner());
        let Reading {
            reader,
            total,
            on_progress,
        } = &mut *reading;
        let mut read = || -> Result<bool> {
            let is_more = reader.next(portion)?;
            on_progress(reader.bytes(), *total)?;
            Ok(is_more)
        };
        read().map_err(|error| (reader.number(), error))
    }
}

/// What one thread needs, and its counts.
pub(super) struct Preparing<'a> {
    tokenizer: &'a Tokenizer,
    samples: &'a Samples,
    mapper: Mapper<'a>,
    settings: &'a config::DataConfig,
    in_file: bool,
    report: Report,
}

/// Key in [`Report::thinking`].
const SEPARATE_REASONING: &str =
    "without the reasoning that the endpoint returned in a field of its own";

/// A row as an example.
pub(super) struct Ready {
    pub(super) input_ids: Vec<u32>,
    pub(super) labels: Vec<Range<usize>>,
    /// The soft labels of the answer whose first token is `answer`.
    pub(super) soft: Aligned,
    pub(super) answer: usize,
    /// Why it has no soft labels.
    pub(super) ce_only: Option<String>,
    /// Number of supervised answers, and of those without an end-of-turn token.
    answers: u64,
    without_end: u64,
    /// For each supervised answer whose thinking the template does not print.
    thinking: Vec<ThinkingChange>,
    pub(super) difference: Option<Difference>,
    /// Indices of answers that need separate examples: their prefix here differs from the generation prompt.
    pub(super) separate: Vec<usize>,
}

impl<'a> Preparing<'a> {
    /// With the tokenizers of the student and of `data.teacher_tokenizer`.
    pub(super) fn new(
        source: &Source,
        settings: &'a config::DataConfig,
        (tokenizer, teacher): (&'a Tokenizer, Option<&'a Tokenizer>),
        samples: &'a Samples,
    ) -> Self {
        Preparing {
            tokenizer,
            samples,
            mapper: Mapper::new(tokenizer, settings.top_logprobs).with_teacher(teacher),
            settings,
            in_file: matches!(source, Source::File(_)),
            report: Report::default(),
        }
    }

    /// Adds the answer of the row to those of its prompt.
    pub(super) fn collect(&mut self, row: Result<Row, Box<Skipped>>, samples: &mut Samples) {
        if let Ok((_, ready)) = row.and_then(|row| self.ready(row)) {
            let (prompt, answer) = ready.input_ids.split_at(ready.answer);
            samples.add(prompt, answer);
        }
    }

    /// Adds the row. Returns rows for those of its answers that need separate examples.
    fn add<'r>(
        &mut self,
        number: u64,
        row: Result<Row<'r>, Box<Skipped>>,
        part: &mut Part,
    ) -> Result<Vec<Row<'r>>> {
        let ready = row.and_then(|row| self.ready(row));
        let report = &mut self.report;
        let (row, ready) = match ready {
            Ok(ready) => ready,
            Err(skipped) => {
                match (&skipped.group, skipped.difference) {
                    (Some(group), Some(difference)) => report.groups.left_out(group, difference),
                    _ => increment(&mut report.dropped, skipped.reason),
                }
                return Ok(Vec::new());
            }
        };
        row.group.iter().for_each(|group| report.groups.used(group));
        report.kept += 1;
        report.tokens += ready.input_ids.len() as u64;
        report.positions += ready.labels.iter().map(|l| l.len() as u64).sum::<u64>();
        if let Some(reason) = ready.ce_only {
            increment(&mut report.ce_only, reason);
        }
        report.answers += ready.answers;
        report.without_end += ready.without_end;
        if row.has_reasoning && self.settings.thinking != Thinking::Drop {
            increment(&mut report.thinking, SEPARATE_REASONING.into());
        }
        for change in ready.thinking {
            increment(&mut report.thinking, change.to_string());
        }
        if let Some(difference) = ready.difference {
            let shown = format!(
                "{:?} for generation, {:?} in a conversation",
                difference.generation, difference.conversation
            );
            report.count_difference(shown, 1);
        }
        report.positions_over_one += ready.soft.positions_over_one;
        report.gate.count(row.sampling, ready.soft.agreement);
        report.gate.count_top_k(row.sampling, ready.soft.in_top_k);
        report.classes.add(ready.soft.classes);
        let soft = (0..ready.soft.len()).filter(|&at| ready.soft.is_soft(at));
        let soft_positions = soft.count() as u64;
        report.soft_positions += soft_positions;
        let exact = row.sampling == Sampling::Exact;
        report.with_soft_labels += u64::from(soft_positions > 0);
        report.exact += u64::from(soft_positions > 0 && exact);
        report.ends += u64::from(ready.soft.lists_end.is_some());
        report.ends_listed += u64::from(ready.soft.lists_end == Some(true));
        let example = Example {
            key: &row.key,
            input_ids: &ready.input_ids,
            labels: &ready.labels,
            soft: &ready.soft,
            answer: ready.answer,
            exact,
        };
        // Rows of a file are ordered by line and message, records of a cache by key.
        let order = if self.in_file { "" } else { &*row.key };
        let message = row.message.unwrap_or(0).min(u16::MAX.into()) as u64;
        part.push(
            (order, (number << 16) + message),
            prompt_hash(&row.prompt_id),
            ready.soft.mapped_mass,
            &example,
        )?;
        let others = ready.separate.into_iter();
        Ok(others.map(|message| row.up_to(message)).collect())
    }

    /// A row with its example.
    ///
    /// # Errors
    /// If it makes none.
    pub(super) fn ready<'r>(&mut self, row: Row<'r>) -> Result<(Row<'r>, Ready), Box<Skipped>> {
        match self.prepare(&row) {
            Ok(ready) => Ok((row, ready)),
            Err(reason) => Err(Box::new(Skipped {
                key: row.key,
                prompt_id: row.prompt_id,
                group: row.group,
                difference: None,
                reason,
            })),
        }
    }

    /// A row as an example, or the reason to leave it out.
    fn prepare(&mut self, row: &Row) -> Result<Ready, String> {
        let conversation =
            self.tokenizer
                .conversation_at(&row.messages, row.every_answer, row.date);
        let conversation = conversation.map_err(|e| format!("{e:#}"))?;
        let mut input_ids = conversation.ids;
        let Some((last, earlier)) = conversation.answers.split_last() else {
            return Err("no answer".into());
        };
        let mut labels = Vec::new();
        let from = |answer: &AnswerTokens| match self.settings.thinking {
            Thinking::Context => answer.after_thinking,
            Thinking::Supervise | Thinking::Drop => answer.supervised.start,
        };
        let mut separate = Vec::new();
        // A token at the very start is predicted by nothing.
        let mut supervise = |range: Range<usize>| labels.push(range.start.max(1)..range.end);
        if row.every_answer {
            for answer in earlier {
                if answer.follows_generation_prompt {
                    supervise(from(answer)..answer.supervised.end);
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
        supervise(from(last)..end);
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
        let answer = from(last);
        let mut kept = last.text.clone();
        if self.settings.thinking != Thinking::Supervise {
            // Without its thinking, an answer may be empty.
            let start = answer_start(content);
            if content[start..].trim().is_empty() {
                return Err(EMPTY.into());
            }
            kept.start = kept.start.max(start);
        }
        // After a prompt that closes its thinking, an answer of thinking alone is empty.
        if content[kept.clone()].trim().is_empty() {
            return Err(EMPTY.into());
        }
        // The token that ends the answer is the teacher's choice, too; what the template writes behind it is not.
        let of_teacher = end.min(last.tokens.end + 1);
        let aligned = match &row.logprobs {
            None => Err(report::NO_LOGPROBS.into()),
            Some(logprobs) => self
                .mapper
                .align(
                    logprobs,
                    content.as_bytes(),
                    kept,
                    &input_ids[answer..of_teacher],
                    row.asked,
                )
                .map_err(|mismatch| mismatch.to_string()),
        };
        // Nothing is learnt from what follows the last answer.
        input_ids.truncate(end);
        let (soft, ce_only) = match aligned {
            Ok(aligned) => {
                let has_soft = (0..aligned.len()).any(|at| aligned.is_soft(at));
                let has_none = !has_soft && aligned.chunks().is_empty();
                (aligned, has_none.then(|| "no usable logprobs".to_owned()))
            }
            Err(reason) => {
                let (prompt, said) = input_ids.split_at(answer);
                match self.samples.soft_labels(prompt, said) {
                    Some(mut shares) => {
                        // They tell of ends as of any token.
                        shares.lists_end = Some(true);
                        (shares, None)
                    }
                    None => (Aligned::default(), Some(reason)),
                }
            }
        };
        Ok(Ready {
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
