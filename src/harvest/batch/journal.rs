//! `batches.json` in the run folder: every batch and how far it has come, written before each step
//! that the endpoint may charge for, and `batches/`, which holds the rows of those under way.
//!
//! | after a kill in state | the next run |
//! |---|---|
//! | `planned` | uploads the file; one that was uploaded already costs nothing |
//! | `uploaded` | creates the batch |
//! | `creating` | looks for a batch with the nonce, and creates one if there is none |
//! | `created`, `cancelling` | waits for the end and takes the answers that the cache does not hold |
//! | `done` | removes what is left of it in `batches/` |

use std::collections::HashMap;
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

const VERSION: u32 = 1;

/// What a line of a file of requests has around its key and its body.
const LINE: [&str; 3] = [
    "{\"custom_id\":\"",
    "\",\"method\":\"POST\",\"url\":\"",
    "\",\"body\":",
];

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct BatchJournal {
    version: u32,
    /// In the order in which they were made; indices stay.
    pub parts: Vec<BatchPart>,
    #[serde(skip)]
    run_dir: PathBuf,
}

/// Rows that are sent as one batch.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BatchPart {
    /// Its name here, and in the metadata of the batch.
    pub nonce: String,
    pub teacher: String,
    pub endpoint: String,
    pub rows: u64,
    /// As the endpoint's limit counts them, about.
    pub tokens: u64,
    /// The most that it can cost.
    pub reserved_usd: f64,
    /// Unix time.
    pub planned_at: i64,
    #[serde(flatten)]
    pub state: PartState,
    #[serde(skip)]
    pub progress: PartProgress,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum PartState {
    Planned,
    Uploaded {
        file: String,
    },
    /// The request has been sent, or is about to be.
    Creating {
        file: String,
    },
    Created {
        batch: String,
    },
    /// This side has asked for its end.
    Cancelling {
        batch: String,
    },
    Done {
        status: String,
    },
}

/// What this run knows of a part.
#[derive(Debug, Default)]
pub(crate) struct PartProgress {
    /// None: no teacher of this config.
    pub upstream: Option<usize>,
    /// The row of the plan for each line; None for one that this run does not ask.
    pub rows: Vec<Option<u32>>,
    /// Still set aside for it.
    pub held: f64,
    /// As the endpoint told it last.
    pub status: String,
    /// It may have been created without our knowing.
    pub in_doubt: bool,
    /// How often it was looked for, its file was not found, it or its answers were not there.
    pub lookups: usize,
    pub input_not_found: u32,
    pub not_found: u32,
    /// How often a results file of its could not be read.
    pub read_failures: u32,
    pub not_before: Option<Instant>,
}

/// A line of `<nonce>.rows.jsonl`: what a record of the answer needs, whatever the next run asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartRow {
    pub key: String,
    pub prompt_id: String,
    pub sample: u32,
    /// Attempts before this one that failed.
    pub failed: u32,
    pub usd: f64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// Where its request body is in the file of requests.
    at: u64,
    bytes: u32,
}

impl PartRow {
    /// Returns true if the cache holds its answer, complete or truncated.
    pub(crate) fn is_answered(&self, cache: &Cache) -> bool {
        let cut = || {
            question::truncated_key(
                &self.key,
                u32::try_from(self.output_tokens).unwrap_or(u32::MAX),
            )
        };
        cache.contains(&self.key) || cache.contains(&cut())
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

    /// It counts against the endpoint's limit of enqueued tokens.
    pub(crate) fn is_enqueued(&self) -> bool {
        !matches!(
            self.state,
            PartState::Planned | PartState::Uploaded { .. } | PartState::Done { .. }
        )
    }

    /// The id of its batch, if that is known.
    pub(crate) fn batch(&self) -> Option<&str> {
        match &self.state {
            PartState::Created { batch } | PartState::Cancelling { batch } => Some(batch),
            _ => None,
        }
    }
}

/// Bytes of the line that asks for a row whose key and body have so many.
pub(crate) fn line_bytes(key: usize, body: usize) -> u64 {
    let around: usize = LINE.iter().map(|part| part.len()).sum();
    (around + ENDPOINT.len() + "}\n".len() + key + body) as u64
}

pub(crate) fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("batches.json")
}

/// Returns true if batches of earlier runs have not been collected yet.
///
/// # Errors
/// Where the journal is damaged.
pub(crate) fn is_under_way(run_dir: &Path) -> Result<bool> {
    let journal = BatchJournal::load(run_dir)?;
    Ok(journal.parts.iter().any(|part| !part.is_done()))
}

/// Refuses to ask one by one for what batches under way will answer.
pub(crate) fn check_none_under_way(run_dir: &Path) -> Result<()> {
    let journal = BatchJournal::load(run_dir)?;
    let parts = journal.parts.iter();
    let under_way = parts.filter(|part| part.is_enqueued()).count();
    if under_way > 0 {
        return Err(Exit::Usage(format!(
            "{under_way} batches of this run folder are under way, and what they answer would be \
             bought twice: set `schedule.mode = \"batch\"` to wait for them, and `schedule.deadline` \
             to a time that has passed to cancel them and have the rest in real time"
        ))
        .into());
    }
    Ok(())
}

