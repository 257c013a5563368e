//! Journal of the parts: `batches.json` in the run folder has every part and its state, written before each step that
//! may cost money. The folder `batches/` has the rows of the parts that have not ended.
//!
//! | state at a kill | the next run |
//! |---|---|
//! | `planned` | uploads the file; a second upload costs nothing |
//! | `uploaded` | creates the batch |
//! | `creating` | searches for a batch with the nonce, and creates one if none is found |
//! | `created`, `cancelling` | waits until the batch ends and records the answers that the cache lacks |
//! | `done` | removes its files from `batches/` |

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::budget::price::TokenBound;
use crate::cache::question;
use crate::cache::writer::Cache;
use crate::client::batch_object::ENDPOINT;
use crate::exit::Exit;
use crate::plan::Plan;
use crate::plan::queue::QueuedRow;

/// Version of the file format.
const VERSION: u32 = 1;

/// Fixed texts of a request line: before its key, before its URL and before its body.
const LINE_TEXTS: [&str; 3] = [
    "{\"custom_id\":\"",
    "\",\"method\":\"POST\",\"url\":\"",
    "\",\"body\":",
];

/// Content of `batches.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct BatchJournal {
    version: u32,
    /// Parts in the order of their creation; indices never change.
    pub parts: Vec<BatchPart>,
    #[serde(skip)]
    run_dir: PathBuf,
}

/// Rows that are sent as one batch.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BatchPart {
    /// Random name of the part, also in the metadata of the batch.
    pub nonce: String,
    /// Label of its teacher.
    pub teacher: String,
    /// Identity of its endpoint, as returned by [`crate::config::teacher::identity`].
    pub endpoint: String,
    /// Number of its rows.
    pub rows: u64,
    /// Estimated number of its tokens that count against the endpoint's limit of enqueued tokens.
    pub tokens: u64,
    /// Upper bound of its cost in US dollars.
    pub reserved_usd: f64,
    /// Unix time at which the part was planned, in seconds.
    pub planned_at: i64,
    #[serde(flatten)]
    pub state: PartState,
    #[serde(skip)]
    pub progress: PartProgress,
}

/// State of a part, in the order of its steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum PartState {
    Planned,
    Uploaded {
        file: String,
    },
    /// The request to create the batch may have been sent.
    Creating {
        file: String,
    },
    Created {
        batch: String,
    },
    /// A run requests, or has requested, that the endpoint cancels the batch.
    Cancelling {
        batch: String,
    },
    /// The part has ended; `status` says how, such as `completed` or `never sent`.
    Done {
        status: String,
    },
}

/// State of a part within this run; not written to the journal.
#[derive(Debug, Default)]
pub(crate) struct PartProgress {
    /// Index of its upstream; None if its teacher is not in the config.
    pub upstream: Option<usize>,
    /// Index in the plan of each row of the part; None if the plan does not have the row.
    pub rows: Vec<Option<u32>>,
    /// Part of its reserved budget that is not settled yet, in US dollars.
    pub unsettled_usd: f64,
    /// Last status reported by the endpoint.
    pub status: String,
    /// True if the request to create the batch had no reply, so that the batch may exist.
    pub is_creation_unconfirmed: bool,
    /// Number of searches for its batch since the last request to create it.
    pub lookups: usize,
    /// Number of times that its input file was not found.
    pub input_not_found: u32,
    /// Number of times that its batch or a results file was missing or incomplete.
    pub not_found: u32,
    /// Number of failed reads of its results files.
    pub read_failures: u32,
    /// Earliest time of its next step.
    pub not_before: Option<Instant>,
}

/// Line of `<nonce>.rows.jsonl`: the data from which the answer is recorded, even if a later plan lacks the row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartRow {
    pub key: String,
    pub prompt_id: String,
    pub sample: u32,
    /// Number of failed attempts before this one.
    pub failed: u32,
    /// Budget reserved for the row, in US dollars.
    pub usd: f64,
    /// Upper bound of the input tokens.
    pub input_tokens: u64,
    /// Upper bound of the output tokens.
    pub output_tokens: u64,
    /// Byte offset of its body in the request file.
    #[serde(rename = "at")]
    offset: u64,
    /// Length of its body in bytes.
    bytes: u32,
}

