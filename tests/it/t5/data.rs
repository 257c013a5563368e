//! Sources, labels and soft labels of examples for an encoder-decoder.

use std::path::Path;

use distill::cache::record::Logprobs;
use distill::config::Config;
use distill::data::align::aligned::Aligned;
use distill::data::align::{Mapper, StudentAnswer};
use distill::data::batch::Batch;
use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;
use serde_json::json;

use super::{id, write_json, write_tokenizer};

/// Returns a folder with the tokenizer of a T5.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path());
    let config = json!({"model_type": "t5", "decoder_start_token_id": 0, "eos_token_id": 1});
    write_json(&dir.path().join("config.json"), &config);
    dir
}

fn conversation() -> [Message; 3] {
    [
        Message::new("system", "question"),
        Message::new("user", "the red cat"),
        Message::new("assistant", "on the mat"),
    ]
}

/// A token of a teacher with its alternatives, the first of which is the token itself.
type Row<'a> = (&'a str, &'a [(&'a str, f32)]);

/// Returns the teacher's logprobs of an answer.
fn logprobs(rows: &[Row]) -> Logprobs {
    let top = |row: &Row| row.1.iter().map(|(token, _)| (*token).into()).collect();
    Logprobs {
        token: rows.iter().map(|row| row.0.into()).collect(),
        logprob: rows.iter().map(|row| Some(row.1[0].1)).collect(),
        top: rows.iter().map(top).collect(),
        top_logprob: rows
            .iter()
            .map(|row| row.1.iter().map(|(_, logprob)| Some(*logprob)).collect())
            .collect(),
        raw: Vec::new(),
        matches_text: true,
    }
}

/// Aligns a teacher's logprobs with the tokens of an answer.
fn align(
    tokenizer: &Tokenizer,
    teacher: &Logprobs,
    answer: &str,
    tokens: StudentAnswer,
) -> Aligned {
    Mapper::new(tokenizer, None)
        .align(
            &teacher.into(),
            answer.as_bytes(),
            0..answer.len(),
            tokens,
            None,
        )
        .unwrap()
}

/// Returns the ids of tokens of the tiny vocabulary.
fn ids(tokens: &[&str]) -> Vec<u32> {
    tokens.iter().map(|token| id(token)).collect()
}

#[test]
fn source_is_the_messages_and_the_labels_are_the_answer_with_its_end() {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let encoded = tokenizer.conversation(&conversation()).unwrap();
    let source = ["▁question", "▁the", "▁red", "▁cat", "</s>"];
    assert_eq!(encoded.source_ids, ids(&source));
    let decoder = ["<pad>", "▁on", "▁the", "▁mat", "</s>"];
    assert_eq!(encoded.ids, ids(&decoder));
    let answer = &encoded.answers[0];
    assert_eq!(answer.tokens, 1..4);
    assert_eq!(answer.supervised, 1..5);
    // The space that the tokenizer writes before the text belongs to no byte of the answer.
    assert_eq!(answer.token_ends, Some(vec![2, 6, 10]));
    let prompt = tokenizer.encode_prompt(&conversation()[..2]).unwrap();
    assert_eq!(prompt, encoded.source_ids);
}

/// A name of a control token in a message is text, as in a decoder.
#[test]
fn control_tokens_in_messages_are_text() {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let messages = [
        Message::new("user", "the </s> cat <extra_id_0>"),
        Message::new("assistant", "</s>"),
    ];
    let encoded = tokenizer.conversation(&messages).unwrap();
    let count = |ids: &[u32], token| ids.iter().filter(|i| **i == id(token)).count();
    let names: Vec<String> = encoded
        .source_ids
        .iter()
        .map(|id| tokenizer.token_name(*id))
        .collect();
    assert_eq!(count(&encoded.source_ids, "</s>"), 1, "{names:?}");
    assert_eq!(count(&encoded.source_ids, "<extra_id_0>"), 0, "{names:?}");
    assert_eq!(count(&encoded.ids, "</s>"), 1);
}

