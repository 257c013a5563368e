//! From the teacher's answers, or a file of conversations, to examples.

mod report;
mod rows;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use rayon::prelude::*;

use super::align::Mapper;
use super::example::{Example, SoftLabels, Target};
use super::tokenizer::{AnswerTokens, Tokenizer};
use crate::cache;
use crate::cache::record::Record;
use crate::config::{self, Config};
use crate::exit::Exit;
pub use report::Report;
use rows::Row;
pub use rows::prompt_of;

/// Records that are prepared at a time: enough for all cores, few enough to hold beside the
/// examples.
const CHUNK: usize = 1024;

/// The examples of a run, split by prompt.
#[derive(Debug)]
pub struct Dataset {
    pub train: Vec<Example>,
    pub validation: Vec<Example>,
    pub report: Report,
}

/// Prepares `data.source`, or the cache of this run where that is not set.
///
/// Soft labels are attached wherever the logprobs allow it; the loss decides whether to use them.
///
/// # Errors
/// If the source cannot be read, a row of a file of conversations is none, or no example is left
/// ([`Exit::Usage`], with the reasons).
pub fn load(config: &Config, tokenizer: &Tokenizer) -> Result<Dataset> {
    let (examples, mut report) = match &config.data.source {
        None => examples_of_cache(&config.training_cache(), &config.data, tokenizer)?,
        Some(path) => examples_of_file(path, &config.data, tokenizer)?,
    };
    let share = config.data.validation_share;
    let (validation, train): (Vec<_>, Vec<_>) = examples
        .into_iter()
        .partition(|example| is_validation(&example.prompt_id, share));
    if train.is_empty() {
        bail!(Exit::Usage(format!(
            "all {} examples are held out for validation; set `data.validation_share` below {share}",
            validation.len()
        )));
    }
    report.train = train.len() as u64;
    report.validation = validation.len() as u64;
    Ok(Dataset {
        train,
        validation,
        report,
    })
}

/// Prepares the teacher's answers in the cache folder `dir`, in the order of their keys.
///
/// # Errors
/// If the cache is damaged, or no example is left ([`Exit::Usage`], with the reasons).
pub fn examples_of_cache(
    dir: &Path,
    settings: &config::Data,
    tokenizer: &Tokenizer,
) -> Result<(Vec<Example>, Report)> {
    if !cache::exists(dir) {
        bail!(Exit::Usage(format!(
            "there is no cache in {}; run `distill harvest` first, or set `data.source`",
            dir.display()
        )));
    }
    let (mut examples, report) = examples_of_records(cache::read(dir)?, settings, tokenizer)?;
    // Answers arrive in another order each time; what is trained on must not depend on it.
    examples.sort_by(|a, b| a.key.cmp(&b.key));
    not_empty(examples, report, dir)
}

/// Prepares records, in their order.
///
/// # Errors
/// The first error among the records.
pub fn examples_of_records(
    records: impl Iterator<Item = Result<Record>>,
    settings: &config::Data,
    tokenizer: &Tokenizer,
) -> Result<(Vec<Example>, Report)> {
    let mut preparing = Preparing::new(tokenizer, settings.max_length);
    let mut records = records.peekable();
    while records.peek().is_some() {
        let chunk: Vec<Record> = records.by_ref().take(CHUNK).collect::<Result<_>>()?;
        preparing.add(chunk, |record| rows::of_record(record, settings));
    }
    Ok(preparing.finish())
}

/// Prepares a JSONL file of conversations, in its order. Every answer in it is supervised.
fn examples_of_file(
    path: &Path,
    settings: &config::Data,
    tokenizer: &Tokenizer,
) -> Result<(Vec<Example>, Report)> {
    let mut preparing = Preparing::new(tokenizer, settings.max_length);
    preparing.add(rows::of_file(path)?, Ok);
    let (examples, report) = preparing.finish();
    not_empty(examples, report, path)
}

fn not_empty(
    examples: Vec<Example>,
    report: Report,
    path: &Path,
) -> Result<(Vec<Example>, Report)> {
    if !examples.is_empty() {
        return Ok((examples, report));
    }
    let reasons = match report.dropped.is_empty() {
        true => "it is empty".into(),
        false => report::by_reason(&report.dropped),
    };
    bail!(Exit::Usage(format!(
        "no example can be made of the {} records in {}: {reasons}",
        report.records,
        path.display()
    )))
}

/// Is this prompt held out? By a hash of its id, so that the answer does not depend on the other
/// prompts, and all answers to a prompt fall on one side.
fn is_validation(prompt_id: &str, share: f64) -> bool {
    let hash = blake3::hash(prompt_id.as_bytes());
    let [a, b, c, d, ..] = *hash.as_bytes();
    f64::from(u32::from_be_bytes([a, b, c, d])) < share * 2f64.powi(32)
}

