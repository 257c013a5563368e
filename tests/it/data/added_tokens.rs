//! Added tokens that are not control tokens: `<think>`, `[NAME]`, custom tokens.

use distill::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::tokenizer::{random_text, split_as_llama_3};
use super::{FOLDERS, ask, folder, golden};

fn added(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "special": false, "normalized": false,
           "single_word": false, "lstrip": false, "rstrip": false})
}

/// Returns the id that the crate `tokenizers` assigns to the next added token.
fn next_id(tokenizer: &Value) -> usize {
    let size = tokenizer["model"]["vocab"].as_object().unwrap().len();
    let added = tokenizer["added_tokens"].as_array().unwrap().iter();
    let ids = added.map(|token| token["id"].as_u64().unwrap() as usize + 1);
    ids.max().unwrap().max(size)
}

/// Creates a folder with this tokenizer and more added tokens. Returns the folder and the ids of the added tokens.
fn with_added(mut tokenizer: Value, tokens: &[Value]) -> (TempDir, Vec<u32>) {
    let dir = tempfile::tempdir().unwrap();
    for token in tokens {
        let mut token = token.clone();
        token["id"] = next_id(&tokenizer).into();
        tokenizer["added_tokens"]
            .as_array_mut()
            .unwrap()
            .push(token);
    }
    let path = dir.path().join("tokenizer.json");
    std::fs::write(path, tokenizer.to_string()).unwrap();
    let library = library(&dir);
    let ids = tokens
        .iter()
        .map(|token| library.token_to_id(token["content"].as_str().unwrap()))
        .collect::<Option<_>>();
    (dir, ids.unwrap())
}

fn library(dir: &TempDir) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap()
}

#[test]
fn added_tokens_are_matched_before_words_are_split() {
    let (dir, ids) = with_added(
        golden("bytelevel/tokenizer.json"),
        &["<idea>", "</idea>", "[NAME]"].map(|name| added(0, name)),
    );
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let encode = |text: &str| tokenizer.encode_text(text).unwrap();
    let [idea, end, name] = ids[..] else {
        panic!("{ids:?}")
    };
    assert_eq!(
        encode("a [NAME] b"),
        [encode("a "), vec![name], encode(" b")].concat()
    );
    let newlines = encode("\n\n");
    assert_eq!(
        encode("<idea>\n\n</idea>\n\n"),
        [vec![idea], newlines.clone(), vec![end], newlines].concat()
    );
}

/// Added tokens with random flags, and random texts with and without them.
#[test]
fn ids_of_texts_with_added_tokens_match_the_library() {
    let mut random = fastrand::Rng::with_seed(7);
    let names = [
        "<idea>",
        "</idea>",
        "[NAME]",
        "two words",
        "é",
        "ab",
        "<|x|",
        "\n\n",
        "  ",
    ];
    let parts = [
        " ",
        "  ",
        "\n",
        "a",
        "b",
        "ab",
        "the",
        "don't",
        "1",
        "234",
        ".",
        "<",
        "idea",
        ">",
        "<idea>",
        "</idea>",
        "[NAME]",
        "two words",
        "e\u{301}",
        "é",
        "日本",
        "<|x|",
        "<|im_end|>",
        "\u{338}",
    ];
    let patterns = [None, Some(r"\p{N}{1,3}"), Some(r"\p{N}")];
    let normalizers = [None, Some(json!({"type": "NFC"}))];
    let mut texts_with_added = 0;
    for round in 0..60 {
        for name in FOLDERS {
            let mut json = golden(&format!("{name}/tokenizer.json"));
            if name == "bytelevel" {
                if let Some(digits) = patterns[round % 3] {
                    json["pre_tokenizer"] = split_as_llama_3(digits);
                }
                if let Some(normalizer) = &normalizers[round % 2] {
                    json["normalizer"] = normalizer.clone();
                }
            }
            // Half of the tokenizers have added tokens without flags, which is the usual case.
            let is_plain = random.bool();
            let mut tokens = Vec::new();
            for name in names {
                if random.bool() {
                    continue;
                }
                let mut token = added(0, name);
                for flag in ["normalized", "single_word", "lstrip", "rstrip"] {
                    token[flag] = (!is_plain && random.u8(..4) == 0).into();
                }
                tokens.push(token);
            }
            let (dir, ids) = with_added(json, &tokens);
            let ours = Tokenizer::load(dir.path()).unwrap();
            let mut library = library(&dir);
            library.set_encode_special_tokens(true);
            for _ in 0..60 {
                let text = random_text(&mut random, &parts, 12);
                let expected = library.encode_fast(text.as_str(), false).unwrap();
                let expected = expected.get_ids();
                texts_with_added += usize::from(expected.iter().any(|id| ids.contains(id)));
                assert_eq!(
                    ours.encode_text(&text).unwrap(),
                    expected,
                    "{name} {round}: {text:?} with {tokens:?}"
                );
            }
        }
    }
    assert!(texts_with_added > 3_000, "{texts_with_added}");
}

