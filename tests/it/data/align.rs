//! Soft labels across tokenizers, and the speed of the alignment.

use std::time::Instant;

use distill::cache::raw_token::RawToken;
use distill::cache::record::Logprobs;
use distill::data::align::aligned::{Aligned, Chunk};
use distill::data::align::{Mapper, Mismatch, common_groups};
use distill::tokenizer::Tokenizer;

use super::{FOLDERS, ask, tokenizer};

/// A token, its logprob, and the alternatives.
pub type Row<'a> = (&'a str, f32, &'a [Alternative<'a>]);
pub type Alternative<'a> = (&'a str, Option<f32>);

/// Soft labels of one position.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SoftLabels {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
}

/// Returns the soft labels of each position, or None for a position without any.
pub fn soft_labels(aligned: &Aligned) -> Vec<Option<SoftLabels>> {
    let labels = |at| match aligned.soft(at) {
        ([], []) => None,
        (ids, logprobs) => Some(SoftLabels {
            ids: ids.to_vec(),
            logprobs: logprobs.to_vec(),
        }),
    };
    (0..aligned.len()).map(labels).collect()
}

/// Returns the teacher's logprobs of an answer.
pub fn logprobs(rows: &[Row]) -> Logprobs {
    Logprobs {
        token: rows.iter().map(|row| row.0.into()).collect(),
        logprob: rows.iter().map(|row| Some(row.1)).collect(),
        top: rows
            .iter()
            .map(|(_, _, top)| top.iter().map(|(token, _)| (*token).into()).collect())
            .collect(),
        top_logprob: rows
            .iter()
            .map(|(_, _, top)| top.iter().map(|(_, logprob)| *logprob).collect())
            .collect(),
        raw: Vec::new(),
        matches_text: true,
    }
}

/// Aligns logprobs with `ids`, the student's tokens of the whole answer.
pub fn align(
    tokenizer: &Tokenizer,
    teacher: &Logprobs,
    answer: &str,
    ids: &[u32],
) -> Result<Aligned, Mismatch> {
    Mapper::new(tokenizer, None).align(
        &teacher.into(),
        answer.as_bytes(),
        0..answer.len(),
        ids.into(),
        None,
    )
}

/// Returns random logprobs of a teacher with the student's tokenizer and `k` alternatives, and the expected soft
/// labels. The third alternative of each position is its token.
pub fn same_tokenizer(tokenizer: &Tokenizer, ids: &[u32], k: usize) -> (Logprobs, Vec<SoftLabels>) {
    let ordinary: Vec<u32> = (0..tokenizer.vocab_size() as u32)
        .filter(|&id| {
            let bytes = tokenizer.token_bytes(id);
            bytes.is_some_and(|bytes| tokenizer.id_of_bytes(bytes) == Some(id))
        })
        .collect();
    let mut rng = fastrand::Rng::with_seed(1);
    let mut logprobs = Logprobs::default();
    let mut expected = Vec::new();
    // Returns the text of a token. The bytes of a token that is not UTF-8 go to `raw`.
    let token_text = |logprobs: &mut Logprobs, position: usize, rank: i32, id: u32| {
        let bytes = tokenizer.token_bytes(id).unwrap();
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .unwrap_or_else(|_| {
                logprobs.raw.push(RawToken {
                    position: position as u32,
                    rank,
                    hex: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
                });
                String::new()
            })
    };
    for (position, &id) in ids.iter().enumerate() {
        let mut labels = SoftLabels::default();
        let mut remaining_mass = 0.99f32;
        while labels.ids.len() < k {
            let next = match labels.ids.len() {
                2 => id,
                _ => ordinary[rng.usize(..ordinary.len())],
            };
            if labels.ids.contains(&next) || (next == id && labels.ids.len() != 2) {
                continue;
            }
            remaining_mass *= 0.5 + 0.1 * rng.f32();
            labels.ids.push(next);
            labels.logprobs.push((remaining_mass * 0.5).ln());
        }
        labels.logprobs.sort_by(|a, b| b.total_cmp(a));
        let token = token_text(&mut logprobs, position, -1, id);
        logprobs.token.push(token);
        logprobs.logprob.push(Some(labels.logprobs[2]));
        let top = labels.ids.iter().enumerate();
        let top = top
            .map(|(rank, &id)| token_text(&mut logprobs, position, rank as i32, id))
            .collect();
        logprobs.top.push(top);
        logprobs
            .top_logprob
            .push(labels.logprobs.iter().copied().map(Some).collect());
        expected.push(labels);
    }
    (logprobs, expected)
}