impl PartRow {
    /// Returns true if the cache holds its answer, complete or truncated.
    pub(crate) fn is_answered(&self, cache: &Cache) -> bool {
        let truncated_key = || {
            question::truncated_key(
                &self.key,
                u32::try_from(self.output_tokens).unwrap_or(u32::MAX),
            )
        };
        cache.contains(&self.key) || cache.contains(&truncated_key())
    }

    pub(crate) fn bound(&self) -> TokenBound {
        TokenBound {
            input_tokens: self.input_tokens,
            output_tokens: self.output_tokens,
        }
    }
}

impl BatchPart {
    pub(crate) fn is_done(&self) -> bool {
        matches!(self.state, PartState::Done { .. })
    }

    /// Returns true if its batch may exist at the endpoint and has not been collected.
    pub(crate) fn is_enqueued(&self) -> bool {
        !matches!(
            self.state,
            PartState::Planned | PartState::Uploaded { .. } | PartState::Done { .. }
        )
    }

    /// Returns the id of its batch; None before the batch is known and after the part has ended.
    pub(crate) fn batch(&self) -> Option<&str> {
        match &self.state {
            PartState::Created { batch } | PartState::Cancelling { batch } => Some(batch),
            _ => None,
        }
    }
}

/// Returns the length of a request line in bytes, from the lengths of its key and body.
pub(crate) fn line_bytes(key: usize, body: usize) -> u64 {
    let fixed: usize = LINE_TEXTS.iter().map(|text| text.len()).sum();
    (fixed + ENDPOINT.len() + "}\n".len() + key + body) as u64
}

/// Returns the path of the journal.
pub(crate) fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("batches.json")
}

/// Returns true if a part of an earlier run has not ended.
///
/// # Errors
/// If the journal is damaged.
pub(crate) fn is_under_way(run_dir: &Path) -> Result<bool> {
    let journal = BatchJournal::load(run_dir)?;
    Ok(journal.parts.iter().any(|part| !part.is_done()))
}

/// Checks that no batch is under way, so that real-time requests do not buy its answers again.
///
/// # Errors
/// [`Exit::Usage`] if a batch is under way.
pub(crate) fn check_none_under_way(run_dir: &Path) -> Result<()> {
    let journal = BatchJournal::load(run_dir)?;
    let parts = journal.parts.iter();
    let under_way = parts.filter(|part| part.is_enqueued()).count();
    if under_way > 0 {
        return Err(Exit::Usage(format!(
            "{under_way} batches of this run folder are under way, and their answers would be \
             bought twice: set `schedule.mode = \"batch\"` to wait for them; to cancel them and send the \
             remaining rows in real time, also set `schedule.deadline` to a time in the past"
        ))
        .into());
    }
    Ok(())
}

/// Returns the upper bound of the cost of the batches that have not ended, in US dollars.
///
/// # Errors
/// If the journal is damaged.
pub(crate) fn reserved_usd(run_dir: &Path) -> Result<f64> {
    let journal = BatchJournal::load(run_dir)?;
    let unfinished = journal.parts.iter().filter(|part| !part.is_done());
    Ok(unfinished.map(|part| part.reserved_usd).sum())
}

/// Ends the parts whose batch was not created, so that their rows are sent in real time.
pub(crate) fn drop_uncreated(run_dir: &Path) -> Result<()> {
    let mut journal = BatchJournal::load(run_dir)?;
    let mut dropped = 0;
    for index in 0..journal.parts.len() {
        let part = &journal.parts[index];
        if !part.is_done() && !part.is_enqueued() {
            journal.end(index, "not created")?;
            dropped += 1;
        }
    }
    if dropped > 0 {
        tracing::warn!(
            "{dropped} batches of this run folder were planned but not created: they are dropped, and \
             their rows are sent in real time"
        );
    }
    Ok(())
}

