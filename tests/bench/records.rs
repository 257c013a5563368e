//! Records like those of a real run, for the benchmarks.

use distill::cache::record::{Answer, Logprobs, Record, SCHEMA, Status, Timing};
use distill::cache::usage::Usage;
use serde_json::{Map, json};

/// Returns the record with number `n`. `tokens` is the reported number of tokens of `answer`.
pub fn record(
    n: u64,
    question: String,
    answer: String,
    tokens: u64,
    logprobs: Option<Logprobs>,
) -> Record {
    Record {
        v: SCHEMA,
        key: blake3::hash(&n.to_le_bytes()).to_hex().to_string(),
        cut_at: 0,
        teacher: String::new(),
        prompt_id: format!("prompt-{n:07}"),
        sample: 0,
        status: Status::Ok,
        reason: String::new(),
        endpoint: "https://api.example.com/v1".to_owned(),
        probe: String::new(),
        request: json!({
            "model": "teacher-1",
            "messages": [{"role": "user", "content": question}],
            "max_completion_tokens": 512, "temperature": 1.0,
        }),
        answer: Answer {
            text: answer,
            finish_reason: "stop".to_owned(),
            ..Answer::default()
        },
        usage: Some(Usage {
            prompt_tokens: 60,
            completion_tokens: tokens,
            ..Usage::default()
        }),
        model: "teacher-1-2026-05-13".to_owned(),
        fingerprint: "fp_44709d6fcb".to_owned(),
        logprobs,
        timing: Timing {
            sent_at: "2026-11-22T02:13:45.123Z".to_owned(),
            latency_ms: 300 + n * 7 % 2700,
            attempts: 1,
        },
        cost_usd: Some(0.000_012_5),
        extra: Map::new(),
    }
}
