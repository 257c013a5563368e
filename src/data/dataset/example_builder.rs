//! Converts a row to an example: tokenises the conversation, decides which tokens are supervised, and aligns the
//! teacher's logprobs with them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::Result;

use super::rows::{SkippedRow, TrainingRow};
use super::source::{DataSource, prompt_hash};
use crate::config::{self, Thinking};
use crate::data::align::aligned::Aligned;
use crate::data::align::{Mapper, StudentAnswer};
use crate::data::prepared::columns::Example;
use crate::data::prepared::writer::ShardWriter;
use crate::data::report;
use crate::data::report::DataReport;
use crate::data::sample_trie::SampleTrie;
use crate::data::sampling::SamplingKind;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::answer_tokens::{AnswerTokens, PromptDifference, ThinkingChange};
use crate::tokenizer::chat_template::answer_start;

/// Reason to leave out a row without an answer to train on.
const EMPTY: &str = "the answer is empty";

/// Converts rows to examples on one thread, and counts them.
pub(super) struct ExampleBuilder<'a> {
    tokenizer: &'a Tokenizer,
    /// Answers of the source by prompt; see `data.sample_trie`.
    samples: &'a SampleTrie,
    mapper: Mapper<'a>,
    settings: &'a config::DataConfig,
    /// True if the source is a file of conversations, false if it is a cache.
    is_file: bool,
    pub(super) report: DataReport,
}

/// Key in [`DataReport::thinking`] for an answer whose reasoning stands in a separate field of its record.
const SEPARATE_REASONING: &str =
    "without the reasoning that the endpoint returned in a field of its own";