#[test]
fn same_tokenizer_maps_to_itself() {
    for name in FOLDERS {
        let tokenizer = tokenizer(name);
        for answer in [
            "Grüße aus München, 日本 👋🏽\n\ndef add(a, b):",
            " the cat",
            " 5",
        ] {
            let conversation = tokenizer.conversation(&ask("Hello", answer)).unwrap();
            let range = conversation.answers[0].clone();
            let ids = &conversation.ids[range.tokens.clone()];
            // The first SentencePiece token contains the space of the template.
            let (teacher, expected) = same_tokenizer(&tokenizer, ids, 20);
            let mut mapper = Mapper::new(&tokenizer, None);
            let aligned = mapper
                .align(
                    &(&teacher).into(),
                    answer.as_bytes(),
                    range.text,
                    ids.into(),
                    None,
                )
                .unwrap();
            let soft = soft_labels(&aligned);
            assert_eq!(soft.len(), ids.len());
            for (at, soft) in soft.iter().enumerate() {
                let soft = soft.as_ref().unwrap();
                assert_eq!(soft.ids, expected[at].ids, "{name}: {at}");
                let bits =
                    |l: &SoftLabels| l.logprobs.iter().map(|l| l.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(soft), bits(&expected[at]), "{name}: {at}");
            }
        }
    }
}

#[test]
fn tokens_that_do_not_spell_the_answer_are_a_mismatch() {
    let tokenizer = tokenizer("bytelevel");
    let answer = "The capital of France is Paris.";
    let ids = tokenizer.encode_text(answer).unwrap();
    let align = |teacher: &Logprobs, answer: &str, ids: &[u32]| {
        let aligned = align(&tokenizer, teacher, answer, ids)?;
        Ok(soft_labels(&aligned).iter().flatten().count())
    };
    let (teacher, _) = same_tokenizer(&tokenizer, &ids, 5);
    assert_eq!(align(&teacher, answer, &ids), Ok(ids.len()));

    let mut shifted = teacher.clone();
    shifted.token.rotate_right(1);
    assert_eq!(align(&shifted, answer, &ids), Err(Mismatch::Teacher));
    assert_eq!(
        align(&teacher, "The capital of France is Paris. ", &ids),
        Err(Mismatch::Teacher)
    );
    assert_eq!(align(&teacher, answer, &ids[1..]), Err(Mismatch::Student));

    // Stop tokens at the end are not part of the answer.
    let mut stopped = teacher.clone();
    stopped.token.extend(["<|eot_id|>".into(), "".into()]);
    assert_eq!(align(&stopped, answer, &ids), Ok(ids.len()));
    // A stop string is not part of the answer either, but longer text is a mismatch.
    stopped.token.push("more".into());
    assert_eq!(align(&stopped, answer, &ids), Ok(ids.len()));
    stopped.token.push("more".repeat(100));
    assert_eq!(align(&stopped, answer, &ids), Err(Mismatch::Teacher));
}

#[test]
fn replacement_characters_count_towards_the_tail() {
    let tokenizer = tokenizer("bytelevel");
    let ids = tokenizer.encode_text("The").unwrap();
    let top = [("The", Some(-1.0)), ("\u{fffd}", Some(-1.5))];
    let teacher = logprobs(&[("The", -1.0, &top)]);
    let aligned = align(&tokenizer, &teacher, "The", &ids).unwrap();
    assert_eq!(aligned.soft(0).1.len(), 1);
}

#[test]
fn common_groups_are_cut_at_common_boundaries() {
    let cases: [(&[usize], &[usize], Vec<_>); 4] = [
        (
            &[1, 2, 3],
            &[1, 2, 3],
            vec![(0..1, 0..1), (1..2, 1..2), (2..3, 2..3)],
        ),
        (
            &[2, 5, 6],
            &[1, 2, 5, 6],
            vec![(0..1, 0..2), (1..2, 2..3), (2..3, 3..4)],
        ),
        (&[2, 4, 6], &[3, 6], vec![(0..3, 0..2)]),
        (&[2, 4], &[2], vec![(0..1, 0..1)]),
    ];
    for (teacher, student, expected) in cases {
        assert_eq!(common_groups(teacher, student), expected);
    }
}

