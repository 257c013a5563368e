//! Detects answers that training cannot use, and answers that indicate a wrong setting. Pure.
//!
//! An endpoint can answer every request with status 200 and send no logprobs, no text, answers of another model, or the
//! same text every time. The user gets a note, usually after [`NOTE_AFTER`] such answers in a row. Consecutive unusable
//! answers stop the endpoint; so do, by default, consecutive answers without usable logprobs.

use std::collections::{HashMap, HashSet};

use crate::cache::record::Status;
use crate::config;
use crate::config::OnMissingLogprobs;
use crate::harvest::run_error;
use crate::plan::run_settings::RunSettings;
use crate::report::answer_facts::AnswerFacts;
use crate::report::summary::HarvestSummary;
use crate::terminal::sanitise;

/// Number of consecutive answers with the same fault after which a note is shown.
const NOTE_AFTER: u32 = 20;

/// Number of consecutive unusable answers after which the endpoint stops.
const STOP_AFTER: u32 = 30;

/// Number of prompts with several answers after which equal answers are noted.
const COMPARED_PROMPTS: usize = 10;

/// Maximum number of prompts whose first answer is stored for the comparison.
const MAX_STORED_PROMPTS: usize = 100 * COMPARED_PROMPTS;

/// Minimum length of a compared text in bytes: shorter texts may be labels, which repeat legitimately.
const MIN_TEXT_BYTES: usize = 24;

/// Number of tokens by which an answer may exceed `max_tokens`.
const EXTRA_TOKENS_ALLOWED: u64 = 4;

/// An answer may exceed `max_tokens` by `max_tokens` divided by this number, if that is more than
/// [`EXTRA_TOKENS_ALLOWED`].
const EXTRA_TOKENS_DIVISOR: u64 = 50;

/// Number of model names above which a new name is not noted.
const MAX_NOTED_MODELS: usize = 5;

/// Result of checking one answer.
#[derive(Debug)]
enum MonitorAlert {
    Note(String),
    /// The answers are unusable: the endpoint stops.
    Stop(anyhow::Error),
}

/// Monitor of the answers of one endpoint.
#[derive(Debug)]
pub(crate) struct AnswerMonitor {
    settings: config::EndpointConfig,
    on_missing: OnMissingLogprobs,
    has_budget: bool,
    /// Note about logprobs whose tokens are given by id; None if it has been shown or is not needed.
    token_ids_note: Option<String>,
    /// Number of consecutive answers without usable logprobs; answers without text do not count.
    without_logprobs: u32,
    /// Number of consecutive quarantined answers.
    unusable: u32,
    /// Number of consecutive answers that `max_tokens` cut off.
    cut_off: u32,
    /// `data.keep_finish_reasons`; empty if the answers are not for training.
    keep_finish_reasons: Vec<String>,
    /// Number of consecutive complete answers whose finish reason is not in this list.
    not_kept: u32,
    /// Number of consecutive answers without a plausible usage.
    without_usage: u32,
    repeated_text: RepeatedText,
    /// Names of the models that have answered.
    models: HashSet<String>,
    /// Answers by the hash of the prompt's id. None if no note can follow: at temperature 0, after the note, once two
    /// answers to a prompt differ, or after too many prompts with one answer each.
    samples: Option<HashMap<u64, EqualAnswers>>,
    is_over_max_tokens_noted: bool,
}

/// A text that was the answer to consecutive prompts.
#[derive(Debug, Default)]
struct RepeatedText {
    text_hash: u64,
    /// Number of consecutive different prompts with this text as the answer.
    prompts: u32,
    /// Hash of the id of the last prompt.
    last_prompt: Option<u64>,
}

/// Equal answers to one prompt.
#[derive(Debug)]
struct EqualAnswers {
    text_hash: u64,
    count: u32,
}

impl AnswerMonitor {
    pub(crate) fn from_settings(
        settings: &config::EndpointConfig,
        run: &RunSettings,
    ) -> AnswerMonitor {
        let has_budget = run.budget_usd.is_some();
        let mut monitor = AnswerMonitor::new(settings, run.on_missing_logprobs, has_budget);
        monitor.keep_finish_reasons = run.keep_finish_reasons.clone();
        if run.has_teacher_tokenizer {
            monitor.token_ids_note = None;
        }
        monitor
    }

