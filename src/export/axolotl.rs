//! Rows for axolotl's KD plugin. The student must share the teacher's tokenizer.
//!
//! ```yaml
//! plugins: [axolotl.integrations.kd.KDPlugin]
//! kd_trainer: true
//! datasets:
//! - {path: out.jsonl, type: axolotl.integrations.kd.chat_template}
//! ```
//!
//! This dataset type reads `messages`, `logprobs` (k floats per position) and `target_token_ids` (the same shape). How
//! the lists are filled follows from the behaviour of axolotl 0.19:
//!
//! - The lists are aligned with the end of the conversation as rendered by axolotl's chat template
//!   (`ChatTemplateStrategyWithKDv2.transform_logprobs` pads in front). The template's tokens after the answer
//!   therefore need entries, too.
//! - The loss compares the model's prediction at a position with the entry of that position
//!   (`LigerFusedLinearKLTopKLogprobFunction` shifts only the labels). An entry is therefore the distribution of the
//!   next token, and the last entry has no token to predict.
//! - The labels select the positions of the loss one position too late: the entry for the first token of the answer
//!   is not used, and the entry at the end-of-turn token is used, although no token follows in the turn.
//! - Each entry is normalised over its k tokens; k must be the same for all entries of a row.
//!
//! If the teacher's distribution of the next token is unknown (for example because the API does not report the end of
//! the turn), the entry gives the next token of the conversation probability 1.

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

/// Logprob of the tokens that fill an entry with fewer than k alternatives. It is so small that these tokens have no
/// weight. It is large enough that its exponential is not zero in f32, because the logarithm of zero is infinite.
const FILLER: f32 = -50.0;

/// Reason to leave out an answer whose tokens differ from the teacher's.
const TOKENS_DIFFER: &str =
    "the tokenizer splits the answer into other tokens than the teacher did";

/// A conversation that ends with the answer, with k alternatives for each of its last N tokens.
#[derive(Debug, Serialize)]
struct AxolotlRow {
    messages: Vec<Message>,
    /// (N x k)
    target_token_ids: Vec<Vec<u32>>,
    /// (N x k)
    logprobs: Vec<Vec<f32>>,
}

/// Writes the export to `out`.
pub(super) fn write(
    rows: ExportRows<impl Iterator<Item = Result<Record>>>,
    out: &Path,
    settings: &ExportSettings,
) -> Result<ExportReport> {
    let Some(tokenizer) = settings.tokenizer else {
        bail!(Exit::Usage(
            "axolotl needs token ids: give --tokenizer DIR, the folder with the teacher's `tokenizer.json` and chat \
             template (the student must share both)"
                .into()
        ));
    };
    if tokenizer.is_encoder_decoder() {
        bail!(Exit::Usage(
            "axolotl trains decoders only, and --tokenizer is of an encoder-decoder: train it with `distill train`, or \
             export the answers with `--to hf`"
                .into()
        ));
    }
    let mut dropped = 0;
    let mut report = write_lines(rows, out, settings.force, |row| {
        line(row, tokenizer, &mut dropped)
    })?;
    report.dropped_alternatives = Some(dropped);
    Ok(report)
}