/// `<`, `/` and `>` are not in the vocabulary, and `{` is not either.
#[test]
fn unknown_text_keeps_its_place_and_has_no_soft_labels() {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let answer = "the {} cat";
    let encoded = tokenizer
        .conversation(&[Message::new("user", "a"), Message::new("assistant", answer)])
        .unwrap();
    let tokens = &encoded.answers[0];
    let answer_ids = &encoded.ids[tokens.supervised.clone()];
    let expected = ids(&["▁the", "▁", "<unk>", "▁cat", "</s>"]);
    assert_eq!(answer_ids, expected);
    let ends = tokens.token_ends.as_deref();
    assert_eq!(ends, Some(&[3, 4, 6, 10][..]));
    // The teacher is a decoder with other tokens: its first token has no space before it.
    let teacher = logprobs(&[
        ("the", &[("the", -0.1), ("cat", -3.0)]),
        (" ", &[(" ", -0.2), (" cat", -2.5)]),
        ("{}", &[("{}", -0.3), ("on", -2.0)]),
        (" cat", &[(" cat", -0.1), (" mat", -2.7)]),
        ("<|im_end|>", &[("<|im_end|>", -0.1)]),
    ]);
    let tokens = StudentAnswer {
        ids: answer_ids,
        ends,
    };
    let aligned = align(&tokenizer, &teacher, answer, tokens);
    let soft: Vec<Vec<u32>> = (0..5).map(|at| aligned.soft(at).0.to_vec()).collect();
    // At the first position, candidates get the space that the student's tokenizer writes.
    assert_eq!(soft[0], ids(&["▁the", "▁cat"]));
    assert_eq!(soft[1], ids(&["▁", "▁cat"]));
    assert!(soft[2].is_empty());
    assert_eq!(soft[3], ids(&["▁cat", "▁mat"]));
    assert_eq!(soft[4], ids(&["</s>"]));
}

/// The vocabulary has no line break: the tokenizer reads it as a space.
#[test]
fn normalised_text_is_aligned_by_its_offsets() {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let answer = "the\n\ncat";
    let encoded = tokenizer
        .conversation(&[Message::new("user", "a"), Message::new("assistant", answer)])
        .unwrap();
    let tokens = &encoded.answers[0];
    let answer_ids = &encoded.ids[tokens.tokens.clone()];
    assert_eq!(answer_ids, ids(&["▁the", "▁cat"]));
    let teacher = logprobs(&[
        ("the", &[("the", -0.1), ("cat", -3.0)]),
        ("\n\ncat", &[("\n\ncat", -0.3), (" mat", -2.0)]),
    ]);
    let tokens = StudentAnswer {
        ids: answer_ids,
        ends: tokens.token_ends.as_deref(),
    };
    let aligned = align(&tokenizer, &teacher, answer, tokens);
    assert_eq!(aligned.soft(1).0, ids(&["▁cat", "▁mat"]));
}

/// NFKC writes one character as two letters: both tokens belong to the teacher's token, and the next one is not shifted.
#[test]
fn character_that_becomes_two_tokens_does_not_shift_soft_labels() {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let answer = "\u{fb01} on";
    let encoded = tokenizer
        .conversation(&[Message::new("user", "a"), Message::new("assistant", answer)])
        .unwrap();
    let tokens = &encoded.answers[0];
    let answer_ids = &encoded.ids[tokens.supervised.clone()];
    assert_eq!(answer_ids, ids(&["▁", "f", "i", "▁on", "</s>"]));
    let teacher = logprobs(&[
        ("\u{fb01}", &[("\u{fb01}", -0.1), ("cat", -3.0)]),
        (" on", &[(" on", -0.3), (" in", -2.0)]),
        ("</s>", &[("</s>", -0.2)]),
    ]);
    let tokens = StudentAnswer {
        ids: answer_ids,
        ends: tokens.token_ends.as_deref(),
    };
    let aligned = align(&tokenizer, &teacher, answer, tokens);
    assert_eq!(aligned.soft(3).0, ids(&["▁on", "▁in"]));
    assert_eq!(aligned.soft(4).0, ids(&["</s>"]));
    // No soft label of a position contains a token of another one.
    let at = |position| aligned.soft(position).0.to_vec();
    assert!(!at(0).contains(&id("▁on")) && !at(1).contains(&id("▁on")) && at(2).is_empty());
}

/// Returns a config of rows with sources and answers of growing length.
fn config(dir: &Path) -> Config {
    let rows: String = (1..=20)
        .map(|i| {
            let [source, answer] =
                ["the cat sat", "on the mat"].map(|text| vec![text; i].join(" "));
            let row = json!({"messages": [
                {"role": "user", "content": source},
                {"role": "assistant", "content": answer},
            ]});
            format!("{row}\n")
        })
        .collect();
    std::fs::write(dir.join("rows.jsonl"), rows).unwrap();
    let mut config = Config {
        run_dir: dir.join("run"),
        ..Config::default()
    };
    config.data.source = Some(dir.join("rows.jsonl"));
    config.data.validation_share = 0.0;
    config.student.path = dir.to_owned();
    config
}

