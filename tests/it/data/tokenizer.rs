//! Ids and bytes of tokens, compared with transformers and with the crate `tokenizers` ("the library").

use distill::exit::Exit;
use distill::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::{FOLDERS, ask, folder, golden, ids, message, messages, tokenizer};

#[test]
fn text_ids_match_transformers() {
    for name in FOLDERS {
        let tokenizer = tokenizer(name);
        for case in golden(&format!("{name}/golden.json"))["texts"]
            .as_array()
            .unwrap()
        {
            let text = case["text"].as_str().unwrap();
            assert_eq!(
                tokenizer.encode_text(text).unwrap(),
                ids(&case["ids"]),
                "{name}: {text:?}"
            );
        }
    }
}

/// The library encodes a text as a whole. Ours splits it into pieces and caches their ids.
#[test]
fn piece_cache_gives_the_ids_of_the_whole_text() {
    let parts = [
        " ",
        " ",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "a",
        "the",
        "The",
        "'s",
        "'",
        "don't",
        "x1",
        "1",
        "234",
        ".",
        ",",
        ":",
        "...",
        "é",
        "ü",
        "日本",
        "👋🏽",
        "\u{a0}",
        "\u{301}",
        "<|im_end|>",
        "</s>",
        "(",
        "_",
    ];
    let mut random = fastrand::Rng::with_seed(1);
    let patterns = [None, Some(r"\p{N}{1,3}"), Some(r"\p{N}")];
    for (name, digits) in FOLDERS
        .into_iter()
        .flat_map(|name| patterns.map(|p| (name, p)))
    {
        let mut json = golden(&format!("{name}/tokenizer.json"));
        if let Some(digits) = digits {
            if name != "bytelevel" {
                continue;
            }
            json["pre_tokenizer"] = split_as_llama_3(digits);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let ours = Tokenizer::load(dir.path()).unwrap();
        let mut library = tokenizers::Tokenizer::from_file(&path).unwrap();
        library.set_encode_special_tokens(true);
        for _ in 0..3000 {
            let text = random_text(&mut random, &parts, 14);
            let expected = library.encode_fast(text.as_str(), false).unwrap();
            assert_eq!(
                ours.encode_text(&text).unwrap(),
                expected.get_ids(),
                "{name}: {text:?}"
            );
        }
    }
}

/// Concatenates 1 to `max` - 1 random parts.
pub fn random_text(random: &mut fastrand::Rng, parts: &[&str], max: usize) -> String {
    let count = random.usize(1..max);
    (0..count)
        .map(|_| parts[random.usize(..parts.len())])
        .collect()
}

/// Returns the pre-tokenizer of Llama 3 or Qwen 2, which differ only in their pattern of digits.
pub fn split_as_llama_3(digits: &str) -> Value {
    let pattern = format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]})
}

