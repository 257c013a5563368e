//! Sources and labels of examples for an encoder-decoder.

use std::path::Path;

use distill::config::Config;
use distill::data::batch::Batch;
use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;
use serde_json::json;

use super::{change_json, change_tokenizer, folder, id, ids};

fn conversation() -> [Message; 3] {
    [
        Message::new("system", "question"),
        Message::new("user", "the red cat"),
        Message::new("assistant", "on the mat"),
    ]
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
    let tokens: usize = data.train().iter().map(|example| example.tokens()).sum();
    assert_eq!(data.report.tokens, tokens as u64);
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

/// Text after the name of a control token is encoded as elsewhere.
#[test]
fn names_of_control_tokens_keep_the_spaces_after_them() {
    let dir = folder();
    for is_nested in [false, true] {
        if is_nested {
            change_tokenizer(dir.path(), |json| {
                let steps = json["pre_tokenizer"].clone();
                json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [steps]});
            });
        }
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

#[test]
fn empty_sources_and_answers_are_left_out_and_counted() {
    let dir = folder();
    let config = config(dir.path());
    let rows = [("one", "cat"), (" ", "cat"), ("one", "\u{200b}")].map(|(source, answer)| {
        let row = json!({"messages": [
            {"role": "user", "content": source},
            {"role": "assistant", "content": answer},
        ]});
        format!("{row}\n")
    });
    change_tokenizer(dir.path(), |json| {
        let normalizers = json["normalizer"]["normalizers"].as_array_mut().unwrap();
        normalizers
            .push(json!({"type": "Replace", "pattern": {"String": "\u{200b}"}, "content": ""}));
    });
    std::fs::write(dir.path().join("rows.jsonl"), rows.concat()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let report = crate::data::dataset::load(&config, &tokenizer)
        .unwrap()
        .report;
    assert_eq!(report.kept, 1);
    let dropped: Vec<&str> = report.dropped.keys().map(String::as_str).collect();
    assert_eq!(dropped.len(), 2, "{dropped:?}");
    for reason in ["empty source", "drops all characters of the answer"] {
        assert!(
            dropped.iter().any(|text| text.contains(reason)),
            "{dropped:?}"
        );
    }
}

/// Tokens that the tokenizer itself adds before and after a text are part of the source.
#[test]
fn source_begins_as_the_tokenizer_begins_a_text() {
    let dir = folder();
    change_tokenizer(dir.path(), |json| {
        let single = json["post_processor"]["single"].as_array_mut().unwrap();
        let end = single[1].clone();
        single.insert(0, end.clone());
        single.push(end);
    });
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let source = tokenizer
        .encode_prompt(&[Message::new("user", "the cat")])
        .unwrap();
    assert_eq!(source, ids(&["</s>", "▁the", "▁cat", "</s>", "</s>"]));
    assert_eq!(tokenizer.encode_text_prompt("the cat").unwrap(), source);
}

/// The token before a text may also be one of the text.
#[test]
fn source_may_begin_with_an_ordinary_token() {
    let dir = folder();
    let mut first = 0;
    change_tokenizer(dir.path(), |json| {
        let vocabulary = json["model"]["vocab"].as_array_mut().unwrap();
        first = vocabulary.len() as u32;
        vocabulary.push(json!(["▁a", -1.0]));
        let processor = &mut json["post_processor"];
        processor["special_tokens"]["▁a"] = json!({"id": "▁a", "ids": [first], "tokens": ["▁a"]});
        let single = processor["single"].as_array_mut().unwrap();
        single.insert(0, json!({"SpecialToken": {"id": "▁a", "type_id": 0}}));
    });
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let source = tokenizer.encode_text_prompt("the cat").unwrap();
    assert_eq!(
        source,
        [&[first], &ids(&["▁the", "▁cat", "</s>"])[..]].concat()
    );
}

/// config.json may list several tokens that end an answer: the tokenizer's own is the one that answers are trained with.
#[test]
fn end_of_the_tokenizer_is_chosen_among_those_of_the_config() {
    let dir = folder();
    for (listed, end) in [(json!([id("ing"), 1]), 1), (json!(id("ing")), id("ing"))] {
        change_json(&dir.path().join("config.json"), |config| {
            config["eos_token_id"] = listed;
        });
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let messages = [Message::new("user", "a"), Message::new("assistant", "cat")];
        let answer = tokenizer.conversation(&messages).unwrap().ids;
        assert_eq!(answer, [0, id("▁cat"), end]);
    }
}

#[test]
fn vocabulary_with_an_endless_piece_is_an_error() {
    let dir = folder();
    change_tokenizer(dir.path(), |json| {
        let vocabulary = json["model"]["vocab"].as_array_mut().unwrap();
        vocabulary.push(json!(["a".repeat(100_000), -9.0]));
    });
    let error = Tokenizer::load(dir.path()).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("a piece of 100000 bytes"), "{error}");
}