impl BatchJournal {
    /// Reads the journal; empty if the file does not exist.
    ///
    /// # Errors
    /// [`Exit::Damaged`] if the file cannot be parsed: the batches under way are unknown.
    pub(crate) fn load(run_dir: &Path) -> Result<BatchJournal> {
        let path = file(run_dir);
        let mut journal = BatchJournal {
            run_dir: run_dir.to_owned(),
            ..BatchJournal::default()
        };
        if !path.exists() && journal.has_files() {
            return Err(Exit::Damaged(format!(
                "{} is missing, but {} holds the rows of batches that may be under way, and their answers would be \
                 bought twice: restore {0}, or remove {1} if no batch is under way at the endpoint",
                path.display(),
                journal.folder().display()
            ))
            .into());
        }
        if path.exists() {
            let text = crate::fs::read_to_string(&path)?;
            journal = serde_json::from_str(&text).map_err(|error| {
                Exit::Damaged(format!(
                    "{} is damaged ({error}): restore it, or delete it if no batch is under way",
                    path.display()
                ))
            })?;
        }
        if journal.version > VERSION {
            return Err(Exit::Damaged(format!(
                "a newer distill wrote {} (version {}): update distill",
                path.display(),
                journal.version
            ))
            .into());
        }
        journal.run_dir = run_dir.to_owned();
        Ok(journal)
    }

    /// Writes the journal durably.
    pub(crate) fn save(&mut self) -> Result<()> {
        self.version = VERSION;
        crate::fs::write_atomic(&file(&self.run_dir), &serde_json::to_vec_pretty(self)?)
    }

    /// Sets the state of a part, durably.
    pub(crate) fn set(&mut self, index: usize, state: PartState) -> Result<()> {
        self.parts[index].state = state;
        self.save()
    }

    /// Returns the path of the request file of a part.
    pub(crate) fn requests(&self, nonce: &str) -> PathBuf {
        self.folder().join(format!("{nonce}.jsonl"))
    }

    fn rows(&self, nonce: &str) -> PathBuf {
        self.folder().join(format!("{nonce}.rows.jsonl"))
    }

    fn folder(&self) -> PathBuf {
        self.run_dir.join("batches")
    }

    /// Returns true if a folder of rows exists that is not empty.
    fn has_files(&self) -> bool {
        let folder = self.folder().read_dir();
        folder.is_ok_and(|mut folder| folder.next().is_some())
    }

    /// Writes the two files of a new part: the requests to upload, and a [`PartRow`] for each request. `entries` are
    /// the rows, each with its reserved budget in US dollars.
    pub(crate) fn write_rows(
        &mut self,
        nonce: &str,
        plan: &Plan,
        upstream: usize,
        entries: &[(QueuedRow, f64)],
    ) -> Result<()> {
        // Rows without a journal mean that the journal was lost.
        if !file(&self.run_dir).exists() {
            self.save()?;
        }
        crate::fs::create_dir_all(&self.folder())?;
        let mut members = Vec::with_capacity(entries.len());
        crate::fs::write_with(&self.requests(nonce), |file| {
            let mut line_start = 0;
            for &(entry, usd) in entries {
                let row = &plan.rows[entry.row];
                let body = plan
                    .body(upstream, row.prompt as usize, row.sample)
                    .to_string();
                let bound = plan.bound(upstream, entry.row);
                let [before_key, before_url, before_body] = LINE_TEXTS;
                let line = [before_key, &row.key, before_url, ENDPOINT, before_body].concat();
                members.push(PartRow {
                    key: row.key.clone(),
                    prompt_id: plan.prompts[row.prompt as usize].id.clone(),
                    sample: row.sample,
                    failed: entry.failed,
                    usd,
                    input_tokens: bound.input_tokens,
                    output_tokens: bound.output_tokens,
                    offset: line_start + line.len() as u64,
                    bytes: body.len() as u32,
                });
                writeln!(file, "{line}{body}}}")?;
                line_start += line_bytes(row.key.len(), body.len());
            }
            Ok(())
        })?;
        crate::fs::write_with(&self.rows(nonce), |file| {
            members.iter().try_for_each(|member| {
                serde_json::to_writer(&mut *file, member)?;
                file.write_all(b"\n")
            })
        })
    }