    fn new(
        settings: &config::EndpointConfig,
        on_missing: OnMissingLogprobs,
        has_budget: bool,
    ) -> AnswerMonitor {
        // At temperature 0 all samples are expected to be the same.
        let is_sampled = settings.sampling.temperature != Some(0.0);
        AnswerMonitor {
            settings: settings.clone(),
            on_missing,
            has_budget,
            token_ids_note: Some(
                "the tokens of the logprobs are ids (`token_id:N`): `distill train` needs \
                 `data.teacher_tokenizer` for them"
                    .into(),
            ),
            without_logprobs: 0,
            unusable: 0,
            cut_off: 0,
            keep_finish_reasons: Vec::new(),
            not_kept: 0,
            without_usage: 0,
            repeated_text: RepeatedText::default(),
            models: HashSet::new(),
            samples: is_sampled.then(HashMap::new),
            is_over_max_tokens_noted: false,
        }
    }

    /// Checks an answer and adds notes to the warnings of the summary. Returns the error that stops the endpoint if its
    /// answers are unusable.
    pub(crate) fn check_and_warn(
        &mut self,
        facts: &AnswerFacts,
        summary: &mut HarvestSummary,
    ) -> Option<anyhow::Error> {
        let mut stop = None;
        summary.not_kept += u64::from(self.is_left_out(facts));
        for alert in self.check(facts) {
            match alert {
                MonitorAlert::Note(text) => summary.warn(text),
                MonitorAlert::Stop(error) => {
                    stop.get_or_insert(error);
                }
            }
        }
        stop
    }

    /// Checks an answer. Returns the alerts that it raises.
    fn check(&mut self, facts: &AnswerFacts) -> Vec<MonitorAlert> {
        let alerts = [
            self.check_max_tokens(facts),
            self.check_usage(facts),
            self.check_model(facts),
            self.check_status(facts),
            self.check_logprobs(facts),
            self.check_token_ids(facts),
            self.check_cut_off(facts),
            self.check_finish_reason(facts),
            self.check_repeated_text(facts),
            self.check_samples(facts),
        ];
        alerts.into_iter().flatten().collect()
    }

    /// Detects a server that ignores the field of `max_tokens`: its answers exceed the reserved budget.
    fn check_max_tokens(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        let used = facts.usage?.completion_tokens;
        // Some servers emit additional tokens to complete a character that spans several tokens.
        let excess = EXTRA_TOKENS_ALLOWED.max(facts.max_tokens / EXTRA_TOKENS_DIVISOR);
        let allowed = facts.max_tokens + excess;
        if self.is_over_max_tokens_noted || used <= allowed {
            return None;
        }
        self.is_over_max_tokens_noted = true;
        let sampling = &self.settings.sampling;
        Some(MonitorAlert::Note(format!(
            "an answer has {used} tokens, although `{}` = {} was sent: the endpoint ignores that field; \
             try `sampling.max_tokens_field` = \"{}\"",
            sampling.max_tokens_field.name(),
            facts.max_tokens,
            sampling.max_tokens_field.other().name()
        )))
    }

    fn check_usage(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        let count = count_in_a_row(&mut self.without_usage, facts.usage.is_none());
        (count == NOTE_AFTER && self.has_budget).then(|| {
            MonitorAlert::Note(format!(
                "{NOTE_AFTER} answers in a row have no plausible usage: their cost is counted \
                 by an upper bound"
            ))
        })
    }

    fn check_model(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        if facts.model.is_empty() || self.models.contains(&facts.model) {
            return None;
        }
        self.models.insert(facts.model.clone());
        let count = self.models.len();
        (2..=MAX_NOTED_MODELS).contains(&count).then(|| {
            MonitorAlert::Note(format!(
                "answers now come from the model \"{}\", earlier ones from another model: `distill cache \
                 stats` counts them by model",
                facts.model
            ))
        })
    }

    fn check_status(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        let is_unusable = facts.status == Status::Quarantined;
        match count_in_a_row(&mut self.unusable, is_unusable) {
            NOTE_AFTER => Some(MonitorAlert::Note(format!(
                "{NOTE_AFTER} answers in a row are unusable ({}): requests to this teacher stop at {STOP_AFTER}",
                facts.reason
            ))),
            STOP_AFTER => Some(MonitorAlert::Stop(run_error::unusable_answers(
                STOP_AFTER,
                &facts.reason,
            ))),
            _ => None,
        }
    }