#[test]
fn source_and_answer_have_separate_limits_and_longer_rows_are_counted() {
    let dir = folder();
    let mut config = config(dir.path());
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    // A source of i repetitions has 3 i + 1 tokens, and so has the answer with its end; the decoder's input has one more.
    config.data.max_source_length = 31;
    config.data.max_length = 20;
    let data = crate::data::dataset::load(&config, &tokenizer).unwrap();
    assert_eq!(data.train().len(), 6);
    let dropped: Vec<(&String, &u64)> = data.report.dropped.iter().collect();
    assert_eq!(dropped.len(), 1, "{dropped:?}");
    config.data.max_length = 1000;
    let data = crate::data::dataset::load(&config, &tokenizer).unwrap();
    assert_eq!(data.train().len(), 10);
    let dropped: Vec<(&String, &u64)> = data.report.dropped.iter().collect();
    assert_eq!(*dropped[0].1, 10);
    assert!(
        dropped[0].0.contains("`data.max_source_length`"),
        "{dropped:?}"
    );
    for example in data.train().iter() {
        let source = example.source_ids().len();
        assert_eq!(example.tokens(), 2 * source + 1);
        assert_eq!(example.supervised(), source);
    }
}

#[test]
fn earlier_answers_become_examples_with_their_own_sources() {
    let dir = folder();
    let config = config(dir.path());
    let row = json!({"messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "mat"},
    ]});
    std::fs::write(dir.path().join("rows.jsonl"), format!("{row}\n")).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let data = crate::data::dataset::load(&config, &tokenizer).unwrap();
    let sources: Vec<Vec<u32>> = data
        .train()
        .iter()
        .map(|e| e.source_ids().collect())
        .collect();
    let expected = [
        ids(&["▁one", "▁cat", "▁red", "</s>"]),
        ids(&["▁one", "</s>"]),
    ];
    assert_eq!(sources, expected);
}

#[test]
fn unknown_tokens_are_counted_and_reported() {
    let dir = folder();
    let config = config(dir.path());
    let row = json!({"messages": [
        {"role": "user", "content": "one {x} ~"},
        {"role": "assistant", "content": "cat {y}"},
    ]});
    std::fs::write(dir.path().join("rows.jsonl"), format!("{row}\n")).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let report = crate::data::dataset::load(&config, &tokenizer)
        .unwrap()
        .report;
    assert_eq!(
        (report.unknown_source_tokens, report.unknown_labels),
        (3, 2)
    );
    let text = report.to_string();
    assert!(
        text.contains("2 of 6 labels are the unknown token"),
        "{text}"
    );
    assert!(text.contains("3 of 8 tokens of the sources"), "{text}");
}

/// The prompt of an encoder-decoder is its source: the decoder's input is the same for all prompts.
#[test]
fn sampled_answers_to_different_sources_are_not_merged() {
    let dir = folder();
    let mut config = config(dir.path());
    config.data.sample_trie = true;
    let rows = [
        ("one", "cat"),
        ("one", "mat"),
        ("red", "cat"),
        ("red", "cat"),
    ];
    let rows: String = rows
        .iter()
        .map(|(source, answer)| {
            let row = json!({"messages": [
                {"role": "user", "content": source},
                {"role": "assistant", "content": answer},
            ]});
            format!("{row}\n")
        })
        .collect();
    std::fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let data = crate::data::dataset::load(&config, &tokenizer).unwrap();
    for example in data.train().iter() {
        let batch = Batch::new([example]);
        let first = &batch.soft_logprobs_NK[..batch.soft_offsets_N1[1]];
        let is_one = example.source_ids().next() == Some(id("▁one"));
        let expected: &[f32] = if is_one { &[0.5, 0.5] } else { &[1.0] };
        let shares: Vec<f32> = first.iter().map(|logprob| logprob.exp()).collect();
        crate::model::assert_close(&shares, expected, 1e-6);
    }
}

#[test]
fn source_template_of_the_student_replaces_the_default() {
    let dir = folder();
    let mut config = config(dir.path());
    config.student.source_template =
        Some("answer: {{ messages[-1]['content'] }}</s>".replace(": ", " "));
    let tokenizer = Tokenizer::for_student(&config.student).unwrap();
    let source = tokenizer.encode_prompt(&conversation()[..2]).unwrap();
    // The template writes the end itself, which is not repeated.
    assert_eq!(source, ids(&["▁answer", "▁the", "▁red", "▁cat", "</s>"]));
    let default = Tokenizer::load(dir.path()).unwrap();
    assert_ne!(default.fingerprint(), tokenizer.fingerprint());
}