#[test]
fn other_tokenizer_gets_soft_labels_at_common_boundaries() {
    let tokenizer = tokenizer("bytelevel");
    let id = |text: &str| {
        let ids = tokenizer.encode_text(text).unwrap();
        assert_eq!(ids.len(), 1, "{text}");
        ids[0]
    };
    let answer = "The answer is two\n";
    let ids = tokenizer.encode_text(answer).unwrap();
    let at = |text: &str| ids.iter().position(|&i| i == id(text)).unwrap();
    let half = 0.5f32.ln();
    let fifth = 0.2f32.ln();
    let tenth = Some(0.1f32.ln());
    let teacher = logprobs(&[
        // " capitalism" begins with the student's token " capital", so both map to this token.
        (
            "The",
            half,
            &[
                ("The", Some(half)),
                (" capital", Some(fifth)),
                (" capitalism", tenth),
                ("<|im_end|>", tenth),
            ],
        ),
        // The student has other tokens.
        (" ans", -1.0, &[(" ans", Some(-1.0))]),
        ("wer", -1.0, &[("wer", Some(-1.0))]),
        // The emitted token is outside the top-k and has a logprob of its own. Sentinels and empty tokens are dropped.
        (
            " is",
            fifth,
            &[
                (" was", Some(half)),
                ("a", Some(-9999.0)),
                ("b", None),
                ("", tenth),
            ],
        ),
        // One token is listed twice, with a sum that is above 1 by a rounding error.
        (
            " two",
            half,
            &[(" two", Some(half)), (" two", Some(0.5005f32.ln()))],
        ),
        // The logprob of the emitted token is a sentinel.
        ("\n", -9999.0, &[]),
    ]);
    let aligned = align(&tokenizer, &teacher, answer, &ids).unwrap();
    let soft = soft_labels(&aligned);
    let mass: f64 = aligned.mapped_mass;
    let listed = soft.iter().flatten().flat_map(|labels| &labels.logprobs);
    let expected: f64 = listed.map(|&logprob| f64::from(logprob).exp()).sum();
    assert!((mass - expected - 0.2).abs() < 1e-6, "{mass} {expected}");

    let first = soft[at("The")].as_ref().unwrap();
    let end = tokenizer.end_of_turn().unwrap();
    assert_eq!(first.ids, [id("The"), id(" capital"), end]);
    assert_eq!(first.logprobs[0], 0.5f32.ln());
    assert!((first.logprobs[1].exp() - 0.3).abs() < 1e-6);
    let third = soft[at(" is")].as_ref().unwrap();
    assert_eq!(third.ids, tokenizer.encode_text(" was").unwrap()[..1]);
    let sampled: Vec<Option<f32>> = (0..ids.len())
        .map(|at| aligned.sampled_logprob(at))
        .collect();
    assert_eq!(sampled[at(" is")], Some(fifth));
    assert_eq!(sampled[at("The")], None);
    // " ans" and "wer" are one token of the student.
    let chunk = Chunk {
        start: 1,
        len: at(" is") - 1,
        nll: 2.0,
    };
    assert_eq!(aligned.chunks(), [chunk]);
    let fourth = soft[at(" two")].as_ref().unwrap();
    assert_eq!(fourth.ids, [id(" two")]);
    assert!(fourth.logprobs[0].abs() < 1e-6);
    assert_eq!(soft[at("\n")], None);
    assert_eq!(sampled[at("\n")], Some(f32::NEG_INFINITY));
    assert!(!aligned.is_soft(at("\n")) && aligned.is_soft(at(" is")));
    assert!(soft[1..at(" is")].iter().all(Option::is_none));

    let impossible = logprobs(&[(answer, -0.1, &[(answer, Some(-0.1)), ("x", Some(-0.5))])]);
    let unusable = align(&tokenizer, &impossible, answer, &ids).unwrap();
    assert_eq!(
        (unusable.positions_over_one, soft_labels(&unusable)),
        (1, vec![None; ids.len()])
    );
    // A position with a sum above 1 does not affect the others.
    let mut first_over_one = teacher.clone();
    first_over_one.top_logprob[0][1] = Some(0.6f32.ln());
    let aligned = align(&tokenizer, &first_over_one, answer, &ids).unwrap();
    assert_eq!(aligned.positions_over_one, 1);
    let labels = soft_labels(&aligned);
    assert_eq!(labels[0], None);
    assert_eq!(labels[1..], soft[1..]);
}

#[test]
fn answers_trimmed_by_the_template_keep_their_soft_labels() {
    let tokenizer = tokenizer("metaspace");
    let answer = "\n\nThe capital";
    let conversation = tokenizer.conversation(&ask("Hello", answer)).unwrap();
    let range = &conversation.answers[0];
    assert_eq!(range.text, 2..answer.len());
    let ids = &conversation.ids[range.tokens.clone()];
    let texts: Vec<String> = ids
        .iter()
        .map(|&id| String::from_utf8(tokenizer.token_bytes(id).unwrap().into()).unwrap())
        .collect();
    let mut rows: Vec<Row> = vec![("\n\n", -0.1, &[])];
    rows.extend(texts.iter().map(|text| (text.as_str(), -0.5, &[][..])));
    let teacher = logprobs(&rows);
    let mut mapper = Mapper::new(&tokenizer, None);
    let aligned = mapper
        .align(
            &(&teacher).into(),
            answer.as_bytes(),
            range.text.clone(),
            ids.into(),
            None,
        )
        .unwrap();
    assert!((0..ids.len()).all(|at| aligned.is_soft(at)), "{texts:?}");
}