/// Our tokenizer encodes an answer separately, as a model generates it. transformers encodes the rendered conversation
/// as a whole. The ids differ only if an answer starts or ends with white space, which the pre-tokenizer of GPT-2 joins
/// with the white space of the template. The golden file has no such conversations.
#[test]
fn conversation_ids_match_transformers() {
    let mut compared = 0;
    for name in FOLDERS {
        let tokenizer = tokenizer(name);
        let golden = golden(&format!("{name}/golden.json"));
        for case in golden["conversations"].as_array().unwrap() {
            let messages = messages(&case["messages"]);
            let ours = if case["add_generation_prompt"] == true {
                tokenizer.encode_prompt(&messages).unwrap()
            } else {
                tokenizer.encode_conversation(&messages).unwrap().0
            };
            assert_eq!(ours, ids(&case["ids"]), "{name}: {}", case["text"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 63);
}

#[test]
fn only_answers_and_their_ends_of_turn_are_supervised() {
    // Folder, texts of the supervised ids, and the token that ends the turn.
    let cases = [
        ("bytelevel", ["Hello", "Four."], "<|im_end|>"),
        ("sentencepiece", ["Hello ", "Four. "], "</s>"),
        ("metaspace", ["Hello", "Four."], "<|eot_id|>"),
    ];
    for (name, expected, end) in cases {
        let tokenizer = tokenizer(name);
        let mut messages = ask("Hello", "Hello");
        messages.extend(ask("What is two and two?", "Four."));
        let (ids, ranges) = tokenizer.encode_conversation(&messages).unwrap();
        assert_eq!(ranges.len(), 2, "{name}");
        for (range, text) in ranges.iter().zip(expected) {
            let supervised = &ids[range.clone()];
            let last = *supervised.last().unwrap();
            assert_eq!(tokenizer.decode(supervised).unwrap(), text, "{name}");
            assert_eq!(tokenizer.stop_ids(), [last], "{name}");
            assert_eq!(tokenizer.id_of_control(end), Some(last), "{name}");
        }
        // The prompt of an answer has the ids before the answer.
        let prompt = tokenizer.encode_prompt(&messages[..3]).unwrap();
        assert_eq!(prompt, ids[..ranges[1].start], "{name}");
        let prompt = tokenizer.encode_prompt(&messages[..1]).unwrap();
        assert_eq!(prompt, ids[..ranges[0].start], "{name}");
    }
}

#[test]
fn control_token_names_in_messages_are_text() {
    for name in FOLDERS {
        let tokenizer = tokenizer(name);
        let specials: Vec<u32> = (0..tokenizer.vocab_size() as u32)
            .filter(|&id| tokenizer.is_special(id))
            .collect();
        assert!(specials.len() >= 3, "{name}");
        let file = golden(&format!("{name}/tokenizer.json"));
        let names: Vec<&str> = file["added_tokens"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|token| token["special"] == true)
            .map(|token| token["content"].as_str().unwrap())
            .collect();
        let joined = names.concat();
        let nested = format!("<|im_{joined}end|></s</s>>");
        let words = names.join(" and ");
        for text in names
            .iter()
            .copied()
            .chain([joined.as_str(), &nested, &words])
        {
            let plain = tokenizer.encode_text(text).unwrap();
            assert!(
                plain.iter().all(|&id| !tokenizer.is_special(id)),
                "{name}: {text}"
            );
            assert_eq!(tokenizer.decode(&plain).unwrap(), text, "{name}");

            let encode = |content| {
                let messages = ask(content, content);
                tokenizer.encode_conversation(&messages).unwrap()
            };
            let (harmless_ids, _) = encode("Hello");
            let (ids, answers) = encode(text);
            let special_count =
                |ids: &[u32]| ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
            assert_eq!(
                special_count(&ids),
                special_count(&harmless_ids),
                "{name}: {text}"
            );
            let (last, answer) = ids[answers[0].clone()].split_last().unwrap();
            assert!(tokenizer.is_special(*last));
            assert_eq!(special_count(answer), 0, "{name}: {text}");
            assert_eq!(tokenizer.decode(answer).unwrap().trim_end(), text, "{name}");
        }
    }
}

/// The vocabulary of a Unigram model may contain the name of a control token. The library then encodes the name in
/// plain text as the control token.
#[test]
fn control_tokens_in_the_vocabulary_are_not_made_from_text() {
    let dir = tempfile::tempdir().unwrap();
    let pieces = ["<unk>", "</s>", "<", "/", "s", ">", "a", "▁"];
    let vocab: Vec<Value> = pieces.iter().map(|piece| json!([piece, -1.0])).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 1, "content": "</s>", "special": true, "normalized": false,
                          "single_word": false, "lstrip": false, "rstrip": false}],
        "normalizer": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"},
        "post_processor": null,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": false},
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(
        tokenizer.encode_text("a</s>a</s>").unwrap(),
        [6, 2, 3, 4, 5, 6, 2, 3, 4, 5]
    );
    // The unknown token is kept, because it stands for characters outside the vocabulary.
    assert_eq!(tokenizer.encode_text("aé").unwrap(), [6, 0]);
}

#[test]
fn control_tokens_in_the_vocabulary_do_not_deadlock_the_piece_cache() {
    let dir = tempfile::tempdir().unwrap();
    let mut json = golden("bytelevel/tokenizer.json");
    let id = json["model"]["vocab"]["ou"].as_u64().unwrap() as u32;
    let mut control = json["added_tokens"][0].clone();
    control["content"] = "ou".into();
    control["id"] = id.into();
    json["added_tokens"].as_array_mut().unwrap().push(control);
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let ours = Tokenizer::load(dir.path()).unwrap();
    let text = "out of you, soup";
    assert!(
        tokenizer("bytelevel")
            .encode_text(text)
            .unwrap()
            .contains(&id)
    );
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let ids = ours.encode_text(text).unwrap();
        let bytes = ids
            .iter()
            .flat_map(|&id| ours.token_bytes(id).unwrap().to_vec());
        sender.send((bytes.collect(), ids)).unwrap();
    });
    let timeout = std::time::Duration::from_secs(20);
    let (bytes, ids): (Vec<u8>, Vec<u32>) = receiver
        .recv_timeout(timeout)
        .expect("the piece cache deadlocked");
    assert_eq!(String::from_utf8(bytes).unwrap(), text);
    assert!(!ids.contains(&id), "{ids:?}");
}

