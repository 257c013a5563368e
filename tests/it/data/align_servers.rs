//! Logprobs in the forms that servers return.

use distill::cache::record::Logprobs;
use distill::data::align::{Mapper, Mismatch};

use super::align::{Alternative, Row, align, logprobs, soft_labels};
use super::tokenizer;

/// Servers list the emitted token after the top-k, before them, or not at all.
#[test]
fn top_k_membership_follows_the_rank() {
    let tokenizer = tokenizer("bytelevel");
    let ids = tokenizer.encode_text("T").unwrap();
    let best = [("a", Some(-0.5)), ("b", Some(-2.5))];
    let emitted = ("T", Some(-4.0));
    // Returns the logprob of the emitted token, if it is outside the top-k, and the number of soft labels.
    let align_with = |top: &[Alternative], top_logprobs: usize| {
        let teacher = logprobs(&[("T", -4.0, top)]);
        let aligned = Mapper::new(&tokenizer, None)
            .align(
                &(&teacher).into(),
                b"T",
                0..1,
                ids[..].into(),
                Some(top_logprobs),
            )
            .unwrap();
        (
            aligned.sampled_logprob(0),
            soft_labels(&aligned)[0].clone().unwrap().ids.len(),
        )
    };
    assert_eq!(align_with(&best, 2), (Some(-4.0), 2), "not listed");
    assert_eq!(
        align_with(&[best[0], best[1], emitted], 2),
        (Some(-4.0), 2),
        "appended"
    );
    assert_eq!(
        align_with(&[emitted, best[0], best[1]], 2),
        (Some(-4.0), 2),
        "listed first"
    );
    assert_eq!(
        align_with(&[best[0], best[1], emitted], 3),
        (None, 3),
        "one of the best"
    );
    assert_eq!(
        align_with(&[best[0], best[1], emitted, emitted], 3),
        (None, 3),
        "twice"
    );
    let better = ("T", Some(-2.0));
    assert_eq!(
        align_with(&[better, best[0], best[1]], 3),
        (None, 3),
        "first, and one of the best"
    );
}

/// The emitted tokens do not show whether tokens are vocabulary entries (`Ġa` for " a"), but an alternative does.
#[test]
fn raw_alternatives_of_plain_tokens_are_decoded() {
    let tokenizer = tokenizer("bytelevel");
    let ids = tokenizer.encode_text("T").unwrap();
    let teacher = logprobs(&[("T", -1.0, &[("T", Some(-1.0)), ("Ġa", Some(-2.0))])]);
    let aligned = align(&tokenizer, &teacher, "T", &ids).unwrap();
    let a_with_space = tokenizer.encode_text(" a").unwrap()[0];
    assert_eq!(
        soft_labels(&aligned)[0].clone().unwrap().ids,
        [ids[0], a_with_space]
    );
    // A space in an alternative shows that the tokens are text.
    let mixed = [("T", Some(-1.0)), ("Ġa", Some(-2.0)), (" a", Some(-3.0))];
    let aligned = align(&tokenizer, &logprobs(&[("T", -1.0, &mixed)]), "T", &ids).unwrap();
    let first = soft_labels(&aligned)[0].clone().unwrap();
    assert_eq!(first.ids[1], tokenizer.encode_text("Ġ").unwrap()[0]);
}