#[test]
fn split_token_parts_get_renormalised_continuations() {
    let tokenizer = tokenizer("bytelevel");
    let ids = tokenizer.encode_text("The answer is two").unwrap();
    let [.., is, two] = ids[..] else {
        panic!("{ids:?}")
    };
    let first_of = |text: &str| tokenizer.encode_text(text).unwrap()[0];
    let logprob = |p: f32| Some(p.ln());
    let split = |missing: f32| {
        logprobs(&[
            ("The answer", -0.1, &[]),
            (
                " is two",
                0.4f32.ln(),
                &[
                    (" is two", logprob(0.4)),
                    (" is three", logprob(0.2)),
                    // Equals the first token of the student.
                    (" is", logprob(0.1)),
                    (" was", logprob(0.3 - missing)),
                ],
            ),
        ])
    };
    let mut mapper = Mapper::new(&tokenizer, None);
    let mut align = |teacher: &Logprobs| {
        let text = "The answer is two".as_bytes();
        mapper
            .align(&teacher.into(), text, 0..text.len(), ids[..].into(), None)
            .unwrap()
    };
    let aligned = align(&split(0.2));
    let assert_close = |(ids, logprobs): (&[u32], &[f32]), expected: &[(u32, f32)]| {
        let expected_ids: Vec<u32> = expected.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, expected_ids);
        for (logprob, (_, p)) in logprobs.iter().zip(expected) {
            assert!((logprob.exp() - p).abs() < 1e-6, "{logprobs:?}");
        }
    };
    assert_close(
        aligned.soft(ids.len() - 2),
        &[(is, 0.7), (first_of(" was"), 0.1)],
    );
    assert_close(
        aligned.soft(ids.len() - 1),
        &[(two, 4.0 / 7.0), (first_of(" three"), 2.0 / 7.0)],
    );

    // There are no labels if more than half of the mass may belong to other tokens.
    let mut vague = split(0.2);
    vague.top_logprob[1] = vec![logprob(0.2), logprob(0.1), logprob(0.1), None];
    vague.logprob[1] = logprob(0.2);
    let aligned = align(&vague);
    let mut last_two = ids.len() - 2..ids.len();
    assert!(last_two.all(|at| !aligned.is_soft(at)));
}

/// `cargo test --release alignment_speed -- --nocapture` prints the speed.
#[test]
fn alignment_speed() {
    let tokenizer = tokenizer("bytelevel");
    let answer = "The quick brown fox jumps over the lazy dog. ".repeat(20);
    let ids = tokenizer.encode_text(&answer).unwrap();
    let (teacher, _) = same_tokenizer(&tokenizer, &ids, 20);
    let mut mapper = Mapper::new(&tokenizer, None);
    let start = Instant::now();
    let rounds = 20;
    for _ in 0..rounds {
        mapper
            .align(
                &(&teacher).into(),
                answer.as_bytes(),
                0..answer.len(),
                ids[..].into(),
                None,
            )
            .unwrap();
    }
    let speed = (rounds * ids.len()) as f64 / start.elapsed().as_secs_f64();
    println!("aligned {speed:.0} teacher tokens/s at k = 20");
    assert!(speed > 20_000.0, "{speed:.0} tokens/s");
}

/// A model that often prefers to end a short answer: the positions of the text alone would say that its most likely token
/// is never emitted.
#[test]
fn end_of_the_turn_counts_in_the_agreement_only_with_its_logprobs() {
    let tokenizer = tokenizer("bytelevel");
    let ids = tokenizer.encode_text("a").unwrap();
    let end: &[Alternative] = &[("<|im_end|>", Some(-0.5)), ("a", Some(-1.2))];
    let text = ("a", -1.2, end);
    let with_end = logprobs(&[text, ("<|im_end|>", -0.5, end)]);
    let agreement = align(&tokenizer, &with_end, "a", &ids).unwrap().agreement;
    assert_eq!((agreement.positions, agreement.rate()), (2, 0.5));
    let without_end = logprobs(&[text]);
    let agreement = align(&tokenizer, &without_end, "a", &ids)
        .unwrap()
        .agreement;
    assert_eq!(agreement.positions, 0);
}