/// The folders include tokenizers that add a prefix space, and templates that write text before the answer.
#[test]
fn answers_with_added_tokens_match_the_encoded_conversation() {
    for name in FOLDERS {
        for is_normalized in [false, true] {
            let tokens = ["<tool>", "</tool>"].map(|name| {
                let mut token = added(0, name);
                token["normalized"] = is_normalized.into();
                token
            });
            let (dir, ids) = with_added(golden(&format!("{name}/tokenizer.json")), &tokens);
            let config = folder(name).join("tokenizer_config.json");
            let template = folder(name).join("chat_template.jinja");
            for file in [config, template] {
                if file.exists() {
                    std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
                }
            }
            let ours = Tokenizer::load(dir.path()).unwrap();
            let library = library(&dir);
            for answer in [
                "Look: <tool>x</tool> and more",
                "<tool>x</tool>",
                "x<tool> <tool>y",
            ] {
                let messages = ask("Use <tool>a</tool> it", answer);
                let (encoded, ranges) = ours.encode_conversation(&messages).unwrap();
                assert!(encoded.contains(&ids[0]), "{name}: {answer}");
                let text = ours.render(&messages).unwrap();
                let expected = library.encode_fast(text.as_str(), false).unwrap();
                assert_eq!(encoded, expected.get_ids(), "{name}: {text:?}");
                assert!(
                    encoded[ranges[0].clone()].contains(&ids[0]),
                    "{name}: {answer}"
                );
            }
        }
    }
}

#[test]
fn added_tokens_of_other_files_are_loaded() {
    let tokenizer = golden("bytelevel/tokenizer.json");
    let next = next_id(&tokenizer);
    let listed = json!({"added_tokens_decoder": {
        next.to_string(): {"content": "<idea>", "special": false, "normalized": false},
        (next + 1).to_string(): {"content": "<|new|>", "special": true},
    }});
    let legacy = json!({"<|new|>": next + 1, "<idea>": next});
    let special = json!({"additional_special_tokens": ["<|new|>"]});
    for (files, name) in [
        (
            vec![("tokenizer_config.json", listed)],
            "tokenizer_config.json",
        ),
        (
            vec![
                ("added_tokens.json", legacy),
                ("special_tokens_map.json", special),
            ],
            "added_tokens.json",
        ),
    ] {
        let (dir, _) = with_added(tokenizer.clone(), &[]);
        for (file, content) in files {
            std::fs::write(dir.path().join(file), content.to_string()).unwrap();
        }
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let ids = tokenizer.encode_text("a<idea>b<|new|>").unwrap();
        assert_eq!(ids[1], next as u32, "{name}");
        assert_eq!(tokenizer.vocab_size(), next + 2, "{name}");
        let new = next as u32 + 1;
        assert!(tokenizer.is_special(new) && !ids.contains(&new), "{name}");
    }
}

/// As in Gemma 3: runs of spaces are in the vocabulary and are added tokens as well.
#[test]
fn added_tokens_in_the_vocabulary_have_the_bytes_of_its_spelling() {
    let mut json = golden("sentencepiece/tokenizer.json");
    let runs: Vec<String> = (2..6).map(|length| "▁".repeat(length)).collect();
    for run in &runs {
        let ids = json["model"]["vocab"].as_object().unwrap().values();
        let id = ids.map(|id| id.as_u64().unwrap() as usize).max().unwrap() + 1;
        json["model"]["vocab"][run] = id.into();
        json["added_tokens"]
            .as_array_mut()
            .unwrap()
            .push(added(id, run));
    }
    for length in 2..6 {
        let merge = json!(["▁", "▁".repeat(length - 1)]);
        json["model"]["merges"]
            .as_array_mut()
            .unwrap()
            .insert(0, merge);
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let ids = tokenizer.encode_text("a     b").unwrap();
    let bytes: Vec<&[u8]> = ids
        .iter()
        .map(|id| tokenizer.token_bytes(*id).unwrap())
        .collect();
    assert_eq!(bytes.concat(), b" a     b");
    assert!(bytes.contains(&&b"  "[..]), "{bytes:?}");
    let id = tokenizer.id_of_bytes(b"  ").unwrap();
    assert_eq!(tokenizer.token_name(id), "▁▁");
}

/// An added token that strips white space may overlap the next added token.
#[test]
fn overlapping_added_tokens_are_all_found() {
    for name in FOLDERS {
        let mut stripping = added(0, "  ");
        stripping["rstrip"] = true.into();
        let (dir, ids) = with_added(golden(&format!("{name}/tokenizer.json")), &[stripping]);
        let template =
            "{{ messages[0].content }}:{% if messages[1] %}{{ messages[1].content }}{% endif %}";
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let ours = Tokenizer::load(dir.path()).unwrap();
        let (encoded, _) = ours.encode_conversation(&ask("a", "a    b")).unwrap();
        let count = encoded.iter().filter(|id| ids.contains(id)).count();
        let mut library = library(&dir);
        library.set_encode_special_tokens(true);
        let expected = library.encode_fast("a    b", false).unwrap();
        let expected = expected.get_ids().iter().filter(|id| ids.contains(id));
        assert_eq!(count, expected.count(), "{name}: {encoded:?}");
    }
}
