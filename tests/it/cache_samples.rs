//! Sample records and cache files for the tests of the cache.

use distill::cache::line;
use distill::cache::question::Question;
use distill::cache::raw_token::RawToken;
use distill::cache::record::{Answer, Logprobs, Record, SCHEMA, Status, Timing};
use distill::cache::recovery::{BadLine, FileEnding, LineScan, ScanError};
use distill::cache::usage::Usage;
use serde_json::{Map, json};

/// Returns the sample record with this number. Every third record has logprobs, every seventh is quarantined, and every
/// fifth has no usage.
pub fn sample(number: u64) -> Record {
    let has_logprobs = number.is_multiple_of(3);
    let is_quarantined = number % 7 == 3;
    let endpoint = "https://api.example.com/v1";
    let request = json!({
        "model": "teacher-1",
        "messages": [{"role": "user", "content": format!("what is {number} + 1?")}],
        "temperature": 1.0,
    });
    Record {
        v: SCHEMA,
        key: Question::new(&request, 0).key(endpoint),
        cut_at: 0,
        teacher: String::new(),
        prompt_id: format!("row-{number}"),
        sample: 0,
        status: if is_quarantined {
            Status::Quarantined
        } else {
            Status::Ok
        },
        reason: if is_quarantined { "refusal" } else { "" }.to_owned(),
        endpoint: endpoint.to_owned(),
        probe: String::new(),
        request,
        answer: Answer {
            text: format!("{} \u{1f980}", number + 1),
            finish_reason: "stop".to_owned(),
            ..Answer::default()
        },
        usage: (number % 5 != 4).then_some(Usage {
            prompt_tokens: 12,
            completion_tokens: 3,
            ..Usage::default()
        }),
        model: "teacher-1-2026-05-13".to_owned(),
        fingerprint: String::new(),
        logprobs: has_logprobs.then(|| crab_logprobs(number)),
        timing: Timing {
            sent_at: "2026-11-22T02:13:45.123Z".to_owned(),
            latency_ms: 800 + number,
            attempts: 1,
        },
        cost_usd: Some(0.000_012_5),
        extra: Map::new(),
    }
}

/// Returns the logprobs of the answer `<number + 1> 🦀`. Its crab is split into two tokens that are not valid UTF-8.
fn crab_logprobs(number: u64) -> Logprobs {
    let raw = |position, rank, hex: &str| RawToken {
        position,
        rank,
        hex: hex.to_owned(),
    };
    let strings = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
    Logprobs {
        token: vec![(number + 1).to_string(), String::new(), String::new()],
        logprob: vec![Some(-0.003_184_5), Some(-1.25), None],
        top: vec![
            strings(&["7", " seven"]),
            strings(&["", "!"]),
            strings(&[""]),
        ],
        top_logprob: vec![
            vec![Some(-0.003_184_5), Some(-5.75)],
            vec![Some(-1.25), None],
            vec![None],
        ],
        raw: vec![
            raw(1, -1, "20f09fa6"),
            raw(1, 0, "20f09fa6"),
            raw(2, -1, "80"),
            raw(2, 0, "80"),
        ],
        matches_text: true,
    }
}

/// Encodes the records as lines.
pub fn encode(records: impl IntoIterator<Item = Record>) -> Vec<u8> {
    records
        .into_iter()
        .flat_map(|record| line::encode(&record).unwrap())
        .collect()
}

/// Returns the lines of the complete records in `file` up to the first damage, and the ending of the file or the
/// damage.
pub fn scan(file: &[u8]) -> (Vec<Vec<u8>>, Result<FileEnding, BadLine>) {
    let mut scan = LineScan::new(file);
    let mut lines = Vec::new();
    loop {
        match scan.advance() {
            Ok(true) => lines.push(scan.line().to_vec()),
            Ok(false) => return (lines, Ok(scan.ending())),
            Err(ScanError::Bad(bad)) => return (lines, Err(bad)),
            Err(ScanError::Read(error)) => panic!("{error}"),
        }
    }
}