/// A sampled `<unk>` or `<pad>` of a teacher has no text. The other positions keep their soft labels.
#[test]
fn control_token_inside_a_teacher_answer_costs_no_other_position() {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let answer = "the cat";
    let encoded = tokenizer
        .conversation(&[Message::new("user", "a"), Message::new("assistant", answer)])
        .unwrap();
    let tokens = &encoded.answers[0];
    let teacher = logprobs(&[
        ("the", &[("the", -0.1), ("cat", -3.0)]),
        ("<unk>", &[("<unk>", -1.0), (" cat", -1.0)]),
        (" cat", &[(" cat", -0.3), (" mat", -2.0)]),
        ("</s>", &[("</s>", -0.2)]),
    ]);
    let student = StudentAnswer {
        ids: &encoded.ids[tokens.supervised.clone()],
        ends: tokens.token_ends.as_deref(),
    };
    let aligned = align(&tokenizer, &teacher, answer, student);
    assert_eq!(aligned.soft(0).0, ids(&["▁the", "▁cat"]));
    assert_eq!(aligned.soft(1).0, ids(&["▁cat", "▁mat"]));
    assert_eq!(aligned.soft(2).0, ids(&["</s>"]));
}

/// Text after the name of a control token is encoded as elsewhere.
#[test]
fn names_of_control_tokens_keep_the_spaces_after_them() {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let words = |text: &str| {
        let encoded = tokenizer.encode_text(text).unwrap();
        let known = encoded.into_iter().filter(|&id| !tokenizer.is_unknown(id));
        known.map(|id| tokenizer.token_name(id)).collect::<Vec<_>>()
    };
    for text in [
        "the </s> cat sat",
        "the </s>\n\n cat  sat ",
        "the </s> </s> </s> cat sat",
    ] {
        let names = words(text);
        assert_eq!(names[0], "▁the", "{text:?}: {names:?}");
        let last = names.iter().rev().take(2).rev();
        assert_eq!(last.collect::<Vec<_>>(), ["▁cat", "▁sat"], "{text:?}");
    }
}

#[test]
fn thousands_of_names_of_control_tokens_are_text() {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let text = "</s><pad> ".repeat(5000);
    let ids = tokenizer.encode_text(&text).unwrap();
    assert!(ids.len() > 5000);
    assert!(ids.iter().all(|&id| id == 2 || !tokenizer.is_special(id)));
}

/// Aligns the logprobs of an answer with its tokens in the tiny vocabulary. Returns the ids and probabilities of each
/// position, and the names of the tokens.
fn soft_labels(answer: &str, rows: &[Row]) -> (Vec<String>, Vec<Vec<(String, f32)>>) {
    let dir = folder();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let messages = [Message::new("user", "a"), Message::new("assistant", answer)];
    let encoded = tokenizer.conversation(&messages).unwrap();
    let tokens = &encoded.answers[0];
    let student = StudentAnswer {
        ids: &encoded.ids[tokens.supervised.clone()],
        ends: tokens.token_ends.as_deref(),
    };
    let aligned = align(&tokenizer, &logprobs(rows), answer, student);
    let name = |id: &u32| tokenizer.token_name(*id);
    let labels = (0..aligned.len()).map(|at| {
        let (ids, logprobs) = aligned.soft(at);
        let shares = logprobs
            .iter()
            .map(|logprob| (logprob.exp() * 100.0).round() / 100.0);
        ids.iter().map(name).zip(shares).collect()
    });
    (student.ids.iter().map(name).collect(), labels.collect())
}

fn shares(expected: &[(&str, f32)]) -> Vec<(String, f32)> {
    let own = |(name, share): &(&str, f32)| ((*name).to_owned(), *share);
    expected.iter().map(own).collect()
}

