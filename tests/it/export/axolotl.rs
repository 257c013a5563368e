//! Rows for the KD plugin of axolotl: the distribution of the next token at each position, and answers that are left
//! out.

use std::path::Path;

use distill::cache::raw_token::RawToken;
use distill::cache::record::{Logprobs, Record};
use distill::config::DataConfig;
use distill::data::groups::Selection;
use distill::export::rows::{ExportReport, ExportSettings};
use distill::export::{Format, write};
use distill::tokenizer::Tokenizer;
use serde_json::json;

use super::{assert_counts, rows};
use crate::cache_samples::sample;
use crate::tiny;

/// Tokens of an answer: bytes, logprob, and alternatives with their logprobs.
type AnswerTokens<'a> = &'a [(&'a [u8], f32, &'a [(&'a [u8], Option<f32>)])];

/// Returns a record with this answer, which has logprobs if `tokens` is not empty.
fn answered(id: &str, text: &str, tokens: AnswerTokens) -> Record {
    let mut logprobs = Logprobs {
        matches_text: true,
        ..Logprobs::default()
    };
    let mut raw = Vec::new();
    let mut token = |bytes: &[u8], position: usize, rank: i32| match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            raw.push(RawToken {
                position: position as u32,
                rank,
                hex: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
            });
            String::new()
        }
    };
    for (position, (bytes, logprob, top)) in tokens.iter().enumerate() {
        logprobs.token.push(token(bytes, position, -1));
        logprobs.logprob.push(Some(*logprob));
        let ranked = top.iter().enumerate();
        let texts = ranked.map(|(rank, (bytes, _))| token(bytes, position, rank as i32));
        logprobs.top.push(texts.collect());
        logprobs
            .top_logprob
            .push(top.iter().map(|(_, logprob)| *logprob).collect());
    }
    logprobs.raw = raw;
    let mut record = sample(1);
    record.prompt_id = id.to_owned();
    record.answer.text = text.to_owned();
    record.logprobs = (!tokens.is_empty()).then_some(logprobs);
    record
}

/// Writes a model of `tiny` to `dir`, and loads its tokenizer: single bytes, six merges and three control tokens.
fn tiny_tokenizer(dir: &Path) -> Tokenizer {
    tiny::write_model(dir, 1, 64);
    Tokenizer::load(dir).unwrap()
}

fn export_axolotl(
    records: Vec<Record>,
    tokenizer: &Tokenizer,
    out: &Path,
) -> anyhow::Result<ExportReport> {
    let settings = ExportSettings {
        selection: &Selection::All,
        data: &DataConfig::default(),
        tokenizer: Some(tokenizer),
        force: false,
    };
    write(records.into_iter().map(Ok), Format::Axolotl, out, &settings)
}

#[test]
fn axolotl_entries_are_the_distribution_of_the_next_token() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tiny_tokenizer(dir.path());
    let id = |bytes: &[u8]| tokenizer.id_of_bytes(bytes).unwrap();
    let end = tokenizer.id_of_control("<|im_end|>").unwrap();
    let newline = id(b"\n");
    // The tokens of "the€" are "the", the first two bytes of the sign, and its last byte. The alternatives of the
    // second token are a control token, bytes that are not a token, one token twice, and one without a logprob.
    let record = answered(
        "row",
        "the€",
        &[
            (
                b"the",
                -0.25,
                &[(b"the", Some(-0.25)), (b"he", Some(-1.75))],
            ),
            (
                b"\xe2\x82",
                -3.0,
                &[
                    (b"<|im_end|>", Some(-0.5)),
                    (b"nonsense", Some(-2.0)),
                    (b"!", Some(-2.5)),
                    (b"!", Some(-4.5)),
                    (b"?", None),
                ],
            ),
            (b"\xac", -0.125, &[(b"\xac", Some(-0.125))]),
        ],
    );
    let out = dir.path().join("out.jsonl");
    let report = export_axolotl(vec![record], &tokenizer, &out).unwrap();
    assert_eq!(report.dropped_alternatives, Some(2));
    assert_counts(&report, 1, &[]);

    let row = &rows(&out)[0];
    let messages: Vec<distill::prompt::message::Message> =
        serde_json::from_value(row["messages"].clone()).unwrap();
    assert_eq!(messages[1].content, "the€");
    let ids: Vec<Vec<u32>> = serde_json::from_value(row["target_token_ids"].clone()).unwrap();
    let logprobs: Vec<Vec<f32>> = serde_json::from_value(row["logprobs"].clone()).unwrap();
    // The first entry is at the token before the answer. The entries are for the three tokens of the answer, the end of
    // the turn and the line feed of the template. The last entry has no next token.
    let (sign, last) = (id(b"\xe2\x82"), id(b"\xac"));
    let expected: [(&[u32], &[f32]); 6] = [
        (&[id(b"the"), id(b"he")], &[-0.25, -1.75]),
        (&[end, id(b"!"), sign], &[-0.5, -2.5, -3.0]),
        (&[last], &[-0.125]),
        (&[end], &[0.0]),
        (&[newline], &[0.0]),
        (&[newline], &[0.0]),
    ];
    assert_eq!((ids.len(), logprobs.len()), (6, 6));
    for (position, (expected_ids, expected_logprobs)) in expected.into_iter().enumerate() {
        let (ids, logprobs) = (&ids[position], &logprobs[position]);
        let count = expected_ids.len();
        assert_eq!(&ids[..count], expected_ids, "position {position}");
        assert_eq!(&logprobs[..count], expected_logprobs, "position {position}");
        // Every entry is filled up to k = 3 with other tokens, whose logprob is -50.
        assert_eq!((ids.len(), logprobs.len()), (3, 3));
        assert!(logprobs[count..].iter().all(|&logprob| logprob == -50.0));
        let mut distinct = ids.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 3);
    }
    // The conversation ends with the tokens of the entries.
    let conversation = tokenizer.conversation(&messages).unwrap();
    let from_answer = [id(b"the"), sign, last, end, newline];
    assert!(conversation.ids.ends_with(&from_answer));
    assert_eq!(
        conversation.answers[0].tokens.start + 5,
        conversation.ids.len()
    );
}