    fn check_logprobs(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        let top_logprobs = self.settings.sampling.top_logprobs;
        if top_logprobs == 0 || self.settings.sampling.reasoning || facts.text_bytes == 0 {
            return None;
        }
        let reason = facts.without_logprobs.as_deref();
        if count_in_a_row(&mut self.without_logprobs, reason.is_some()) != NOTE_AFTER {
            return None;
        }
        let reason = reason.unwrap_or_default();
        Some(match self.on_missing {
            OnMissingLogprobs::Stop => MonitorAlert::Stop(run_error::without_logprobs(
                NOTE_AFTER,
                reason,
                top_logprobs,
            )),
            OnMissingLogprobs::Warn => MonitorAlert::Note(format!(
                "{NOTE_AFTER} answers in a row have no usable logprobs ({reason}): training uses \
                 cross-entropy alone for them"
            )),
        })
    }

    fn check_token_ids(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        let note = self.token_ids_note.take_if(|_| facts.has_token_ids);
        note.map(MonitorAlert::Note)
    }

    fn check_cut_off(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        (count_in_a_row(&mut self.cut_off, facts.is_cut_off) == NOTE_AFTER).then(|| {
            MonitorAlert::Note(format!(
                "{NOTE_AFTER} answers in a row were cut off at {} tokens: raise `sampling.max_tokens`; the \
                 next run then requests only these answers again",
                facts.max_tokens
            ))
        })
    }

    /// Returns true if training leaves out the answer only because of its finish reason. Other checks cover truncated
    /// answers.
    fn is_left_out(&self, facts: &AnswerFacts) -> bool {
        facts.status == Status::Ok
            && !facts.is_cut_off
            && !self.keep_finish_reasons.is_empty()
            && !self.keep_finish_reasons.contains(&facts.finish_reason)
    }

    fn check_finish_reason(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        let is_left_out = self.is_left_out(facts);
        (count_in_a_row(&mut self.not_kept, is_left_out) == NOTE_AFTER).then(|| {
            MonitorAlert::Note(format!(
                "{NOTE_AFTER} answers in a row have the finish reason `{}`, and `distill train` leaves them out: if they \
                 are complete, add it to `data.keep_finish_reasons`",
                sanitise(&facts.finish_reason)
            ))
        })
    }

    /// Detects one text for many prompts: a caching proxy, or a template that drops the prompt.
    fn check_repeated_text(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        let repeated = &mut self.repeated_text;
        let is_long = facts.text_bytes >= MIN_TEXT_BYTES;
        if repeated.text_hash != facts.text_hash || !is_long {
            repeated.text_hash = facts.text_hash;
            repeated.prompts = 0;
        }
        if is_long && repeated.last_prompt != Some(facts.prompt) {
            repeated.prompts += 1;
        }
        repeated.last_prompt = Some(facts.prompt);
        (repeated.prompts == NOTE_AFTER).then(|| {
            // Another answer to the same prompt must not repeat the note.
            repeated.prompts += 1;
            MonitorAlert::Note(format!(
                "{NOTE_AFTER} different prompts in a row have the same answer: inspect them with `distill \
                 cache show`"
            ))
        })
    }

    /// Detects an endpoint that returns the same answer for every sample of a prompt.
    fn check_samples(&mut self, facts: &AnswerFacts) -> Option<MonitorAlert> {
        let samples = self.samples.as_mut()?;
        if facts.text_bytes < MIN_TEXT_BYTES {
            return None;
        }
        let answers = samples.entry(facts.prompt).or_insert(EqualAnswers {
            text_hash: facts.text_hash,
            count: 0,
        });
        if answers.text_hash != facts.text_hash {
            self.samples = None;
            return None;
        }
        answers.count += 1;
        let several = samples.values().filter(|answers| answers.count > 1);
        if several.count() < COMPARED_PROMPTS {
            // With one sample per prompt there is nothing to compare: bound the memory.
            if samples.len() > MAX_STORED_PROMPTS {
                self.samples = None;
            }
            return None;
        }
        self.samples = None;
        Some(MonitorAlert::Note(format!(
            "all answers to a prompt are the same, for {COMPARED_PROMPTS} prompts so far: the endpoint or a \
             caching proxy does not sample; lower `prompts.samples` to 1 to save the cost of the others"
        )))
    }
}

/// Increments the count if the condition holds, resets it otherwise. Returns the count.
fn count_in_a_row(count: &mut u32, holds: bool) -> u32 {
    *count = if holds { *count + 1 } else { 0 };
    *count
}

#[cfg(test)]
mod tests;