/// The student writes a space before the first word, whether or not the word is one token.
#[test]
fn alternatives_of_the_first_token_begin_a_word() {
    let rows: [Row; 1] = [(
        "who",
        &[
            ("who", 0.5f32.ln()),
            ("the", 0.2f32.ln()),
            ("cat", 0.15f32.ln()),
            ("x", 0.1f32.ln()),
        ],
    )];
    let (names, labels) = soft_labels("who", &rows);
    assert_eq!(names[..2], ["▁", "w"]);
    let expected = shares(&[("▁", 0.6), ("▁the", 0.2), ("▁cat", 0.15)]);
    assert_eq!(labels[0], expected);
    // After the space alone, the alternatives that are tokens of their own cannot follow.
    assert!(labels[1].is_empty(), "{labels:?}");
    // Normalisation changes the first word.
    let rows: [Row; 1] = [("ｔhe", &[("ｔhe", 0.7f32.ln()), ("cat", 0.2f32.ln())])];
    let (names, labels) = soft_labels("ｔhe", &rows);
    assert_eq!(names, ["▁the", "</s>"]);
    assert_eq!(labels[0], shares(&[("▁the", 0.7), ("▁cat", 0.2)]));
}

/// A teacher may report the space that SentencePiece writes before its first token, and not write it in the answer.
#[test]
fn space_of_the_first_teacher_token_is_not_part_of_the_answer() {
    for mark in [" ", "▁"] {
        let token = |text: &str| format!("{mark}{text}");
        let (the, cat, sat) = (token("the"), token("cat"), token("sat"));
        let rows: [Row; 2] = [
            (
                &the,
                &[
                    (&the, 0.5f32.ln()),
                    (&cat, 0.3f32.ln()),
                    // A token without the space is another token.
                    ("c", 0.1f32.ln()),
                ],
            ),
            (&cat, &[(&cat, 0.6f32.ln()), (&sat, 0.2f32.ln())]),
        ];
        let (names, labels) = soft_labels("the cat", &rows);
        assert_eq!(names, ["▁the", "▁cat", "</s>"]);
        let first = shares(&[("▁the", 0.5), ("▁cat", 0.3), ("c", 0.1)]);
        assert_eq!(labels[0], first, "{mark:?}");
        let second = shares(&[("▁cat", 0.6), ("▁sat", 0.2)]);
        assert_eq!(labels[1], second, "{mark:?}");
    }
}

/// A word that is several tokens of the student begins with the space.
#[test]
fn alternatives_inside_an_answer_keep_their_space() {
    let rows: [Row; 2] = [
        ("the", &[("the", 0.9f32.ln())]),
        (
            " who",
            &[
                (" who", 0.5f32.ln()),
                (" why", 0.2f32.ln()),
                (" cat", 0.1f32.ln()),
            ],
        ),
    ];
    let (names, labels) = soft_labels("the who", &rows);
    assert_eq!(names, ["▁the", "▁", "w", "h", "o", "</s>"]);
    assert_eq!(labels[1], shares(&[("▁", 0.7), ("▁cat", 0.1)]));
    // Of the alternatives that begin with "w", both continue with "h"; then 0.5 of 0.7 continue with "o".
    assert!(labels[2].is_empty());
    assert_eq!(labels[3], shares(&[("h", 1.0)]));
    assert_eq!(labels[4], shares(&[("o", 0.71), ("y", 0.29)]));
}

#[test]
fn empty_sources_are_left_out_and_counted() {
    let dir = folder();
    let config = config(dir.path());
    let rows = ["one", " "].map(|source| {
        let row = json!({"messages": [
            {"role": "user", "content": source},
            {"role": "assistant", "content": "cat"},
        ]});
        format!("{row}\n")
    });
    std::fs::write(dir.path().join("rows.jsonl"), rows.concat()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let report = crate::data::dataset::load(&config, &tokenizer)
        .unwrap()
        .report;
    assert_eq!(report.kept, 1);
    let dropped = report.dropped.keys().next().unwrap();
    assert!(dropped.contains("empty source"), "{dropped}");
}

/// Tokens that the tokenizer itself adds before a text are part of the source.
#[test]
fn source_begins_as_the_tokenizer_begins_a_text() {
    let dir = folder();
    let path = dir.path().join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let single = json["post_processor"]["single"].as_array_mut().unwrap();
    single.insert(0, single[1].clone());
    write_json(&path, &json);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let source = tokenizer
        .encode_prompt(&[Message::new("user", "the cat")])
        .unwrap();
    assert_eq!(source, ids(&["</s>", "▁the", "▁cat", "</s>"]));
    assert_eq!(tokenizer.encode_text_prompt("the cat").unwrap(), source);
}

#[test]
fn vocabulary_with_an_endless_piece_is_an_error() {
    let dir = folder();
    let path = dir.path().join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let vocabulary = json["model"]["vocab"].as_array_mut().unwrap();
    vocabulary.push(json!(["a".repeat(100_000), -9.0]));
    write_json(&path, &json);
    let error = Tokenizer::load(dir.path()).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("a piece of 100000 bytes"), "{error}");
}
