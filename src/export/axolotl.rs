//! Rows for the KD plugin of axolotl, whose student must share the teacher's tokenizer.
//!
//! ```yaml
//! plugins: [axolotl.integrations.kd.KDPlugin]
//! kd_trainer: true
//! datasets:
//! - {path: out.jsonl, type: axolotl.integrations.kd.chat_template}
//! ```
//!
//! That type reads `messages`, `logprobs` (by position, floats) and `target_token_ids` (the same
//! shape). Facts of axolotl 0.19 that decide what stands in them:
//!
//! - The lists belong to the last tokens of the conversation as axolotl's chat template prints it
//!   (`ChatTemplateStrategyWithKDv2.transform_logprobs` pads in front), so the tokens of the
//!   template behind the answer need entries too.
//! - The loss compares what the model predicts at a position with the entry of that position
//!   (`LigerFusedLinearKLTopKLogprobFunction` shifts the labels only), so an entry is of the token
//!   that comes next, and the last one of no token.
//! - Which positions count is read off the labels, one too late: the entry of the first token of
//!   the answer is not used, and that of the end-of-turn token is, though it is of what follows.
//! - It normalises the entries of a position over its k; k must be the same in a row.
//!
//! Where nothing is known of the next token (the teacher's API does not show the end of the turn,
//! say) its entry is that token with certainty.

use std::path::Path;

use anyhow::{Result, bail};
use jiff::civil::DateTime;
use serde::Serialize;

use crate::cache::logprobs_view::LogprobsView;
use crate::cache::record::{Logprobs, Record, Timing};
use crate::data::align;
use crate::data::align::tokens::is_stop;
use crate::exit::Exit;
use crate::export::rows::{ExportReport, ExportRow, ExportRows, ExportSettings, write_lines};
use crate::prompt::message::Message;
use crate::tokenizer::Tokenizer;

/// The logprob of what fills up a position with fewer than k entries: small enough to weigh
/// nothing, large enough for its exponential to be no zero in f32, whose logarithm is infinite.
const FILLER: f32 = -50.0;

const OTHER_TOKENS: &str = "the tokenizer cuts the answer into other tokens than the teacher did";

/// A conversation that ends in the answer; entries of its last N tokens, k at each.
#[derive(Debug, Serialize)]
struct AxolotlRow {
    messages: Vec<Message>,
    /// (N x k)
    target_token_ids: Vec<Vec<u32>>,
    /// (N x k)
    logprobs: Vec<Vec<f32>>,
}

pub(super) fn write(
    rows: ExportRows<impl Iterator<Item = Result<Record>>>,
    out: &Path,
    settings: &ExportSettings,
) -> Result<ExportReport> {
    let Some(tokenizer) = settings.tokenizer else {
        bail!(Exit::Usage(
            "axolotl wants token ids: give --tokenizer DIR, the folder with the `tokenizer.json` \
             and the chat template of the teacher (the student must share both)"
                .into()
        ));
    };
    let mut dropped = 0;
    let mut report = write_lines(rows, out, settings.force, |row| {
        line(row, tokenizer, &mut dropped)
    })?;
    report.dropped_alternatives = Some(dropped);
    Ok(report)
}

/// A row as a line, or the reason to leave it out. Alternatives that no token stands for are added
/// to `dropped`.
fn line(
    mut row: ExportRow,
    tokenizer: &Tokenizer,
    dropped: &mut u64,
) -> Result<AxolotlRow, String> {
    let logprobs = row.record.logprobs.take().ok_or("no logprobs")?;
    if tokenizer.holds_control(&row.record.answer.text) {
        // axolotl makes that token of it, and all entries before would be one off.
        return Err("the answer holds the name of a control token".into());
    }
    let date = Timing::date(&row.record.timing.sent_at);
    let messages = row.conversation();
    let mut dropped_here = 0;
    let entries = entries((&messages, date), &logprobs, tokenizer, &mut dropped_here)?;
    *dropped += dropped_here;
    let (target_token_ids, logprobs) = entries
        .into_iter()
        .map(|entry| (entry.ids, entry.logprobs))
        .unzip();
    Ok(AxolotlRow {
        messages,
        target_token_ids,
        logprobs,
    })
}

/// What is known of one token.
#[derive(Debug, Clone, Default)]
struct TokenEntry {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
}

impl TokenEntry {
    fn certain(id: u32) -> Self {
        Self {
            ids: vec![id],
            logprobs: vec![0.0],
        }
    }