/// Drops batches that no run has created yet: their rows are asked one by one.
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
            "{dropped} batches of this run folder were planned and never created: they are dropped, and \
             their rows are asked in real time"
        );
    }
    Ok(())
}

impl BatchJournal {
    /// # Errors
    /// [`Exit::Damaged`] where the file is none: which batches are under way cannot be guessed.
    pub(crate) fn load(run_dir: &Path) -> Result<BatchJournal> {
        let path = file(run_dir);
        let mut journal = BatchJournal::default();
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

    /// Durable once this returns.
    pub(crate) fn save(&mut self) -> Result<()> {
        self.version = VERSION;
        crate::fs::write_atomic(&file(&self.run_dir), &serde_json::to_vec_pretty(self)?)
    }

    /// Gives a part its next state, durably.
    pub(crate) fn set(&mut self, index: usize, state: PartState) -> Result<()> {
        self.parts[index].state = state;
        self.save()
    }

    pub(crate) fn requests(&self, nonce: &str) -> PathBuf {
        self.folder().join(format!("{nonce}.jsonl"))
    }

    fn rows(&self, nonce: &str) -> PathBuf {
        self.folder().join(format!("{nonce}.rows.jsonl"))
    }

    fn folder(&self) -> PathBuf {
        self.run_dir.join("batches")
    }

    /// Writes the files of a part to come: what is uploaded, and whose lines these are.
    pub(crate) fn write_rows(
        &self,
        nonce: &str,
        plan: &Plan,
        upstream: usize,
        entries: &[(QueuedRow, f64)],
    ) -> Result<()> {
        crate::fs::create_dir_all(&self.folder())?;
        let mut members = Vec::with_capacity(entries.len());
        crate::fs::write_with(&self.requests(nonce), |file| {
            let mut at = 0;
            for &(entry, usd) in entries {
                let row = &plan.rows[entry.row];
                let body = plan
                    .body(upstream, row.prompt as usize, row.sample)
                    .to_string();
                let bound = plan.bound(upstream, entry.row);
                let line = [LINE[0], &row.key, LINE[1], ENDPOINT, LINE[2]].concat();
                members.push(PartRow {
                    key: row.key.clone(),
                    prompt_id: plan.prompts[row.prompt as usize].id.clone(),
                    sample: row.sample,
                    failed: entry.failed,
                    usd,
                    input_tokens: bound.input_tokens,
                    output_tokens: bound.output_tokens,
                    at: at + line.len() as u64,
                    bytes: body.len() as u32,
                });
                writeln!(file, "{line}{body}}}")?;
                at += line_bytes(row.key.len(), body.len());
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

    /// The rows of a part, in the order of their lines.
    pub(crate) fn members(&self, nonce: &str) -> Result<Vec<PartRow>> {
        let path = self.rows(nonce);
        let members = crate::fs::read_to_string(&path).and_then(|text| {
            let lines = text.lines().map(serde_json::from_str);
            Ok(lines.collect::<Result<_, _>>()?)
        });
        members.map_err(|error| {
            Exit::Damaged(format!(
                "the rows of a batch under way cannot be read ({error:#}): restore {}, or remove \
                 the batch from {}; its answers are lost then",
                path.display(),
                file(&self.run_dir).display()
            ))
            .into()
        })
    }

    /// The request bodies of a part.
    pub(crate) fn bodies(&self, nonce: &str) -> Result<RequestFile> {
        let path = self.requests(nonce);
        let file = std::fs::File::open(&path)
            .with_context(|| format!("could not open {}", path.display()))?;
        Ok(RequestFile { file, path })
    }

    /// Ends a part; what is left of it in `batches/` goes.
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

    /// Removes the files of parts that have ended, or were never noted.
    pub(crate) fn tidy(&self) -> Result<()> {
        let Ok(folder) = self.folder().read_dir() else {
            return Ok(());
        };
        let is_kept: HashMap<&str, bool> = self
            .parts
            .iter()
            .map(|part| (part.nonce.as_str(), !part.is_done()))
            .collect();
        for entry in folder {
            let path = entry.context("could not list the batches")?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let nonce = name.and_then(|name| name.split('.').next());
            if nonce.is_none_or(|nonce| is_kept.get(nonce) != Some(&true)) {
                crate::fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// A file of requests, read where it is asked for.
pub(crate) struct RequestFile {
    file: std::fs::File,
    path: PathBuf,
}

impl RequestFile {
    pub(crate) fn read(&mut self, member: &PartRow) -> Result<serde_json::Value> {
        use std::io::{Read, Seek, SeekFrom};
        let mut body = vec![0; member.bytes as usize];
        let read = self
            .file
            .seek(SeekFrom::Start(member.at))
            .and_then(|_| self.file.read_exact(&mut body));
        read.map_err(anyhow::Error::from)
            .and_then(|()| Ok(serde_json::from_slice(&body)?))
            .with_context(|| format!("could not read a request from {}", self.path.display()))
    }
}
