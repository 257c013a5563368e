//! Examples from the teacher's answers in a cache, or from a file of conversations.
//!
//! | file | content |
//! |---|---|
//! | `source` | reads the lines of a cache or a file |
//! | `rows` | parses a line as a conversation that ends in an answer, or returns the reason to leave it out |
//! | `example_builder` | tokenises a row, and aligns its soft labels |
//! | `prepare` | converts all rows to examples, on all cores |
//! | `show` | returns examples token by token, for `distill data show` |
//!
//! Invariants:
//! - The examples depend only on the inputs of their hash, never on timing or the number of threads.
//! - All answers to a prompt are on the same side of the split into training and validation; a hash of the prompt id
//!   decides which.

pub(crate) mod example_builder;
pub(crate) mod prepare;
pub(crate) mod rows;
pub(crate) mod show;
pub(crate) mod source;

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::groups::Selection;
use super::prepared::index::VERSION;
use super::prepared::{self, Prepared};
use crate::config::{self, Groups};
use crate::data::prepared::shard::ExampleView;
use crate::data::prepared::writer::OutputSink;
use crate::data::report::DataReport;
use crate::exit::Exit;
use crate::fs;
use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;
pub use show::{ShownExample, ShownToken, show, text_of};
use source::{DataSource, OnProgress};

/// Examples of a run, split by prompt into training and validation.
#[derive(Debug)]
pub struct Dataset {
    prepared: Prepared,
    train: Vec<usize>,
    validation: Vec<usize>,
    fingerprint: String,
    pub report: DataReport,
    /// True if this call prepared the examples, false if an earlier run did.
    pub is_new: bool,
}

/// Subset of the examples of a data set.
#[derive(Debug, Clone, Copy)]
pub struct Examples<'a> {
    prepared: &'a Prepared,
    indices: &'a [usize],
}

impl<'a> Examples<'a> {
    pub fn len(self) -> usize {
        self.indices.len()
    }

    pub fn is_empty(self) -> bool {
        self.indices.is_empty()
    }

    /// Returns example `index`, which must be less than [`Self::len`].
    pub fn get(self, index: usize) -> ExampleView<'a> {
        self.prepared.example(self.indices[index])
    }

    pub fn iter(self) -> impl ExactSizeIterator<Item = ExampleView<'a>> {
        self.indices
            .iter()
            .map(|&index| self.prepared.example(index))
    }
}