    /// Reads the rows of a part, in the order of its request lines.
    pub(crate) fn members(&self, nonce: &str) -> Result<Vec<PartRow>> {
        let path = self.rows(nonce);
        let members = crate::fs::read_to_string(&path).and_then(|text| {
            let lines = text.lines().map(serde_json::from_str);
            Ok(lines.collect::<Result<_, _>>()?)
        });
        members.map_err(|error| {
            Exit::Damaged(format!(
                "the rows of a batch under way cannot be read ({error:#}): restore {}, or remove \
                 the batch from {}, which loses its answers",
                path.display(),
                file(&self.run_dir).display()
            ))
            .into()
        })
    }

    /// Opens the request bodies of a part.
    pub(crate) fn bodies(&self, nonce: &str) -> Result<RequestFile> {
        let path = self.requests(nonce);
        let file = std::fs::File::open(&path)
            .with_context(|| format!("could not open {}", path.display()))?;
        Ok(RequestFile { file, path })
    }

    /// Ends a part and removes its files.
    pub(crate) fn end(&mut self, index: usize, status: &str) -> Result<()> {
        let status = status.to_owned();
        self.set(index, PartState::Done { status })?;
        let part = &mut self.parts[index];
        part.progress.rows = Vec::new();
        let nonce = part.nonce.clone();
        for path in [self.requests(&nonce), self.rows(&nonce)] {
            if path.exists() {
                crate::fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Removes the files of parts that have ended or are not in the journal.
    pub(crate) fn remove_stale_files(&self) -> Result<()> {
        let Ok(folder) = self.folder().read_dir() else {
            return Ok(());
        };
        let unfinished = self.parts.iter().filter(|part| !part.is_done());
        let nonces: HashSet<&str> = unfinished.map(|part| part.nonce.as_str()).collect();
        for entry in folder {
            let path = entry.context("could not list the batches")?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let nonce = name.and_then(|name| name.split('.').next());
            if nonce.is_none_or(|nonce| !nonces.contains(nonce)) {
                crate::fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Request file of a part, from which the body of a row is read by its offset.
pub(crate) struct RequestFile {
    file: std::fs::File,
    path: PathBuf,
}

impl RequestFile {
    /// Reads the request body of a row.
    pub(crate) fn read_body(&mut self, member: &PartRow) -> Result<serde_json::Value> {
        use std::io::{Read, Seek, SeekFrom};
        let mut body = vec![0; member.bytes as usize];
        let read = self
            .file
            .seek(SeekFrom::Start(member.offset))
            .and_then(|_| self.file.read_exact(&mut body));
        read.map_err(anyhow::Error::from)
            .and_then(|()| Ok(serde_json::from_slice(&body)?))
            .with_context(|| format!("could not read a request from {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of one version may be resumed by another.
    #[test]
    fn stored_names_do_not_change() {
        let row = r#"{"key":"k","prompt_id":"p","sample":1,"failed":2,"usd":0.5,"input_tokens":3,"output_tokens":4,"at":5,"bytes":6}"#;
        let parsed: PartRow = serde_json::from_str(row).unwrap();
        assert_eq!(serde_json::to_string(&parsed).unwrap(), row);
        let journal = r#"{"version":1,"parts":[{"nonce":"n","teacher":"t","endpoint":"e","rows":1,"tokens":2,"reserved_usd":0.5,"planned_at":3,"state":"created","batch":"b"},{"nonce":"n","teacher":"t","endpoint":"e","rows":1,"tokens":2,"reserved_usd":0.5,"planned_at":3,"state":"done","status":"completed"}]}"#;
        let parsed: BatchJournal = serde_json::from_str(journal).unwrap();
        assert_eq!(serde_json::to_string(&parsed).unwrap(), journal);

        let run = tempfile::tempdir().unwrap();
        assert_eq!(reserved_usd(run.path()).unwrap(), 0.0);
        std::fs::write(file(run.path()), journal).unwrap();
        assert_eq!(reserved_usd(run.path()).unwrap(), 0.5);
    }
}
