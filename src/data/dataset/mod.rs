//! From the teacher's answers, or a file of conversations, to examples.

pub(crate) mod prepare;
pub(crate) mod rows;
pub(crate) mod show;
pub(crate) mod source;

use crate::data::dataset::source::OnProgress;
use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::groups::Selection;
use super::prepared::{self, Prepared, VERSION};
use crate::config::{self, Config, Groups};
use crate::data::prepared::shard::ExampleView;
use crate::data::prepared::writer::Sink;
pub use crate::data::report::{NO_LOGPROBS, Report, by_reason};
use crate::exit::Exit;
use crate::fs;
use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;
pub use rows::prompt_of;
pub use show::{Shown, Token, show, text_of};
use source::Source;

/// The examples of a run, split by prompt.
#[derive(Debug)]
pub struct Dataset {
    prepared: Prepared,
    train: Vec<usize>,
    validation: Vec<usize>,
    fingerprint: String,
    pub report: Report,
    /// Were they prepared now? Otherwise they had been before.
    pub is_new: bool,
}

/// Some of the examples of a data set.
#[derive(Debug, Clone, Copy)]
pub struct Examples<'a> {
    prepared: &'a Prepared,
    chosen: &'a [usize],
}

impl<'a> Examples<'a> {
    pub fn len(self) -> usize {
        self.chosen.len()
    }

    pub fn is_empty(self) -> bool {
        self.chosen.is_empty()
    }

    /// Number `at` of them, which is less than their number.
    pub fn get(self, at: usize) -> ExampleView<'a> {
        self.prepared.example(self.chosen[at])
    }

    pub fn iter(self) -> impl ExactSizeIterator<Item = ExampleView<'a>> {
        self.chosen.iter().map(|&at| self.prepared.example(at))
    }
}

impl Dataset {
    fn new(prepared: Prepared, share: f64, is_new: bool) -> Self {
        let (validation, train): (Vec<_>, Vec<_>) =
            (0..prepared.len()).partition(|&at| is_validation(prepared.prompt_hash(at), share));
        let report = Report {
            train: train.len() as u64,
            validation: validation.len() as u64,
            ..prepared.report().clone()
        };
        Self {
            fingerprint: format!("{} {share}", prepared.content()),
            prepared,
            train,
            validation,
            report,
            is_new,
        }
    }

    pub fn train(&self) -> Examples<'_> {
        self.examples(&self.train)
    }

    pub fn validation(&self) -> Examples<'_> {
        self.examples(&self.validation)
    }

    fn examples<'a>(&'a self, chosen: &'a [usize]) -> Examples<'a> {
        Examples {
            prepared: &self.prepared,
            chosen,
        }
    }

    /// Differs where the examples, their order or their split do.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// The examples of `data.source`, or of the cache of this run where that is not set: mapped from
/// the run folder where they were prepared before, else prepared now.
///
/// Soft labels are attached wherever the logprobs allow it; the loss decides whether to use them.
///
/// # Errors
/// If the source cannot be read, a row of a file of conversations is none, the prepared examples
/// cannot be written, or no example is left ([`Exit::Usage`], with the reasons).
pub fn load(
    config: &Config,
    selection: &Selection,
    tokenizer: &Tokenizer,
    on_progress: OnProgress<'_>,
) -> Result<Dataset> {
    let source = Source::of(config);
    let selected = (&config.data, selection);
    let hash = hash(&source, selected, tokenizer)?;
    let root = config.run_dir.join("prepared");
    let dir = root.join(&hash);
    let found = Prepared::open(&dir).unwrap_or_else(|error| {
        tracing::warn!(
            "the prepared examples in {} cannot be used, and are prepared again: {error:#}",
            dir.display()
        );
        None
    });
    let is_new = found.is_none();
    let prepared = match found {
        Some(prepared) => prepared,
        None => {
            fs::write_dir_with(&dir, |folder| {
                let sink = Sink::Folder(folder.to_owned());
                prepare::run(&source, selected, tokenizer, sink, &hash, on_progress)
            })?;
            prepared::remove_older(&root, &dir)?;
            Prepared::open_new(&dir).with_context(|| format!("could not read {}", dir.display()))?
        }
    };
    let share = config.data.validation_share;
    let dataset = Dataset::new(prepared, share, is_new);
    if dataset.train().is_empty() {
        bail!(Exit::Usage(format!(
            "all {} examples are held out for validation; set `data.validation_share` below {share}",
            dataset.validation.len()
        )));
    }
    Ok(dataset)
}

