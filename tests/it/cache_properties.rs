//! Property tests: any record round-trips through its line, and bytes after the records do not change what is read.

use distill::cache::line;
use distill::cache::raw_token::RawToken;
use distill::cache::record::{Answer, Logprobs, Record, Timing};
use distill::cache::recovery::FileEnding;
use distill::cache::usage::Usage;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::cache_samples::{encode, sample, scan};
use crate::nightly;

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        proptest::num::f64::NORMAL.prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(any::<String>(), inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

fn any_request() -> impl Strategy<Value = Value> {
    let messages =
        prop::collection::vec((any::<String>(), any::<String>()), 0..3).prop_map(|messages| {
            messages
                .iter()
                .map(|(role, content)| json!({"role": role, "content": content}))
                .collect::<Value>()
        });
    let messages = prop_oneof![messages, json_value()];
    let model = prop_oneof![any::<String>().prop_map(Value::from), json_value()];
    let body = (model, messages, json_value()).prop_map(
        |(model, messages, other)| json!({"model": model, "messages": messages, "other": other}),
    );
    prop_oneof![body, json_value()]
}

fn any_logprobs() -> impl Strategy<Value = Logprobs> {
    let logprob = || prop::option::of(proptest::num::f32::NORMAL | proptest::num::f32::ZERO);
    let token = (any::<String>(), logprob());
    let position = (token.clone(), prop::collection::vec(token, 0..4));
    let raw =
        (any::<u32>(), any::<i32>(), "[0-9a-f]{0,8}").prop_map(|(position, rank, hex)| RawToken {
            position,
            rank,
            hex,
        });
    let raw = prop::collection::vec(raw, 0..3);
    (prop::collection::vec(position, 0..6), raw, any::<bool>()).prop_map(
        |(positions, raw, matches_text)| {
            let mut logprobs = Logprobs {
                raw,
                matches_text,
                ..Logprobs::default()
            };
            for ((token, logprob), alternatives) in positions {
                let (top, top_logprob) = alternatives.into_iter().unzip();
                logprobs.token.push(token);
                logprobs.logprob.push(logprob);
                logprobs.top.push(top);
                logprobs.top_logprob.push(top_logprob);
            }
            logprobs
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if nightly() { 50_000 } else { 1_000 }))]

    #[test]
    fn any_record_round_trips_through_its_line(
        texts in prop::array::uniform8(any::<String>()),
        request in any_request(),
        extra in prop::collection::hash_map(any::<String>(), json_value(), 0..4),
        logprobs in prop::option::of(any_logprobs()),
        usage in prop::option::of((1u64.., any::<u64>(), any::<u64>(), any::<u64>())),
        cost_usd in prop::option::of(proptest::num::f64::POSITIVE | proptest::num::f64::NORMAL),
        latency_ms in any::<u64>(),
    ) {
        let [key, prompt_id, reason, text, finish_reason, refusal, model, sent_at] = texts;
        let record = Record {
            key, prompt_id, reason, request, logprobs, cost_usd, model,
            answer: Answer { text, finish_reason, refusal, reasoning: String::new() },
            usage: usage.map(|(prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens)| {
                Usage { prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens }
            }),
            timing: Timing { sent_at, latency_ms, attempts: 2 },
            extra: extra.into_iter().collect(),
            ..sample(1)
        };
        let file = encode([record.clone(), sample(2)]);
        let (lines, ending) = scan(&file);
        prop_assert_eq!(ending, Ok(FileEnding::Clean));
        prop_assert_eq!(lines.len(), 2);
        line::verify(&lines[0]).unwrap();
        prop_assert_eq!(line::head(&lines[0]).unwrap().key, record.key.clone());
        prop_assert_eq!(line::decode(&lines[0]).unwrap(), record);
    }

    /// A crash may leave part of a line, NUL bytes or garbage after the complete records.
    #[test]
    fn incomplete_tail_does_not_change_the_records_read(
        records in 0u64..5,
        nuls in 0usize..300,
        cut in 0usize..2000,
        garbage in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut file = encode((0..records).map(sample));
        let next = encode([sample(records)]);
        file.extend_from_slice(&next[..cut.min(next.len() - 2)]);
        file.extend(std::iter::repeat_n(0, nuls));
        file.extend(garbage);
        let (lines, _) = scan(&file);
        let expected = encode((0..records).map(sample));
        let scanned: Vec<u8> = lines.iter().flat_map(|line| [&line[..], b"\n"].concat()).collect();
        prop_assert_eq!(scanned, expected);
    }
}