impl Dataset {
    /// Splits the examples: about `validation_share` of the prompts are for validation.
    fn new(prepared: Prepared, validation_share: f64, is_new: bool) -> Self {
        let (validation, train): (Vec<_>, Vec<_>) = (0..prepared.len())
            .partition(|&index| is_validation(prepared.prompt_hash(index), validation_share));
        let report = DataReport {
            train: train.len() as u64,
            validation: validation.len() as u64,
            ..prepared.report().clone()
        };
        Self {
            fingerprint: format!("{} {validation_share}", prepared.content()),
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

    fn examples<'a>(&'a self, indices: &'a [usize]) -> Examples<'a> {
        Examples {
            prepared: &self.prepared,
            indices,
        }
    }

    /// Identifies the examples, their order and their split.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// Loads the examples of `data.source`, else of `data.cache`, else of the run's own cache. Memory-maps the examples
/// that an earlier run prepared from the same data and settings; if there are none, prepares them first.
///
/// Examples have soft labels wherever the logprobs allow it; the loss decides whether to use them.
///
/// # Errors
/// If the source cannot be read, a row of a file of conversations is invalid, the prepared examples cannot be
/// written, or no training example is left ([`Exit::Usage`], with the reasons).
pub fn load(
    settings: &config::DataConfig,
    run_dir: &Path,
    selection: &Selection,
    tokenizer: &Tokenizer,
    on_progress: OnProgress<'_>,
) -> Result<Dataset> {
    let source = DataSource::new(settings, run_dir);
    let settings_and_selection = (settings, selection);
    let hash = hash(&source, settings_and_selection, tokenizer)?;
    let root = run_dir.join("prepared");
    let dir = root.join(&hash);
    let existing = Prepared::open(&dir).unwrap_or_else(|error| {
        tracing::warn!(
            "preparing the examples again, because those in {} cannot be used: {error:#}",
            dir.display()
        );
        None
    });
    let is_new = existing.is_none();
    let prepared = match existing {
        Some(prepared) => prepared,
        None => {
            fs::write_dir_with(&dir, |folder| {
                let sink = OutputSink::Folder(folder.to_owned());
                prepare::run(
                    &source,
                    settings_and_selection,
                    tokenizer,
                    sink,
                    &hash,
                    on_progress,
                )
            })?;
            prepared::remove_older(&root, &dir)?;
            Prepared::open_new(&dir).with_context(|| format!("could not read {}", dir.display()))?
        }
    };
    let share = settings.validation_share;
    let dataset = Dataset::new(prepared, share, is_new);
    if dataset.train().is_empty() {
        bail!(Exit::Usage(format!(
            "all {} examples are held out for validation; set `data.validation_share` below {share}",
            dataset.validation.len()
        )));
    }
    Ok(dataset)
}

/// Returns the messages before the last answer of each row, by the key of the example. In a file of conversations,
/// every earlier answer has an entry too, because it may become a separate example.
///
/// # Errors
/// If the source cannot be read, or a row of a file of conversations is invalid.
pub fn prompts(
    settings: &config::DataConfig,
    run_dir: &Path,
    selection: &Selection,
) -> Result<HashMap<String, Vec<Message>>> {
    let source = DataSource::new(settings, run_dir);
    let mut prompts = HashMap::new();
    source.for_each_row((settings, selection), |row| {
        let Ok(mut row) = row else {
            return true;
        };
        let answer = row.messages.iter().rposition(|m| m.role == "assistant");
        row.messages.truncate(answer.unwrap_or_default());
        if row.every_answer {
            for (index, message) in row.messages.iter().enumerate() {
                if message.role == "assistant" {
                    prompts.insert(row.key_of(index), row.messages[..index].to_vec());
                }
            }
        }
        prompts.insert(row.key, row.messages);
        true
    })?;
    Ok(prompts)
}

/// Prepares the teacher's answers in the cache folder `dir` in memory, all of them for validation.
///
/// # Errors
/// If the cache is damaged, or no example is left ([`Exit::Usage`], with the reasons).
pub fn held_out(
    dir: &Path,
    settings: &config::DataConfig,
    tokenizer: &Tokenizer,
) -> Result<Dataset> {
    let source = DataSource::Cache(dir.to_owned());
    let no_progress = &mut |_, _| Ok(());
    let selection = match &settings.groups {
        Groups::Named(names) => Selection::Named(names.clone()),
        Groups::Asked | Groups::All => Selection::All,
    };
    let settings_and_selection = (settings, &selection);
    let files = prepare::run(
        &source,
        settings_and_selection,
        tokenizer,
        OutputSink::Memory,
        "",
        no_progress,
    )?;
    Ok(Dataset::new(Prepared::in_memory(files)?, 1.0, true))
}

/// Hash of everything that the prepared examples depend on.
fn hash(
    source: &DataSource,
    (settings, selection): (&config::DataConfig, &Selection),
    tokenizer: &Tokenizer,
) -> Result<String> {
    let config::DataConfig {
        // The source is hashed by its content, the groups as `selection`; the split is made later.
        source: _,
        cache: _,
        groups: _,
        validation_share: _,
        max_length,
        max_source_length,
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
        max_source_length,
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
    // 128 bits make collisions practically impossible and keep the folder name short.
    Ok(hash[..32].to_owned())
}

/// Returns true if the answers to the prompt are held out for validation. The decision does not depend on other
/// prompts.
fn is_validation(prompt_hash: u32, validation_share: f64) -> bool {
    f64::from(prompt_hash) < validation_share * 2f64.powi(32)
}