/// Examples made so far, and the counts.
struct Preparing<'a> {
    tokenizer: &'a Tokenizer,
    max_length: usize,
    examples: Vec<Example>,
    report: Report,
    mapped_mass: f64,
}

/// An example with what the report wants to know.
struct Prepared {
    example: Example,
    mapped_mass: f64,
    /// Why it has no soft labels.
    ce_only: Option<String>,
}

impl<'a> Preparing<'a> {
    fn new(tokenizer: &'a Tokenizer, max_length: usize) -> Self {
        Self {
            tokenizer,
            max_length,
            examples: Vec::new(),
            report: Report::default(),
            mapped_mass: 0.0,
        }
    }

    /// Prepares rows on all cores and keeps their order.
    fn add<T: Send>(&mut self, rows: Vec<T>, row: impl Fn(T) -> Result<Row, String> + Sync) {
        let (tokenizer, max_length) = (self.tokenizer, self.max_length);
        let prepared: Vec<Result<Prepared, String>> = rows
            .into_par_iter()
            .map_init(
                || Mapper::new(tokenizer),
                |mapper, source| prepare(row(source)?, tokenizer, mapper, max_length),
            )
            .collect();
        for prepared in prepared {
            self.count(prepared);
        }
    }

    fn count(&mut self, prepared: Result<Prepared, String>) {
        let report = &mut self.report;
        report.records += 1;
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(reason) => return increment(&mut report.dropped, reason),
        };
        let example = prepared.example;
        report.kept += 1;
        report.tokens += example.input_ids.len() as u64;
        report.positions += example.targets.len() as u64;
        let soft = example
            .targets
            .iter()
            .filter(|target| target.soft.is_some());
        report.soft_positions += soft.count() as u64;
        self.mapped_mass += prepared.mapped_mass;
        if let Some(reason) = prepared.ce_only {
            increment(&mut report.ce_only, reason);
        }
        self.examples.push(example);
    }

    fn finish(mut self) -> (Vec<Example>, Report) {
        let soft = self.report.soft_positions.max(1) as f64;
        self.report.mean_mapped_mass = self.mapped_mass / soft;
        (self.examples, self.report)
    }
}

fn increment(counts: &mut BTreeMap<String, u64>, reason: String) {
    *counts.entry(reason).or_default() += 1;
}

/// A row as an example, or the reason to leave it out.
fn prepare(
    row: Row,
    tokenizer: &Tokenizer,
    mapper: &mut Mapper,
    max_length: usize,
) -> Result<Prepared, String> {
    let conversation = tokenizer
        .conversation(&row.messages)
        .map_err(|e| format!("{e:#}"))?;
    let mut input_ids = conversation.ids;
    let Some((last, earlier)) = conversation.answers.split_last() else {
        return Err("no answer".into());
    };
    let mut targets = Vec::new();
    if row.every_answer {
        for answer in earlier {
            supervise(&mut targets, &input_ids, answer, answer.supervised.end, &[]);
        }
    }

    let content = &row.messages[last.message].content;
    let aligned = match &row.logprobs {
        None => Err("no logprobs".into()),
        Some(logprobs) => mapper
            .align(
                logprobs,
                content.as_bytes(),
                last.text.clone(),
                &input_ids[last.tokens.clone()],
            )
            .map_err(|mismatch| mismatch.to_string()),
    };
    let (soft, mapped_mass, ce_only) = match aligned {
        Ok(aligned) => (aligned.soft, aligned.mapped_mass, None),
        Err(reason) => (Vec::new(), 0.0, Some(reason)),
    };
    let end = if row.ended {
        last.supervised.end
    } else {
        last.tokens.end
    };
    supervise(&mut targets, &input_ids, last, end, &soft);
    // Nothing is learnt from what follows the last answer.
    input_ids.truncate(end);

    if targets.is_empty() {
        return Err("the answer is empty".into());
    }
    if input_ids.len() > max_length {
        return Err(format!(
            "longer than `data.max_length` ({max_length} tokens)"
        ));
    }
    Ok(Prepared {
        example: Example {
            key: row.key,
            prompt_id: row.prompt_id,
            input_ids,
            targets,
        },
        mapped_mass,
        ce_only,
    })
}

/// Adds the targets of an answer up to `end`, with the soft labels of its first tokens.
fn supervise(
    targets: &mut Vec<Target>,
    input_ids: &[u32],
    answer: &AnswerTokens,
    end: usize,
    soft: &[Option<SoftLabels>],
) {
    let start = answer.supervised.start;
    // A token at the very start is predicted by nothing.
    targets.extend((start.max(1)..end).map(|at| Target {
        position: at - 1,
        label: input_ids[at],
        soft: soft.get(at - start).cloned().flatten(),
    }));
}
