//! Builds the cache record of an answer and decides whether it is quarantined. Pure.

use serde_json::Value;

use crate::budget::price;
use crate::client::request::RequestTemplate;
use crate::client::response::completion::Completion;
use crate::plan::PlannedRow;

use crate::cache::question;
use crate::cache::record::{Record, SCHEMA, Status, Timing, is_truncated};
use crate::prompt::Prompt;

/// Quarantine reason of a paid answer that cannot be parsed.
pub(crate) const UNREADABLE: &str = "unreadable";

/// Builds the record of `completion`, the answer to the request `body`.
pub(crate) fn record(
    template: &RequestTemplate,
    row: &PlannedRow,
    prompt: &Prompt,
    body: Value,
    completion: Completion,
    timing: Timing,
) -> Record {
    let reason = quarantine_reason(template, &completion);
    let mut extra = completion.extra;
    if let Some(fault) = completion.logprobs_fault {
        extra.insert("logprobs_dropped".into(), fault.into());
    }
    if let Some(problem) = completion.unreadable {
        extra.insert("unreadable".into(), problem.into());
    }
    let price = &template.endpoint.price;
    // The student wrote a scored text, so `max_tokens` of the request did not truncate it.
    let cut_at = if template.scoring.is_none() {
        question::cut_at(&body, &completion.answer.finish_reason)
    } else {
        0
    };
    Record {
        v: SCHEMA,
        key: match cut_at {
            0 => row.key.clone(),
            _ => question::truncated_key(&row.key, cut_at),
        },
        cut_at,
        prompt_id: prompt.id.clone(),
        sample: row.sample,
        status: if reason.is_empty() {
            Status::Ok
        } else {
            Status::Quarantined
        },
        reason,
        endpoint: crate::config::teacher::identity(&template.endpoint.teacher).into(),
        teacher: template.endpoint.teacher.name.clone(),
        probe: template.probe.clone(),
        request: body,
        answer: completion.answer,
        cost_usd: completion
            .usage
            .and_then(|usage| price::cost(&usage, price)),
        usage: completion.usage,
        model: completion.model,
        fingerprint: completion.fingerprint,
        logprobs: completion.logprobs,
        timing,
        extra,
    }
}

/// Returns the reason why training must not use the answer; empty if training may use it.
///
/// A truncated or filtered answer with text is quarantined only if it violates the schema: otherwise `[data]` decides
/// about it.
fn quarantine_reason(template: &RequestTemplate, completion: &Completion) -> String {
    let answer = &completion.answer;
    if completion.unreadable.is_some() {
        return UNREADABLE.into();
    }
    // The response contains both a text and an error: the text may be incomplete.
    if answer.finish_reason == "error" && !answer.text.is_empty() {
        return "cut off by an error".into();
    }
    // A scored text was written by the student, so white space alone is valid.
    if !answer.text.trim().is_empty() || template.scoring.is_some() && !answer.text.is_empty() {
        let structured = template.structured.as_ref();
        return structured
            .and_then(|structured| structured.violation(&answer.text))
            .unwrap_or_default();
    }
    if !answer.refusal.is_empty() {
        return "refusal".into();
    }
    match answer.finish_reason.as_str() {
        // Usually hidden reasoning that used up `sampling.max_tokens`.
        reason if is_truncated(reason) => "empty: length".into(),
        "" => "empty".into(),
        reason => format!("empty: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::record::Answer;
    use crate::cache::usage::Usage;
    use crate::config::{EndpointConfig, Price};
    use crate::report::answer_facts::AnswerFacts;
    use serde_json::json;

    fn row() -> (PlannedRow, Prompt) {
        let row = PlannedRow {
            prompt: 0,
            sample: 1,
            key: "k".into(),
            old_key: None,
            bytes: 9,
        };
        let prompt = Prompt::plain("p", Vec::new());
        (row, prompt)
    }

    fn build_record(completion: Completion, price: &Price) -> Record {
        let (row, prompt) = row();
        let upstream = EndpointConfig {
            price: price.clone(),
            teacher: Default::default(),
            sampling: Default::default(),
            limits: Default::default(),
        };
        let template = RequestTemplate::plain(upstream);
        let body = json!({"model": "m"});
        record(
            &template,
            &row,
            &prompt,
            body,
            completion,
            Timing::default(),
        )
    }

    #[test]
    fn text_with_error_is_quarantined() {
        let completion = Completion {
            answer: Answer {
                text: "half of".into(),
                finish_reason: "error".into(),
                ..Answer::default()
            },
            ..Completion::default()
        };
        let record = build_record(completion, &Price::default());
        assert_eq!(record.status, Status::Quarantined);
        assert_eq!(record.reason, "cut off by an error");
    }

    #[test]
    fn empty_answer_is_quarantined_with_reason() {
        let cases = [
            ("x", "", "length", ""),
            ("x", "", "content_filter", ""),
            (" \n\t\u{3000}", "", "stop", "empty: stop"),
            ("", "no", "stop", "refusal"),
            ("", "", "length", "empty: length"),
            ("", "", "max_tokens", "empty: length"),
            ("", "", "content_filter", "empty: content_filter"),
            ("", "", "", "empty"),
        ];
        for (text, refusal, finish_reason, expected) in cases {
            let completion = Completion {
                answer: Answer {
                    text: text.into(),
                    refusal: refusal.into(),
                    finish_reason: finish_reason.into(),
                    reasoning: String::new(),
                },
                ..Completion::default()
            };
            let record = build_record(completion, &Price::default());
            assert_eq!(record.reason, expected);
            assert_eq!(record.status == Status::Ok, expected.is_empty());
        }
    }

    #[test]
    fn every_name_of_the_token_limit_counts_as_cut_off() {
        for (finish_reason, expected) in [("length", true), ("max_tokens", true), ("stop", false)] {
            let completion = Completion {
                answer: Answer {
                    text: "x".into(),
                    finish_reason: finish_reason.into(),
                    ..Answer::default()
                },
                ..Completion::default()
            };
            let record = build_record(completion, &Price::default());
            let facts = AnswerFacts::new(record, None, 16);
            assert_eq!(facts.is_cut_off, expected, "{finish_reason}");
        }
    }

    #[test]
    fn record_has_cost_and_logprobs_fault() {
        let price = Price {
            input: Some(1.0),
            output: Some(2.0),
            ..Price::default()
        };
        let completion = Completion {
            usage: Some(Usage {
                prompt_tokens: 3,
                completion_tokens: 4,
                ..Usage::default()
            }),
            logprobs_fault: Some("broken".into()),
            ..Completion::default()
        };
        let record = build_record(completion, &price);
        assert_eq!(record.cost_usd, Some(11e-6));
        assert_eq!(record.extra["logprobs_dropped"], "broken");
        assert_eq!((record.prompt_id.as_str(), record.sample), ("p", 1));
    }
}