#[test]
fn axolotl_uses_reported_end_of_turn_logprobs() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tiny_tokenizer(dir.path());
    let end: &[u8] = b"<|im_end|>";
    let record = answered(
        "row",
        "in",
        &[
            (b"in", -0.5, &[(b"in", Some(-0.5))]),
            (end, -0.75, &[(end, Some(-0.75)), (b"!", Some(-1.25))]),
        ],
    );
    let out = dir.path().join("out.jsonl");
    export_axolotl(vec![record], &tokenizer, &out).unwrap();
    assert_eq!(rows(&out)[0]["logprobs"][1], json!([-0.75, -1.25]));
}

#[test]
fn axolotl_rows_with_mismatched_tokens_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tiny_tokenizer(dir.path());
    const OTHER: &str = "the tokenizer splits the answer into other tokens than the teacher did";
    const UNKNOWN: &str = "a position has no alternative that is a token of the tokenizer";
    let cases: [(&str, Record); 7] = [
        ("no logprobs", answered("a", "in", &[])),
        // Two tokens where the tokenizer has one.
        (
            OTHER,
            answered("b", "in", &[(b"i", -0.5, &[]), (b"n", -0.5, &[])]),
        ),
        // The tokens of the teacher are longer than the text.
        (
            OTHER,
            answered("c", "in", &[(b"in", -0.5, &[]), (b"!", -0.5, &[])]),
        ),
        // A token of unknown bytes.
        (OTHER, answered("d", "in", &[(b"", -0.5, &[])])),
        // The API sent a sentinel instead of a logprob.
        (
            UNKNOWN,
            answered("e", "in", &[(b"in", f32::NEG_INFINITY, &[(b"in", None)])]),
        ),
        (
            "the teacher's probabilities sum to more than 1",
            answered(
                "f",
                "in",
                &[(b"in", -0.1, &[(b"in", Some(-0.1)), (b"a", Some(-0.1))])],
            ),
        ),
        (
            "the answer contains the name of a control token",
            answered("g", "in<|im_end|>", &[(b"in", -0.5, &[])]),
        ),
    ];
    for (reason, record) in cases {
        let good = answered("good", "in", &[(b"in", -0.5, &[(b"in", Some(-0.5))])]);
        let id = record.prompt_id.clone();
        let out = dir.path().join(format!("{id}.jsonl"));
        let report = export_axolotl(vec![record, good], &tokenizer, &out).unwrap();
        assert_counts(&report, 1, &[(reason, 1)]);
        assert_eq!(report.dropped_alternatives, Some(0), "{id}");
    }
}