/// Converts a row to a line, or returns the reason to leave it out. Adds to `dropped` the number of alternatives that
/// [`entry`] drops from a converted row.
fn line(
    mut row: ExportRow,
    tokenizer: &Tokenizer,
    dropped: &mut u64,
) -> Result<AxolotlRow, String> {
    let logprobs = row.record.logprobs.take().ok_or("no logprobs")?;
    if tokenizer.contains_control(&row.record.answer.text) {
        // axolotl tokenizes the name as the control token, which would shift all earlier entries.
        return Err("the answer contains the name of a control token".into());
    }
    let date = Timing::date(&row.record.timing.sent_at);
    let messages = row.conversation();
    let mut dropped_in_row = 0;
    let entries = entries(&messages, date, &logprobs, tokenizer, &mut dropped_in_row)?;
    *dropped += dropped_in_row;
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

/// A top-k distribution of the next token.
#[derive(Debug, Clone, Default)]
struct TokenEntry {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
}

impl TokenEntry {
    /// Creates an entry that gives `id` probability 1.
    fn certain(id: u32) -> Self {
        Self {
            ids: vec![id],
            logprobs: vec![0.0],
        }
    }

    /// Fills the entry up to `k` with other tokens: a repeated token would count twice when axolotl normalises the
    /// student's probabilities.
    fn fill(&mut self, k: usize) {
        let missing = k.saturating_sub(self.ids.len());
        let unused = (0..).filter(|id| !self.ids.contains(id));
        let fillers: Vec<u32> = unused.take(missing).collect();
        self.ids.extend(fillers);
        self.logprobs.resize(self.ids.len(), FILLER);
    }
}

/// Returns the entries of a conversation that ends with an answer. The first entry belongs to the token before the
/// answer, because each entry is the distribution of the next token.
fn entries(
    messages: &[Message],
    date: Option<DateTime>,
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
    check_tokens(ids, &teacher, tokenizer)?;

    let from_answer = &conversation.ids[answer.content.start..];
    let mut entries = Vec::with_capacity(from_answer.len() + 1);
    for (position, &id) in from_answer.iter().enumerate() {
        let is_reported = position < ids.len() || {
            // The end of the turn, if the API reports it.
            position == ids.len()
                && position < teacher.token.len()
                && find_id(&teacher.token[position], tokenizer) == Some(id)
        };
        entries.push(if is_reported {
            entry(&teacher, position, id, tokenizer, dropped)?
        } else {
            TokenEntry::certain(id)
        });
    }
    // No token follows the last one, but if it is the end-of-turn token, axolotl uses its entry.
    let last = from_answer.last().ok_or("no answer")?;
    entries.push(TokenEntry::certain(*last));

    let k = entries.iter().map(|entry| entry.ids.len()).max();
    for entry in &mut entries {
        entry.fill(k.unwrap_or_default());
    }
    Ok(entries)
}

/// Checks that the N tokens `ids` of the answer are the tokens that the teacher emitted before the end of its turn.
fn check_tokens(ids: &[u32], teacher: &LogprobsView, tokenizer: &Tokenizer) -> Result<(), String> {
    if teacher.token.len() < ids.len() {
        return Err(TOKENS_DIFFER.into());
    }
    for (position, &id) in ids.iter().enumerate() {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        let emitted = &*teacher.token[position];
        // The first token may include a space of the template, which some servers do not report.
        let is_same = bytes == emitted || (position == 0 && bytes.trim_ascii_start() == emitted);
        if emitted.is_empty() || !is_same {
            return Err(TOKENS_DIFFER.into());
        }
    }
    let mut after_answer = ids.len()..teacher.token.len();
    if after_answer.all(|position| is_stop(tokenizer, &teacher.token[position])) {
        Ok(())
    } else {
        Err(TOKENS_DIFFER.into())
    }
}

/// Returns the teacher's alternatives at a position where it emitted the token `emitted_id`.
fn entry(
    teacher: &LogprobsView,
    position: usize,
    emitted_id: u32,
    tokenizer: &Tokenizer,
    dropped: &mut u64,
) -> Result<TokenEntry, String> {
    let emitted = &*teacher.token[position];
    let mut alternatives = Vec::new();
    align::list_candidates(teacher, position, usize::MAX, None, &mut alternatives)
        .ok_or("the teacher's probabilities sum to more than 1")?;
    let mut entry = TokenEntry::default();
    for (bytes, logprob) in alternatives {
        let id = if bytes == emitted {
            Some(emitted_id)
        } else {
            find_id(bytes, tokenizer)
        };
        // If two alternatives have the same token, the first one is kept.
        match id.filter(|id| !entry.ids.contains(id)) {
            Some(id) => {
                entry.ids.push(id);
                entry.logprobs.push(logprob);
            }
            None => *dropped += 1,
        }
    }
    if entry.ids.is_empty() {
        Err("a position has no alternative that is a token of the tokenizer".into())
    } else {
        Ok(entry)
    }
}

/// Returns the token with these bytes, or the control token of this name.
fn find_id(bytes: &[u8], tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.id_of_bytes(bytes).or_else(|| {
        let name = std::str::from_utf8(bytes).ok()?;
        tokenizer.id_of_control(name)
    })
}