/// A row as token ids, with the tokens to predict and their soft labels.
pub(super) struct TokenizedRow {
    pub(super) input_ids: Vec<u32>,
    /// Source of an encoder-decoder; else empty.
    pub(super) source_ids: Vec<u32>,
    /// Ranges of `input_ids` that are predicted.
    pub(super) labels: Vec<Range<usize>>,
    /// Soft labels of the last answer.
    pub(super) soft: Aligned,
    /// Index in `input_ids` of the first supervised token of the last answer.
    pub(super) answer: usize,
    /// Reason why the last answer trains on cross-entropy alone.
    pub(super) ce_only: Option<String>,
    /// Number of supervised answers.
    answers: u64,
    /// Number of supervised answers without an end-of-turn token, except truncated answers.
    without_end: u64,
    /// Treatment of each supervised answer whose thinking the chat template leaves out.
    thinking: Vec<ThinkingChange>,
    pub(super) difference: Option<PromptDifference>,
    /// Indices of the messages that become separate examples: answers whose prefix in the conversation differs from the
    /// generation prompt.
    pub(super) separate_answers: Vec<usize>,
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
            is_file: matches!(source, DataSource::File(_)),
            report: DataReport::default(),
        }
    }

    /// Adds the last answer of the row to `samples`, unless the row makes no example.
    pub(super) fn collect_sample(
        &mut self,
        row: Result<TrainingRow, Box<SkippedRow>>,
        samples: &mut SampleTrie,
    ) {
        if let Ok((_, tokenized)) = row.and_then(|row| self.tokenize(row)) {
            let (prompt, answer) = tokenized.input_ids.split_at(tokenized.answer);
            samples.add(&sample_prompt(&tokenized.source_ids, prompt), answer);
        }
    }

    /// Counts row `number` and writes its example. Returns one row for each earlier answer that becomes a separate
    /// example.
    pub(super) fn add<'r>(
        &mut self,
        number: u64,
        row: Result<TrainingRow<'r>, Box<SkippedRow>>,
        writer: &mut ShardWriter,
    ) -> Result<Vec<TrainingRow<'r>>> {
        let (row, tokenized) = match row.and_then(|row| self.tokenize(row)) {
            Ok(tokenized) => tokenized,
            Err(skipped) => {
                self.count_skipped(*skipped);
                return Ok(Vec::new());
            }
        };
        self.count_example(&row, &tokenized);
        let example = Example {
            key: &row.key,
            input_ids_T: &tokenized.input_ids,
            source_ids_U: &tokenized.source_ids,
            labels: &tokenized.labels,
            soft: &tokenized.soft,
            answer: tokenized.answer,
            is_exact_sample: row.sampling == SamplingKind::Exact,
        };
        // Examples of a file are ordered by line and message, those of a cache by key.
        let order = if self.is_file { "" } else { &*row.key };
        writer.push(
            (order, source_position(number, row.message)),
            prompt_hash(&row.prompt_id),
            tokenized.soft.mapped_mass,
            &example,
        )?;
        let separate_answers = tokenized.separate_answers.into_iter();
        Ok(separate_answers.map(|message| row.up_to(message)).collect())
    }

    fn count_skipped(&mut self, skipped: SkippedRow) {
        match (&skipped.group, skipped.exclusion) {
            (Some(group), Some(exclusion)) => self.report.groups.count_left_out(group, exclusion),
            _ => increment(&mut self.report.dropped, skipped.reason),
        }
    }

    fn count_example(&mut self, row: &TrainingRow, tokenized: &TokenizedRow) {
        let report = &mut self.report;
        if let Some(group) = &row.group {
            report.groups.count_used(group);
        }
        report.kept += 1;
        report.tokens += (tokenized.input_ids.len() + tokenized.source_ids.len()) as u64;
        report.positions += tokenized.labels.iter().map(|l| l.len() as u64).sum::<u64>();
        if let Some(reason) = &tokenized.ce_only {
            increment(&mut report.ce_only, reason.clone());
        }
        let is_unknown = |ids: &[u32]| {
            let unknown = ids.iter().filter(|&&id| self.tokenizer.is_unknown(id));
            unknown.count() as u64
        };
        report.source_tokens += tokenized.source_ids.len() as u64;
        report.unknown_source_tokens += is_unknown(&tokenized.source_ids);
        let labels = tokenized.labels.iter();
        report.unknown_labels += labels
            .map(|range| is_unknown(&tokenized.input_ids[range.clone()]))
            .sum::<u64>();
        report.answers += tokenized.answers;
        report.without_end += tokenized.without_end;
        if row.has_reasoning && self.settings.thinking != Thinking::Drop {
            increment(&mut report.thinking, SEPARATE_REASONING.into());
        }
        for change in &tokenized.thinking {
            increment(&mut report.thinking, change.to_string());
        }
        if let Some(difference) = &tokenized.difference {
            let endings = format!(
                "{:?} for generation, {:?} in a conversation",
                difference.generation, difference.conversation
            );
            report.count_difference(endings, 1);
        }
        report.positions_over_one += tokenized.soft.positions_over_one;
        report
            .logprob_check
            .count(row.sampling, tokenized.soft.agreement);
        report
            .logprob_check
            .count_top_k(row.sampling, tokenized.soft.in_top_k);
        let soft_positions = (0..tokenized.soft.len())
            .filter(|&position| tokenized.soft.is_soft(position))
            .count() as u64;
        report.soft_positions += soft_positions;
        let is_exact_sample = row.sampling == SamplingKind::Exact;
        report.with_soft_labels += u64::from(soft_positions > 0);
        report.exact_samples += u64::from(soft_positions > 0 && is_exact_sample);
        report.ends += u64::from(tokenized.soft.lists_end.is_some());
        report.ends_listed += u64::from(tokenized.soft.lists_end == Some(true));
    }

    /// Tokenises a row. Returns the row with its tokens.
    ///
    /// # Errors
    /// The skipped row with the reason, if it makes no example.
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

    /// Tokenises a row.
    ///
    /// # Errors
    /// The reason, if the row makes no example.
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
        let mut separate_answers = Vec::new();
        // The first token of a sequence cannot be a label, because no token predicts it.
        let mut supervise = |range: Range<usize>| labels.push(range.start.max(1)..range.end);
        if row.every_answer {
            for answer in earlier {
                if answer.follows_generation_prompt {
                    supervise(supervised_from(answer)..answer.supervised.end);
                } else {
                    separate_answers.push(answer.message);
                }
            }
        }
        let end = if row.is_complete {
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
                "longer than {max_length} tokens (`data.max_length`, or the context of the model)"
            ));
        }
        if self.tokenizer.is_encoder_decoder()
            && self.tokenizer.is_empty_source(&conversation.source_ids)
        {
            return Err("with an empty source: the template prints no text for them".into());
        }
        let max_source_length = self.settings.max_source_length;
        if conversation.source_ids.len() > max_source_length {
            return Err(format!(
                "with a source of more than {max_source_length} tokens (`data.max_source_length`, or the context of the \
                 model)"
            ));
        }
        let answers = labels.len() as u64;
        let supervised_earlier = earlier
            .iter()
            .filter(|answer| row.every_answer && answer.follows_generation_prompt);
        let thinking = supervised_earlier
            .clone()
            .chain([last])
            .filter_map(|answer| answer.thinking)
            .collect();
        let without_end = supervised_earlier
            .chain(row.is_complete.then_some(last))
            .filter(|answer| answer.supervised.end == answer.tokens.end)
            .count() as u64;

        let content = &row.messages[last.message].content;
        let answer = supervised_from(last);
        // The part of the answer's text that the template keeps, in bytes.
        let mut kept_text = last.text.clone();
        if self.settings.thinking != Thinking::Supervise {
            let start = answer_start(content);
            if content[start..].trim().is_empty() {
                return Err(EMPTY.into());
            }
            kept_text.start = kept_text.start.max(start);
        }
        // If the prompt closes a block of thinking, the template drops the thinking of the answer: an answer that is
        // all thinking becomes empty.
        if content[kept_text.clone()].trim().is_empty() {
            return Err(EMPTY.into());
        }
        if last.tokens.is_empty() {
            return Err("the student's tokenizer drops all characters of the answer".into());
        }
        // The teacher chose the token that ends the answer, but not the template text after it.
        let teacher_end = end.min(last.tokens.end + 1);
        let aligned = match &row.logprobs {
            None => Err(report::NO_LOGPROBS.into()),
            Some(logprobs) => self
                .mapper
                .align(
                    logprobs,
                    content.as_bytes(),
                    kept_text,
                    StudentAnswer {
                        ids: &input_ids[answer..teacher_end],
                        ends: last
                            .token_ends
                            .as_deref()
                            .map(|ends| &ends[answer - last.tokens.start..]),
                    },
                    row.top_logprobs,
                )
                .map_err(|mismatch| mismatch.to_string()),
        };
        // Text after the last answer is not part of the example.
        input_ids.truncate(end);
        let (soft, ce_only) = match aligned {
            Ok(aligned) => {
                let has_soft_labels = (0..aligned.len()).any(|position| aligned.is_soft(position));
                let is_ce_only = !has_soft_labels && aligned.chunks().is_empty();
                (aligned, is_ce_only.then(|| "no usable logprobs".to_owned()))
            }
            Err(reason) => {
                let (prompt, answer_ids) = input_ids.split_at(answer);
                let prompt = sample_prompt(&conversation.source_ids, prompt);
                match self.samples.soft_labels(&prompt, answer_ids) {
                    Some(mut soft_labels) => {
                        // The trie contains the tokens that end the answers.
                        soft_labels.lists_end = Some(true);
                        (soft_labels, None)
                    }
                    None => (Aligned::default(), Some(reason)),
                }
            }
        };
        Ok(TokenizedRow {
            input_ids,
            source_ids: conversation.source_ids,
            labels,
            soft,
            answer,
            ce_only,
            answers,
            without_end,
            thinking,
            difference: conversation.difference,
            separate_answers,
        })
    }
}