/// Prompt of each example by its key: the messages before the answer. Includes the answers inside
/// conversations, which may be separate examples.
///
/// # Errors
/// If the source cannot be read, or a row of a file of conversations is none.
pub fn prompts(config: &Config, selection: &Selection) -> Result<HashMap<String, Vec<Message>>> {
    let source = Source::of(config);
    let mut prompts = HashMap::new();
    source.for_each_row((&config.data, selection), |row| {
        let Ok(mut row) = row else {
            return true;
        };
        let answer = row.messages.iter().rposition(|m| m.role == "assistant");
        row.messages.truncate(answer.unwrap_or_default());
        if row.every_answer {
            for (at, message) in row.messages.iter().enumerate() {
                if message.role == "assistant" {
                    prompts.insert(row.key_of(at), row.messages[..at].to_vec());
                }
            }
        }
        prompts.insert(row.key, row.messages);
        true
    })?;
    Ok(prompts)
}

/// The teacher's answers in the cache folder `dir`, all of them for validation, in memory.
///
/// # Errors
/// If the cache is damaged, or no example is left ([`Exit::Usage`], with the reasons).
pub fn held_out(
    dir: &Path,
    settings: &config::DataConfig,
    tokenizer: &Tokenizer,
) -> Result<Dataset> {
    let source = Source::Cache(dir.to_owned());
    let nothing = &mut |_, _| Ok(());
    let selection = match &settings.groups {
        Groups::Named(names) => Selection::Named(names.clone()),
        Groups::Asked | Groups::All => Selection::All,
    };
    let selected = (settings, &selection);
    let files = prepare::run(&source, selected, tokenizer, Sink::Memory, "", nothing)?;
    Ok(Dataset::new(Prepared::in_memory(files)?, 1.0, true))
}

/// A hash of all that the prepared examples depend on.
fn hash(
    source: &Source,
    (settings, selection): (&config::DataConfig, &Selection),
    tokenizer: &Tokenizer,
) -> Result<String> {
    let config::DataConfig {
        // The source counts by its content, and the split is made later.
        source: _,
        cache: _,
        groups: _,
        validation_share: _,
        max_length,
        top_logprobs,
        sample_trie,
        teacher_tokenizer,
        keep_finish_reasons,
        thinking,
    } = settings;
    let mut hash = blake3::Hasher::new();
    let tokenizer = tokenizer.fingerprint().to_hex();
    let settings = (
        VERSION,
        env!("CARGO_PKG_VERSION"),
        max_length,
        top_logprobs,
        sample_trie,
        keep_finish_reasons,
        thinking,
        tokenizer.as_str(),
    );
    hash.update(&serde_json::to_vec(&settings)?);
    if let Some(dir) = teacher_tokenizer {
        hash.update(Tokenizer::load(dir)?.fingerprint().as_bytes());
    }
    selection.update(&mut hash);
    source.hash(&mut hash)?;
    let hash = hash.finalize().to_hex();
    // Long enough for two folders never to meet, short enough to be read.
    Ok(hash[..32].to_owned())
}

/// Is this prompt held out? By a hash of its id, so that the answer does not depend on the other
/// prompts, and all answers to a prompt fall on one side.
fn is_validation(prompt_hash: u32, share: f64) -> bool {
    f64::from(prompt_hash) < share * 2f64.powi(32)
}
