//! Detects worthless answers after about twenty of them. Pure.
//!
//! An endpoint can answer everything with status 200 and yet give nothing: no logprobs, no text, another
//! model, the same text every time. The user hears of it at once; a run that has become worthless stops.

use crate::report::answer_facts::AnswerFacts;
use std::collections::{HashMap, HashSet};

use crate::cache::record::Status;
use crate::config;
use crate::config::{Config, OnMissingLogprobs};
use crate::harvest::run_error;

/// Answers in a row that are no accident.
const NOTED: u32 = 20;

/// Answers in a row without use, after which nothing more is asked.
const WORTHLESS: u32 = 30;

/// Prompts with several answers that are compared.
const COMPARED: usize = 10;

/// Texts below so many bytes are labels, which come again and again.
const SHORT: usize = 24;

/// Tokens by which an answer may be longer than `max_tokens`.
const ROUNDING: u64 = 4;

/// Names of models that are told of.
const MODELS: usize = 5;

/// Result of checking one answer.
#[derive(Debug)]
pub(crate) enum MonitorAlert {
    Note(String),
    /// The run is not worth going on with.
    Stop(anyhow::Error),
}

/// The answers of one teacher so far.
#[derive(Debug)]
pub(crate) struct AnswerMonitor {
    settings: config::EndpointConfig,
    on_missing: OnMissingLogprobs,
    has_budget: bool,
    /// A note for tokens that are named by id, until it is shown.
    token_ids: Option<String>,
    without_logprobs: u32,
    useless: u32,
    cut_off: u32,
    without_usage: u32,
    /// The last text, and how many different prompts in a row it has answered.
    alike: (u64, u32, Option<u64>),
    models: HashSet<String>,
    /// By prompt: the first text, and whether all others were the same; None once that is told, or wrong.
    samples: Option<HashMap<u64, (u64, u32)>>,
    is_past_told: bool,
}

impl AnswerMonitor {
    pub(crate) fn from_config(settings: &config::EndpointConfig, config: &Config) -> AnswerMonitor {
        let on_missing = config.harvest.on_missing_logprobs;
        let mut watch = AnswerMonitor::new(settings, on_missing, config.budget.usd.is_some());
        if config.data.teacher_tokenizer.is_some() {
            watch.token_ids = None;
        }
        watch
    }

    fn new(
        settings: &config::EndpointConfig,
        on_missing: OnMissingLogprobs,
        has_budget: bool,
    ) -> AnswerMonitor {
        // At temperature 0 all samples are the same, and nobody is surprised.
        let is_sampled = settings.sampling.temperature != Some(0.0);
        AnswerMonitor {
            settings: settings.clone(),
            on_missing,
            has_budget,
            token_ids: Some(
                "the tokens of the logprobs are ids (`token_id:N`): `distill train` needs \
                 `data.teacher_tokenizer` for them"
                    .into(),
            ),
            without_logprobs: 0,
            useless: 0,
            cut_off: 0,
            without_usage: 0,
            alike: (0, 0, None),
            models: HashSet::new(),
            samples: is_sampled.then(HashMap::new),
            is_past_told: false,
        }
    }

    /// Looks at one more answer. Returns what is to be said now.
    pub(crate) fn check(&mut self, seen: &AnswerFacts) -> Vec<MonitorAlert> {
        let words = [
            self.past_max_tokens(seen),
            self.usage(seen),
            self.model(seen),
            self.logprobs_use(seen),
            self.logprobs(seen),
            self.token_ids(seen),
            self.cut_off(seen),
            self.alike(seen),
            self.samples(seen),
        ];
        words.into_iter().flatten().collect()
    }

    /// A server that does not know the field answers past it, and past what was reserved.
    fn past_max_tokens(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        let used = seen.usage?.completion_tokens;
        // Some servers finish a character.
        let allowed = seen.max_tokens + ROUNDING.max(seen.max_tokens / 50);
        if self.is_past_told || used <= allowed {
            return None;
        }
        self.is_past_told = true;
        let sampling = &self.settings.sampling;
        Some(MonitorAlert::Note(format!(
            "an answer has {used} tokens, where `{}` = {} was sent: the endpoint ignores that field; \
             try `sampling.max_tokens_field` = \"{}\"",
            sampling.max_tokens_field.name(),
            seen.max_tokens,
            sampling.max_tokens_field.other().name()
        )))
    }

    fn usage(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        let count = in_a_row(&mut self.without_usage, seen.usage.is_none());
        (count == NOTED && self.has_budget).then(|| {
            MonitorAlert::Note(format!(
                "{NOTED} answers in a row came without usage that can be true: what they cost is \
                 counted by an upper bound"
            ))
        })
    }