/// Returns the tokens by which samples of one prompt are found: the source of an encoder-decoder, and the tokens before
/// the answer.
fn sample_prompt<'a>(source_ids: &[u32], prompt: &'a [u32]) -> Cow<'a, [u32]> {
    if source_ids.is_empty() {
        Cow::Borrowed(prompt)
    } else {
        Cow::Owned([source_ids, prompt].concat())
    }
}

/// Returns the position by which the examples of a file are ordered. The row's own example comes first, then its
/// separate answers by `message`. Every position is different, so that the order does not depend on threads.
fn source_position(number: u64, message: Option<usize>) -> u64 {
    /// Bits for the message; the number of the row takes the others.
    const MESSAGE_BITS: u32 = 24;
    let rank = message.map_or(0, |message| message as u64 + 1);
    (number << MESSAGE_BITS) + rank.min((1 << MESSAGE_BITS) - 1)
}

fn increment(counts: &mut BTreeMap<String, u64>, reason: String) {
    *counts.entry(reason).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_of_a_file_has_its_own_position() {
        let in_order = [
            source_position(1, None),
            source_position(1, Some(0)),
            source_position(1, Some(1)),
            source_position(1, Some(70_000)),
            source_position(1, Some(70_001)),
            source_position(2, None),
            source_position(2, Some(0)),
        ];
        assert!(in_order.is_sorted_by(|a, b| a < b), "{in_order:?}");
    }
}