#[test]
fn raw_vocabulary_entries_are_decoded() {
    let tokenizer = tokenizer("bytelevel");
    let answer = "The ü\n";
    let ids = tokenizer.encode_text(answer).unwrap();
    for (pieces, alternative) in [
        (["The", "ĠÃ¼", "Ċ"], "ĠThe"),
        (["The", "▁ü", "<0x0A>"], "▁The"),
    ] {
        let rows: Vec<Row> = pieces.iter().map(|piece| (*piece, -1.0, &[][..])).collect();
        let mut teacher = logprobs(&rows);
        teacher.top[0] = vec!["The".into(), alternative.into()];
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

/// In DeepSeek's logprobs, control tokens contain `▁`. Answers may contain no space.
#[test]
fn byte_level_vocabulary_is_detected_beside_metaspace_control_tokens() {
    let tokenizer = tokenizer("bytelevel");
    let answer = "ü\n";
    let ids = tokenizer.encode_text(answer).unwrap();
    for pieces in [
        vec!["Ã¼", "Ċ", "<｜end▁of▁sentence｜>"],
        vec!["<｜begin▁of▁sentence｜>", "Ã¼Ċ"],
    ] {
        let rows: Vec<Row> = pieces.iter().map(|piece| (*piece, -1.0, &[][..])).collect();
        let aligned = align(&tokenizer, &logprobs(&rows), answer, &ids);
        assert!(aligned.is_ok(), "{pieces:?}: {:?}", aligned.err());
    }
    // Without a line feed, no token of the text contains a `Ċ` or `Ġ`.
    let rows: Vec<Row> = ["Ã¼", "<｜end▁of▁sentence｜>"]
        .iter()
        .map(|piece| (*piece, -1.0, &[][..]))
        .collect();
    let ids = tokenizer.encode_text("ü").unwrap();
    assert!(align(&tokenizer, &logprobs(&rows), "ü", &ids).is_ok());
}

/// The logprobs also cover thinking, white space or a stop string around the answer.
#[test]
fn answer_is_aligned_inside_longer_logprobs() {
    let tokenizer = tokenizer("bytelevel");
    let answer = "The capital";
    let ids = tokenizer.encode_text(answer).unwrap();
    let tokens: Vec<String> = ids
        .iter()
        .map(|id| String::from_utf8(tokenizer.token_bytes(*id).unwrap().into()).unwrap())
        .collect();
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    for (before, after) in [
        (
            vec!["<think>", "Hm", "</think>", "\n\n"],
            vec!["<|im_end|>"],
        ),
        (vec!["\n"], vec![" ", "\n"]),
        (vec![], vec!["STOP"]),
    ] {
        let emitted = [&before[..], &tokens, &after].concat();
        let rows: Vec<Row> = emitted
            .iter()
            .map(|token| (*token, -1.0, &[][..]))
            .collect();
        let teacher = logprobs(&rows);
        let aligned = align(&tokenizer, &teacher, answer, &ids).unwrap();
        assert!((0..ids.len()).all(|at| aligned.is_soft(at)), "{emitted:?}");
    }
}

/// As with `return_tokens_as_token_ids` of vLLM, with another tokenizer than the student's.
#[test]
fn token_ids_are_decoded_with_the_teacher_tokenizer() {
    let student = tokenizer("bytelevel");
    let teacher = tokenizer("sentencepiece");
    let answer = "The capital of France is Paris.";
    let ids = student.encode_text(answer).unwrap();
    let emitted = teacher.encode_text(answer).unwrap();
    let other = teacher.encode_text("Lyon").unwrap()[0];
    let id_name = |id: u32| format!("token_id:{id}");
    let text = |id: u32| String::from_utf8(teacher.token_bytes(id).unwrap().to_vec()).unwrap();
    let logprobs_named_by = |name: &dyn Fn(u32) -> String| {
        let names: Vec<_> = emitted.iter().map(|id| name(*id)).collect();
        let other = name(other);
        let top: Vec<_> = names
            .iter()
            .map(|name| [(name.as_str(), Some(-0.5)), (other.as_str(), Some(-1.5))])
            .collect();
        let rows: Vec<Row> = names
            .iter()
            .zip(&top)
            .map(|(name, top)| (name.as_str(), -0.5, &top[..]))
            .collect();
        logprobs(&rows)
    };
    let by_id = logprobs_named_by(&id_name);
    let align = |teacher_tokenizer, logprobs: &Logprobs| {
        let mut mapper = Mapper::new(&student, None).with_teacher(teacher_tokenizer);
        let range = 0..answer.len();
        mapper.align(
            &logprobs.into(),
            answer.as_bytes(),
            range,
            ids[..].into(),
            Some(2),
        )
    };
    let aligned = align(Some(&teacher), &by_id).unwrap();
    assert!((0..aligned.len()).any(|at| aligned.is_soft(at)));
    let expected = align(None, &logprobs_named_by(&text)).unwrap();
    assert_eq!(soft_labels(&aligned), soft_labels(&expected));
    let error = align(None, &by_id).unwrap_err();
    assert_eq!(error, Mismatch::TokenIds);
    // Ids that the configured tokenizer does not have.
    let unknown = logprobs_named_by(&|id| id_name(id + 1_000_000));
    let error = align(Some(&teacher), &unknown).unwrap_err();
    assert_eq!(error, Mismatch::Teacher);
}

/// vLLM lists the end-of-turn token after the tokens of the text, and as an alternative at other positions.
#[test]
fn listed_end_of_turn_token_has_soft_labels() {
    let tokenizer = tokenizer("bytelevel");
    let end = tokenizer.end_of_turn().unwrap();
    let mut ids = tokenizer.encode_text("T").unwrap();
    ids.push(end);
    let other = tokenizer.encode_text("a").unwrap()[0];
    let align_with_end = |name: &str, is_listed: bool| {
        let text = ("T", -0.1, &[("T", Some(-0.1)), (name, Some(-3.0))][..]);
        let last = (name, -0.5, &[(name, Some(-0.5)), ("a", Some(-1.0))][..]);
        let rows = [text, last];
        let teacher = logprobs(&rows[..1 + usize::from(is_listed)]);
        align(&tokenizer, &teacher, "T", &ids).unwrap()
    };
    // The name of the token in the student's tokenizer, and names in other tokenizers.
    for name in ["<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>"] {
        let aligned = align_with_end(name, true);
        assert_eq!(aligned.len(), 2);
        assert_eq!(aligned.soft(0), (&[ids[0], end][..], &[-0.1, -3.0][..]));
        assert_eq!(aligned.soft(1), (&[end, other][..], &[-0.5, -1.0][..]));
        let aligned = align_with_end(name, false);
        assert_eq!((aligned.len(), aligned.is_soft(1)), (2, false));
    }
    // Neither a control token that does not end turns nor a token without a name counts as the end of the turn.
    for name in ["<|im_start|>", ""] {
        assert!(!align_with_end(name, true).is_soft(1), "{name:?}");
    }
    let aligned = align_with_end("<|im_start|>", false);
    let start = tokenizer.id_of_control("<|im_start|>").unwrap();
    assert_eq!(aligned.soft(0).0, [ids[0], start]);
}

/// The names of control tokens contain `▁`, and the tokens of the text contain no space.
#[test]
fn control_token_names_are_not_taken_for_a_raw_vocabulary() {
    let tokenizer = tokenizer("bytelevel");
    let end = tokenizer.end_of_turn().unwrap();
    let name = "<｜end▁of▁sentence｜>";
    let ids = [tokenizer.encode_text("T").unwrap()[0], end];
    let top = [("T", Some(-0.1)), (name, Some(-3.0))];
    let teacher = logprobs(&[("T", -0.1, &top), (name, -0.2, &[(name, Some(-0.2))])]);
    let aligned = align(&tokenizer, &teacher, "T", &ids).unwrap();
    assert_eq!(aligned.soft(0).0, ids);
    assert_eq!(aligned.soft(1), (&[end][..], &[-0.2][..]));
}

/// The teacher emitted the end after more text than the record has, so its logprobs do not apply to the student's
/// position.
#[test]
fn end_of_turn_after_a_partial_token_has_no_soft_labels() {
    let tokenizer = tokenizer("bytelevel");
    let end = tokenizer.end_of_turn().unwrap();
    let mut ids = tokenizer.encode_text("Tb").unwrap();
    ids.push(end);
    let name = "<|im_end|>";
    let listed = (name, -0.1, &[(name, Some(-0.1))][..]);
    let is_soft = |last: &str| {
        let teacher = logprobs(&[("T", -0.1, &[]), (last, -0.1, &[]), listed]);
        let aligned = align(&tokenizer, &teacher, "Tb", &ids).unwrap();
        aligned.is_soft(ids.len() - 1)
    };
    assert!(is_soft("b") && !is_soft("b\n"));
}