    fn model(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        if seen.model.is_empty() || self.models.contains(&seen.model) {
            return None;
        }
        self.models.insert(seen.model.clone());
        let count = self.models.len();
        (2..=MODELS).contains(&count).then(|| {
            MonitorAlert::Note(format!(
                "answers now come from the model \"{}\", others came from another one: `distill cache \
                 stats` counts them by model",
                seen.model
            ))
        })
    }

    fn logprobs_use(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        let is_useless = seen.status == Status::Quarantined;
        match in_a_row(&mut self.useless, is_useless) {
            NOTED => Some(MonitorAlert::Note(format!(
                "{NOTED} answers in a row are of no use ({}): at {WORTHLESS} the run stops",
                seen.reason
            ))),
            WORTHLESS => Some(MonitorAlert::Stop(run_error::worthless(
                WORTHLESS,
                &seen.reason,
            ))),
            _ => None,
        }
    }

    fn logprobs(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        let top_logprobs = self.settings.sampling.top_logprobs;
        if top_logprobs == 0 || self.settings.sampling.reasoning || seen.text.1 == 0 {
            return None;
        }
        let why = seen.without_logprobs.as_deref();
        if in_a_row(&mut self.without_logprobs, why.is_some()) != NOTED {
            return None;
        }
        let why = why.unwrap_or_default();
        Some(match self.on_missing {
            OnMissingLogprobs::Stop => {
                MonitorAlert::Stop(run_error::without_logprobs(NOTED, why, top_logprobs))
            }
            OnMissingLogprobs::Warn => MonitorAlert::Note(format!(
                "{NOTED} answers in a row came without usable logprobs ({why}): they train on \
                 cross-entropy alone"
            )),
        })
    }

    fn token_ids(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        let note = self.token_ids.take_if(|_| seen.has_token_ids);
        note.map(MonitorAlert::Note)
    }

    fn cut_off(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        (in_a_row(&mut self.cut_off, seen.is_cut_off) == NOTED).then(|| {
            MonitorAlert::Note(format!(
                "{NOTED} answers in a row were cut off at {} tokens: raise `sampling.max_tokens`, which \
                 asks again for those alone that were cut off",
                seen.max_tokens
            ))
        })
    }

    /// One text for many prompts: a cache on the way, or a template that leaves the prompt out.
    fn alike(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        let (last, count, prompt) = &mut self.alike;
        if *last != seen.text.0 || seen.text.1 < SHORT {
            (*last, *count) = (seen.text.0, 0);
        }
        if seen.text.1 >= SHORT && *prompt != Some(seen.prompt) {
            *count += 1;
        }
        *prompt = Some(seen.prompt);
        (*count == NOTED).then(|| {
            *count += 1;
            MonitorAlert::Note(format!(
                "{NOTED} different prompts in a row have the same answer: look at them with `distill \
                 cache show`"
            ))
        })
    }

    fn samples(&mut self, seen: &AnswerFacts) -> Option<MonitorAlert> {
        let samples = self.samples.as_mut()?;
        if seen.text.1 < SHORT {
            return None;
        }
        let (first, count) = samples.entry(seen.prompt).or_insert((seen.text.0, 0));
        if *first != seen.text.0 {
            self.samples = None;
            return None;
        }
        *count += 1;
        let several = samples.values().filter(|(_, count)| *count > 1).count();
        if several < COMPARED {
            // What has one answer so far may be all that is ever asked of it.
            if samples.len() > 100 * COMPARED {
                self.samples = None;
            }
            return None;
        }
        self.samples = None;
        Some(MonitorAlert::Note(format!(
            "all answers to one prompt are the same, for {COMPARED} prompts so far: the endpoint, or a \
             cache on the way, does not sample; with `prompts.samples` above 1 that is paid for nothing"
        )))
    }
}

