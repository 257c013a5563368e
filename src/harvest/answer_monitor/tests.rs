use crate::cache::usage::Usage;
use crate::config::EndpointConfig;
use crate::harvest::answer_monitor::*;

fn upstream() -> EndpointConfig {
    EndpointConfig {
        teacher: Default::default(),
        sampling: Default::default(),
        limits: Default::default(),
        price: Default::default(),
    }
}

fn monitor(on_missing: OnMissingLogprobs) -> AnswerMonitor {
    AnswerMonitor::new(&upstream(), on_missing, true)
}

/// Returns a usable answer to the prompt with this number.
fn good(prompt: u32) -> AnswerFacts {
    AnswerFacts {
        prompt: prompt.into(),
        status: Status::Ok,
        reason: String::new(),
        is_cut_off: false,
        finish_reason: "stop".into(),
        model: "m".into(),
        text_hash: prompt.into(),
        text_bytes: 100,
        without_logprobs: None,
        has_token_ids: false,
        usage: Some(Usage {
            prompt_tokens: 5,
            completion_tokens: 10,
            ..Usage::default()
        }),
        max_tokens: 50,
        is_mock: false,
    }
}

/// Returns the alerts and the numbers of the answers that raised them.
fn alerts_of(mut monitor: AnswerMonitor, facts: impl Fn(u32) -> AnswerFacts) -> Vec<(u32, String)> {
    let mut alerts = Vec::new();
    for number in 1..=100 {
        for alert in monitor.check(&facts(number)) {
            alerts.push((
                number,
                match alert {
                    MonitorAlert::Note(text) => text,
                    MonitorAlert::Stop(error) => format!("stop: {error:#}"),
                },
            ));
        }
    }
    alerts
}

#[track_caller]
fn check(alerts: Vec<(u32, String)>, expected: &[(u32, &str)]) {
    assert_eq!(alerts.len(), expected.len(), "{alerts:?}");
    for ((number, text), (expected, part)) in alerts.iter().zip(expected) {
        assert_eq!(number, expected, "{text}");
        assert!(text.contains(part), "{part} is not in: {text}");
    }
}

#[test]
fn token_ids_are_noted_once_if_teacher_tokenizer_is_unset() {
    let facts = AnswerFacts {
        has_token_ids: true,
        ..good(0)
    };
    let notes = |teacher_tokenizer: Option<&str>| {
        let mut config = crate::config::Config::default();
        config.teacher.model = "m".into();
        config.data.teacher_tokenizer = teacher_tokenizer.map(Into::into);
        let mut monitor =
            AnswerMonitor::from_settings(&upstream(), &RunSettings::new(&config).unwrap());
        assert!(monitor.check(&good(0)).is_empty());
        monitor.check(&facts).len() + monitor.check(&facts).len()
    };
    assert_eq!((notes(None), notes(Some("teacher"))), (1, 0));
}

#[test]
fn good_answers_raise_no_alert() {
    check(alerts_of(monitor(OnMissingLogprobs::Stop), good), &[]);
}

#[test]
fn missing_logprobs_stop_the_run_or_are_noted_once() {
    let without = |number| AnswerFacts {
        without_logprobs: Some("none were sent".into()),
        ..good(number)
    };
    let stopped = alerts_of(monitor(OnMissingLogprobs::Stop), without);
    check(stopped, &[(20, "stop: 20 answers in a row")]);
    let warned = alerts_of(monitor(OnMissingLogprobs::Warn), without);
    check(warned, &[(20, "none were sent")]);
    // A good answer resets the count.
    let every_twentieth_is_good = |number| match number % 20 {
        0 => good(number),
        _ => without(number),
    };
    check(
        alerts_of(monitor(OnMissingLogprobs::Stop), every_twentieth_is_good),
        &[],
    );
    let mut plain = upstream();
    plain.sampling.top_logprobs = 0;
    let plain = AnswerMonitor::new(&plain, OnMissingLogprobs::Stop, true);
    check(alerts_of(plain, without), &[]);
}

#[test]
fn unusable_answers_are_noted_and_stop_the_run() {
    let empty = |number| AnswerFacts {
        status: Status::Quarantined,
        reason: "empty: stop".into(),
        text_hash: 0,
        text_bytes: 0,
        ..good(number)
    };
    let alerts = alerts_of(monitor(OnMissingLogprobs::Stop), empty);
    check(alerts, &[(20, "empty: stop"), (30, "stop: 30 answers")]);
}

#[test]
fn finish_reason_that_training_leaves_out_is_noted() {
    let mut config = crate::config::Config::default();
    config.teacher.model = "m".into();
    let settings = RunSettings::new(&config).unwrap();
    for (finish_reason, expected) in [("stop", &[][..]), ("", &[(20, "finish reason ``")])] {
        let monitor = AnswerMonitor::from_settings(&upstream(), &settings);
        let facts = |number| AnswerFacts {
            finish_reason: finish_reason.into(),
            ..good(number)
        };
        check(alerts_of(monitor, facts), expected);
    }
}

#[test]
fn suspicious_answers_are_noted_once() {
    let with = |number, change: &dyn Fn(&mut AnswerFacts)| {
        let mut facts = good(number);
        change(&mut facts);
        facts
    };
    let alerts_with = |change: &dyn Fn(&mut AnswerFacts)| {
        alerts_of(monitor(OnMissingLogprobs::Stop), |number| {
            with(number, change)
        })
    };
    let long = alerts_with(&|facts| {
        if let Some(usage) = &mut facts.usage {
            usage.completion_tokens = 55;
        }
    });
    check(long, &[(1, "`max_completion_tokens` = 50")]);
    check(
        alerts_with(&|facts| facts.usage = None),
        &[(20, "no plausible usage")],
    );
    check(
        alerts_with(&|facts| facts.is_cut_off = true),
        &[(20, "cut off at 50")],
    );
    check(
        alerts_with(&|facts| facts.text_hash = 7),
        &[(20, "the same answer")],
    );
    let other = alerts_with(&|facts| {
        if facts.prompt > 60 {
            facts.model = "n".into();
        }
    });
    check(other, &[(61, "\"n\"")]);
}

#[test]
fn identical_samples_are_noted() {
    // Four answers to each prompt.
    let same = |number| good(number / 4);
    check(
        alerts_of(monitor(OnMissingLogprobs::Stop), same),
        &[(37, "does not sample")],
    );
    let one_differs = |number| AnswerFacts {
        text_hash: if number == 3 {
            9
        } else {
            u64::from(number / 4)
        },
        ..good(number / 4)
    };
    check(
        alerts_of(monitor(OnMissingLogprobs::Stop), one_differs),
        &[],
    );
    let mut greedy = upstream();
    greedy.sampling.temperature = Some(0.0);
    let greedy = AnswerMonitor::new(&greedy, OnMissingLogprobs::Stop, true);
    check(alerts_of(greedy, same), &[]);
}
