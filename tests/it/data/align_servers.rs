//! Logprobs in the forms that servers return.

use distill::data::align::Mapper;

use super::align::{Alternative, Row, align, logprobs, soft_labels};
use super::tokenizer;

/// The emitted token may be listed after the top-k, in place of one of them, or not at all.
#[test]
fn top_k_is_decided_by_rank() {
    let tokenizer = tokenizer("bytelevel");
    let ids = tokenizer.encode_text("T").unwrap();
    let best = [("a", Some(-0.5)), ("b", Some(-2.5))];
    let emitted = ("T", Some(-4.0));
    let of = |top: &[Alternative], asked: usize| {
        let teacher = logprobs(&[("T", -4.0, top)]);
        let aligned = Mapper::new(&tokenizer, None)
            .align(&(&teacher).into(), b"T", 0..1, &ids, Some(asked))
            .unwrap();
        (
            aligned.drawn(0),
            soft_labels(&aligned)[0].clone().unwrap().ids.len(),
        )
    };
    assert_eq!(of(&best, 2), (Some(-4.0), 2), "not listed");
    assert_eq!(
        of(&[best[0], best[1], emitted], 2),
        (Some(-4.0), 2),
        "appended"
    );
    assert_eq!(
        of(&[emitted, best[0], best[1]], 3),
        (Some(-4.0), 2),
        "first, in place of the third"
    );
    assert_eq!(
        of(&[emitted, best[0], best[1]], 2),
        (Some(-4.0), 2),
        "first, as one more"
    );
    assert_eq!(
        of(&[best[0], best[1], emitted], 3),
        (None, 3),
        "one of the best"
    );
    assert_eq!(
        of(&[best[0], best[1], emitted, emitted], 3),
        (None, 3),
        "twice"
    );
    let better = ("T", Some(-2.0));
    assert_eq!(
        of(&[better, best[0], best[1]], 3),
        (None, 3),
        "first, and one of the best"
    );
}

#[test]
fn raw_vocabulary_entries_are_decoded() {
    let tokenizer = tokenizer("bytelevel");
    let answer = "The ü\n";
    let ids = tokenizer.encode_text(answer).unwrap();
    for (pieces, one) in [
        (["The", "ĠÃ¼", "Ċ"], "ĠThe"),
        (["The", "▁ü", "<0x0A>"], "▁The"),
    ] {
        let rows: Vec<Row> = pieces.iter().map(|piece| (*piece, -1.0, &[][..])).collect();
        let mut teacher = logprobs(&rows);
        teacher.top[0] = vec!["The".into(), one.into()];
        teacher.top_logprob[0] = vec![Some(-1.0), Some(-2.0)];
        let aligned = align(&tokenizer, &teacher, answer, &ids).unwrap();
        let first = soft_labels(&aligned)[0].clone().unwrap();
        let expected = [
            ids[0],
            tokenizer
                .id_of_bytes(b" The")
                .unwrap_or(tokenizer.first_id_of(b" The").unwrap()),
        ];
        assert_eq!(first.ids, expected, "{pieces:?}");
    }
}

/// With thinking, white space or a stop string around it.
#[test]
fn answer_is_aligned_within_longer_logprobs() {
    let tokenizer = tokenizer("bytelevel");
    let answer = "The capital";
    let ids = tokenizer.encode_text(answer).unwrap();
    let said: Vec<String> = ids
        .iter()
        .map(|id| String::from_utf8(tokenizer.token_bytes(*id).unwrap().into()).unwrap())
        .collect();
    let said: Vec<&str> = said.iter().map(String::as_str).collect();
    for (before, behind) in [
        (
            vec!["<think>", "Hm", "</think>", "\n\n"],
            vec!["<|im_end|>"],
        ),
        (vec!["\n"], vec![" ", "\n"]),
        (vec![], vec!["STOP"]),
    ] {
        let all = [&before[..], &said, &behind].concat();
        let rows: Vec<Row> = all.iter().map(|token| (*token, -1.0, &[][..])).collect();
        let teacher = logprobs(&rows);
        let aligned = align(&tokenizer, &teacher, answer, &ids).unwrap();
        assert!((0..ids.len()).all(|at| aligned.is_soft(at)), "{all:?}");
    }
}