/// Counts what holds again, from nothing where it does not.
fn in_a_row(count: &mut u32, holds: bool) -> u32 {
    *count = if holds { *count + 1 } else { 0 };
    *count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::usage::Usage;
    use crate::config::EndpointConfig;

    fn upstream() -> EndpointConfig {
        EndpointConfig {
            teacher: Default::default(),
            sampling: Default::default(),
            limits: Default::default(),
            price: Default::default(),
        }
    }

    fn watch(on_missing: OnMissingLogprobs) -> AnswerMonitor {
        AnswerMonitor::new(&upstream(), on_missing, true)
    }

    /// A good answer to this prompt.
    fn good(prompt: u32) -> AnswerFacts {
        AnswerFacts {
            prompt: prompt.into(),
            status: Status::Ok,
            reason: String::new(),
            is_cut_off: false,
            model: "m".into(),
            text: (prompt.into(), 100),
            without_logprobs: None,
            has_token_ids: false,
            usage: Some(Usage {
                prompt_tokens: 5,
                completion_tokens: 10,
                ..Usage::default()
            }),
            max_tokens: 50,
        }
    }

    /// The answers after which something is said, and what.
    fn said(mut watch: AnswerMonitor, seen: impl Fn(u32) -> AnswerFacts) -> Vec<(u32, String)> {
        let mut said = Vec::new();
        for number in 1..=100 {
            for word in watch.check(&seen(number)) {
                said.push((
                    number,
                    match word {
                        MonitorAlert::Note(text) => text,
                        MonitorAlert::Stop(error) => format!("stop: {error:#}"),
                    },
                ));
            }
        }
        said
    }

    #[track_caller]
    fn check(said: Vec<(u32, String)>, expected: &[(u32, &str)]) {
        assert_eq!(said.len(), expected.len(), "{said:?}");
        for ((number, text), (expected, part)) in said.iter().zip(expected) {
            assert_eq!(number, expected, "{text}");
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn token_ids_are_noted_once_and_only_without_their_tokenizer() {
        let seen = AnswerFacts {
            has_token_ids: true,
            ..good(0)
        };
        let notes = |teacher_tokenizer: Option<&str>| {
            let mut config = Config::default();
            config.data.teacher_tokenizer = teacher_tokenizer.map(Into::into);
            let mut watch = AnswerMonitor::from_config(&upstream(), &config);
            assert!(watch.check(&good(0)).is_empty());
            watch.check(&seen).len() + watch.check(&seen).len()
        };
        assert_eq!((notes(None), notes(Some("teacher"))), (1, 0));
    }

    #[test]
    fn nothing_is_said_of_good_answers() {
        check(said(watch(OnMissingLogprobs::Stop), good), &[]);
    }

    #[test]
    fn logprobs_that_never_come_stop_a_run_or_are_told_once() {
        let without = |number| AnswerFacts {
            without_logprobs: Some("none were sent".into()),
            ..good(number)
        };
        let stopped = said(watch(OnMissingLogprobs::Stop), without);
        check(stopped, &[(20, "stop: 20 answers in a row")]);
        let warned = said(watch(OnMissingLogprobs::Warn), without);
        check(warned, &[(20, "none were sent")]);
        // One in twenty is an accident.
        let now_and_then = |number| match number % 20 {
            0 => good(number),
            _ => without(number),
        };
        check(said(watch(OnMissingLogprobs::Stop), now_and_then), &[]);
        let mut plain = upstream();
        plain.sampling.top_logprobs = 0;
        let plain = AnswerMonitor::new(&plain, OnMissingLogprobs::Stop, true);
        check(said(plain, without), &[]);
    }

    #[test]
    fn answers_of_no_use_are_told_and_stop_the_run() {
        let empty = |number| AnswerFacts {
            status: Status::Quarantined,
            reason: "empty: stop".into(),
            text: (0, 0),
            ..good(number)
        };
        let said = said(watch(OnMissingLogprobs::Stop), empty);
        check(said, &[(20, "empty: stop"), (30, "stop: 30 answers")]);
    }

    #[test]
    fn what_is_odd_is_told_once() {
        let with = |number, change: &dyn Fn(&mut AnswerFacts)| {
            let mut seen = good(number);
            change(&mut seen);
            seen
        };
        let of = |change: &dyn Fn(&mut AnswerFacts)| {
            said(watch(OnMissingLogprobs::Stop), |number| {
                with(number, change)
            })
        };
        let past = of(&|seen| {
            if let Some(usage) = &mut seen.usage {
                usage.completion_tokens = 55;
            }
        });
        check(past, &[(1, "`max_completion_tokens` = 50")]);
        check(of(&|seen| seen.usage = None), &[(20, "without usage")]);
        check(of(&|seen| seen.is_cut_off = true), &[(20, "cut off at 50")]);
        check(of(&|seen| seen.text.0 = 7), &[(20, "the same answer")]);
        let other = of(&|seen| {
            if seen.prompt > 60 {
                seen.model = "n".into();
            }
        });
        check(other, &[(61, "\"n\"")]);
    }

    #[test]
    fn samples_that_are_all_the_same_are_told() {
        // Four answers to each prompt.
        let same = |number| good(number / 4);
        check(
            said(watch(OnMissingLogprobs::Stop), same),
            &[(37, "does not sample")],
        );
        let one_differs = |number| AnswerFacts {
            text: (
                if number == 3 {
                    9
                } else {
                    u64::from(number / 4)
                },
                100,
            ),
            ..good(number / 4)
        };
        check(said(watch(OnMissingLogprobs::Stop), one_differs), &[]);
        let mut greedy = upstream();
        greedy.sampling.temperature = Some(0.0);
        let greedy = AnswerMonitor::new(&greedy, OnMissingLogprobs::Stop, true);
        check(said(greedy, same), &[]);
    }
}