    /// Fills up to `k` with tokens that are not in it: one that was, twice, would count twice where
    /// axolotl normalises the student's probabilities.
    fn fill(&mut self, k: usize) {
        let missing = k.saturating_sub(self.ids.len());
        let unused = (0..).filter(|id| !self.ids.contains(id));
        let fillers: Vec<u32> = unused.take(missing).collect();
        self.ids.extend(fillers);
        self.logprobs.resize(self.ids.len(), FILLER);
    }
}

/// The entries of the last tokens of a conversation that ends in an answer, from the one before the
/// answer on: each of the token that comes next.
fn entries(
    (messages, date): (&[Message], Option<DateTime>),
    logprobs: &Logprobs,
    tokenizer: &Tokenizer,
    dropped: &mut u64,
) -> Result<Vec<TokenEntry>, String> {
    let conversation = tokenizer
        .conversation_at(messages, false, date)
        .map_err(|error| format!("{error:#}"))?;
    let answer = conversation.answers.last().ok_or("no answer")?;
    let teacher = LogprobsView::from(logprobs);
    let ids = &conversation.ids[answer.content.clone()];
    same_tokens(ids, &teacher, tokenizer)?;

    let behind = &conversation.ids[answer.content.start..];
    let mut entries = Vec::with_capacity(behind.len() + 1);
    for (position, &id) in behind.iter().enumerate() {
        let known = position < ids.len() || {
            // The end of the turn, where the API shows it.
            position == ids.len()
                && position < teacher.token.len()
                && id_of(&teacher.token[position], tokenizer) == Some(id)
        };
        entries.push(match known {
            true => entry(&teacher, position, id, tokenizer, dropped)?,
            false => TokenEntry::certain(id),
        });
    }
    // Nothing follows the last token, and axolotl counts it where it ends the turn.
    let last = behind.last().ok_or("no answer")?;
    entries.push(TokenEntry::certain(*last));

    let k = entries.iter().map(|entry| entry.ids.len()).max();
    for entry in &mut entries {
        entry.fill(k.unwrap_or_default());
    }
    Ok(entries)
}

/// Are the N tokens `ids` what the teacher said, up to the end of its turn?
fn same_tokens(ids: &[u32], teacher: &LogprobsView, tokenizer: &Tokenizer) -> Result<(), String> {
    if teacher.token.len() < ids.len() {
        return Err(OTHER_TOKENS.into());
    }
    for (position, &id) in ids.iter().enumerate() {
        let spelled = tokenizer.token_bytes(id).unwrap_or_default();
        let said = &*teacher.token[position];
        // The first token may hold a space of the template, which some servers do not report.
        let same = spelled == said || (position == 0 && spelled.trim_ascii_start() == said);
        if said.is_empty() || !same {
            return Err(OTHER_TOKENS.into());
        }
    }
    match (ids.len()..teacher.token.len()).all(|at| is_stop(tokenizer, &teacher.token[at])) {
        true => Ok(()),
        false => Err(OTHER_TOKENS.into()),
    }
}

/// The teacher's alternatives at a position where it said the token `said`.
fn entry(
    teacher: &LogprobsView,
    position: usize,
    said: u32,
    tokenizer: &Tokenizer,
    dropped: &mut u64,
) -> Result<TokenEntry, String> {
    let emitted = &*teacher.token[position];
    let mut alternatives = Vec::new();
    align::alternatives(teacher, position, usize::MAX, None, &mut alternatives)
        .ok_or("the teacher's probabilities sum to more than 1")?;
    let mut entry = TokenEntry::default();
    for (bytes, logprob) in alternatives {
        let id = match bytes == emitted {
            true => Some(said),
            false => id_of(bytes, tokenizer),
        };
        // A token that two alternatives claim belongs to the likelier one.
        match id.filter(|id| !entry.ids.contains(id)) {
            Some(id) => {
                entry.ids.push(id);
                entry.logprobs.push(logprob);
            }
            None => *dropped += 1,
        }
    }
    match entry.ids.is_empty() {
        true => Err("a position has no logprob of a token that the tokenizer knows".into()),
        false => Ok(entry),
    }
}

/// The token that is spelled `bytes`, or the control token of that name.
fn id_of(bytes: &[u8], tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.id_of_bytes(bytes).or_else(|| {
        let name = std::str::from_utf8(bytes).ok()?;
        tokenizer.id_of_control(name)
    })
}