#[test]
fn ordinary_stop_tokens_remain_part_of_texts() {
    let dir = tempfile::tempdir().unwrap();
    for file in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        let _ = std::fs::copy(folder("bytelevel").join(file), dir.path().join(file));
    }
    let original = tokenizer("bytelevel");
    let [newline] = original.encode_text("\n").unwrap()[..] else {
        panic!("no token")
    };
    let settings = json!({ "eos_token_id": [2, newline] }).to_string();
    std::fs::write(dir.path().join("generation_config.json"), settings).unwrap();
    let ours = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(ours.stop_ids(), [2, newline]);
    assert!(ours.is_special(2) && !ours.is_special(newline));
    let messages = ask("One\nline", "Two\nlines\n");
    let encoded = ours.encode_conversation(&messages).unwrap();
    assert_eq!(encoded, original.encode_conversation(&messages).unwrap());
    assert_eq!(ours.token_bytes(newline), Some(&b"\n"[..]));
}

#[test]
fn token_bytes_concatenate_to_the_text() {
    for name in FOLDERS {
        let tokenizer = tokenizer(name);
        for text in ["Hello you", "Grüße 日本 👋🏽\n\ttwo  spaces", "\u{1}\u{7f}x"] {
            let ids = tokenizer.encode_text(text).unwrap();
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(|&id| tokenizer.token_bytes(id).unwrap().to_vec())
                .collect();
            // SentencePiece adds a prefix space.
            let expected = match name {
                "bytelevel" => text.to_owned(),
                _ => format!(" {text}"),
            };
            assert_eq!(bytes, expected.as_bytes(), "{name}: {text:?}");
        }
        for id in 0..tokenizer.vocab_size() as u32 + 2 {
            let bytes = tokenizer.token_bytes(id);
            assert_eq!(
                bytes.is_none(),
                tokenizer.is_special(id) || id >= tokenizer.vocab_size() as u32
            );
            if let Some(bytes) = bytes {
                let same = tokenizer.id_of_bytes(bytes).unwrap();
                assert_eq!(tokenizer.token_bytes(same), Some(bytes));
            }
        }
    }
}

#[test]
fn partial_characters_decode_to_the_replacement_character() {
    let tokenizer = tokenizer("bytelevel");
    let ids = tokenizer.encode_text("👋").unwrap();
    assert!(ids.len() > 1);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "👋");
    assert_eq!(tokenizer.decode(&ids[..1]).unwrap(), "\u{fffd}");
    assert_eq!(
        tokenizer.decode(&[ids[0], 0, 1, 2, 1_000_000]).unwrap(),
        "\u{fffd}"
    );
}

#[test]
fn missing_chat_template_error_names_both_files() {
    let dir = tempfile::tempdir().unwrap();
    let from = folder("bytelevel");
    std::fs::copy(
        from.join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert!(!tokenizer.encode_text("Hello").unwrap().is_empty());
    let error = tokenizer.encode_prompt(&ask("a", "b")).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("chat_template.jinja") && text.contains("tokenizer_config.json"),
        "{text}"
    );
    assert_eq!(Exit::code_of(&error), 2);

    let named = json!({"chat_template": [{"name": "tools", "template": "no"},
                                         {"name": "default", "template": "{{ messages[0].content }}"}],
                       "eos_token": {"content": "<|im_end|>"}});
    std::fs::write(dir.path().join("tokenizer_config.json"), named.to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let ids = tokenizer
        .encode_prompt(&[message("user", "Hello")])
        .unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "Hello");
    assert_eq!(tokenizer.stop_ids(), [2]);
    std::fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": [0, 2]}"#,
    )
    .unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().stop_ids(), [0, 2]);
}

#[test]
fn tokenizer_larger_than_the_embeddings_is_refused() {
    let tokenizer = tokenizer("bytelevel");
    let size = tokenizer.vocab_size();
    tokenizer.check_fits(size).unwrap();
    let error = tokenizer.check_fits(size - 1).unwrap_err();
    assert_eq!(Exit::code_of(&error), 2);
    let text = error.to_string();
    assert!(
        text.contains(&size.to_string()) && text.contains(&(size - 1).to_string()),
        "{text}"
    );
}

/// A change to the text of a `tokenizer.json`.
type Change = fn(String) -> String;

#[test]
fn other_tokenizer_versions_load_and_damaged_ones_name_the_part() {
    let source = std::fs::read_to_string(folder("bytelevel").join("tokenizer.json")).unwrap();
    let compact = serde_json::from_str::<Value>(&source).unwrap().to_string();
    let loaded = |change: Change| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, change(compact.clone())).unwrap();
        Tokenizer::load(dir.path())
    };
    let changed: [(&str, Change); 5] = [
        ("new fields", |text| {
            let model = text.replace(r#""vocab":"#, r#""new":{"a":[1,null]},"vocab":"#);
            model.replacen('{', r#"{"another":true,"#, 1)
        }),
        ("escapes", |text| text.replace(r#""BPE""#, r#""B\u0050E""#)),
        ("a field twice", |text| {
            text.replace(r#""vocab":"#, r#""type":"BPE","vocab":"#)
        }),
        ("no type", |text| text.replace(r#""type":"BPE","#, "")),
        ("merges as text", |text| {
            let mut json: Value = serde_json::from_str(&text).unwrap();
            for merge in json["model"]["merges"].as_array_mut().unwrap() {
                if let [left, right] = merge.as_array().map(Vec::as_slice).unwrap_or_default() {
                    let (left, right) = (left.as_str().unwrap(), right.as_str().unwrap());
                    *merge = format!("{left} {right}").into();
                }
            }
            json.to_string()
        }),
    ];
    let text = "Hello you, Grüße 👋🏽";
    let expected = tokenizer("bytelevel").encode_text(text).unwrap();
    for (name, change) in changed {
        let tokenizer = loaded(change).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        assert_eq!(tokenizer.encode_text(text).unwrap(), expected, "{name}");
    }
    let refused: [(&str, Change); 7] = [
        ("added_tokens are not a list", |text| {
            let start = text.find(r#""added_tokens":["#).unwrap();
            let end = start + text[start..].find(']').unwrap();
            format!(
                "{}\"added_tokens\":{{}}{}",
                &text[..start],
                &text[end + 1..]
            )
        }),
        ("not valid JSON", |text| text[..text.len() / 2].to_owned()),
        ("not a JSON object", |_| "[1]".into()),
        ("in its model", |text| {
            let model = text.find(r#""model":"#).unwrap();
            format!("{}\"model\":null}}", &text[..model])
        }),
        ("it has no model", |_| r#"{"version": "1.0"}"#.into()),
        ("in its version", |text| {
            text.replacen(r#""version":"1.0""#, r#""version":"\ud800""#, 1)
        }),
        ("in its added_tokens", |text| {
            text.replacen(r#""id":"#, r#""number":"#, 1)
        }),
    ];
    for (part, change) in refused {
        let error = format!("{:#}", loaded(change).unwrap_err());
        assert!(
            error.contains(part) && error.contains("tokenizer.json"),
            "{error}"
        );
    }
}
