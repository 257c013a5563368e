//! Checks of the soft labels and the choice of their divergence, with the real binary.

use std::path::Path;
use std::process::Command;

use distill::cache::record::{Logprobs, Record};
use serde_json::{Value, json};

use crate::data::dataset::{record, write_cache};
use crate::tiny;

/// Returns answers of 30 tokens by a teacher that mostly emits one of two tokens. Each position has its own
/// distribution. The token of a position is sampled from the distribution `shift` positions earlier, in which the
/// probability of the most likely token is raised by `sharpening`. `params` are sampling parameters of the requests.
fn answers(count: usize, shift: usize, sharpening: f32, params: &Value) -> Vec<Record> {
    let mut random = fastrand::Rng::with_seed(21);
    let tokens = ["in", "he", "a", "b"];
    let answer = |number: usize, random: &mut fastrand::Rng| {
        let distributions: Vec<(usize, f32)> = (0..30)
            .map(|_| (random.usize(..2), 0.5 + 0.4 * random.f32()))
            .collect();
        let mut text = String::new();
        let mut logprobs = Logprobs::default();
        for at in 0..30 {
            let (first, p) = distributions[at];
            let (likely, probability) = distributions[(at + 30 - shift) % 30];
            let token = match random.f32() {
                x if x < probability + sharpening => tokens[likely],
                x if x < 0.95 => tokens[1 - likely],
                _ => tokens[2 + random.usize(..2)],
            };
            text.push_str(token);
            let top = [(tokens[first], p), (tokens[1 - first], 0.95 - p)];
            let listed = top.iter().find(|(listed, _)| *listed == token);
            let token_probability = listed.map_or(0.025, |(_, probability)| *probability);
            logprobs.token.push(token.into());
            logprobs.logprob.push(Some(token_probability.ln()));
            let top_tokens = top.iter().map(|(token, _)| (*token).into());
            logprobs.top.push(top_tokens.collect());
            let top_logprobs = top.iter().map(|(_, probability)| Some(probability.ln()));
            logprobs.top_logprob.push(top_logprobs.collect());
        }
        logprobs.matches_text = true;
        let mut record = Record {
            logprobs: Some(logprobs),
            ..record(&format!("prompt {number}"), &text)
        };
        for (name, value) in params.as_object().unwrap() {
            record.request[name] = value.clone();
        }
        record
    };
    (0..count)
        .map(|number| answer(number, &mut random))
        .collect()
}

/// Runs `distill train` on the records. Returns its exit status and output.
fn train(records: &[Record], kd: &str, arguments: &[&str]) -> (i32, String) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    tiny::write_model(&model, 1, 256);
    write_cache(&dir.path().join("cache"), records);
    train_in(dir.path(), kd, arguments)
}

fn train_in(dir: &Path, kd: &str, arguments: &[&str]) -> (i32, String) {
    let config = format!(
        "[student]\ninit = \"random\"\npath = \"model\"\nhidden_size = 16\nintermediate_size = 32\n\
         num_hidden_layers = 1\nnum_attention_heads = 2\nnum_key_value_heads = 1\n[data]\n\
         cache = \"cache\"\n[loss]\nkd = \"{kd}\"\n[train]\nsteps = 2\nbatch_size = 4\nthreads = 1\n"
    );
    std::fs::write(dir.join("run.toml"), config).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(["train", "-c", "run.toml"])
        .args(arguments)
        .current_dir(dir)
        .output()
        .unwrap();
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8(printed).unwrap();
    (output.status.code().unwrap(), printed)
}

#[test]
fn logprobs_shifted_by_one_position_are_refused_unless_forced() {
    let plain = json!({"temperature": 1.0});
    let (status, printed) = train(&answers(40, 0, 0.0, &plain), "tail", &[]);
    assert!(status == 0 && printed.contains("expected"), "{printed}");
    let shifted = answers(40, 1, 0.0, &plain);
    let (status, printed) = train(&shifted, "tail", &[]);
    assert_eq!(status, 2, "{printed}");
    assert!(
        printed.contains("--force") && printed.contains("do not belong"),
        "{printed}"
    );
    let (status, printed) = train(&shifted, "none", &[]);
    assert_eq!(status, 0, "{printed}");
    let (status, printed) = train(&shifted, "tail", &["--force"]);
    assert!(
        status == 0 && printed.contains("because of --force"),
        "{printed}"
    );
}

/// Each record gets the answer of the next one, so its logprobs belong to another text.
#[test]
fn unusable_logprobs_are_refused_with_the_reason_unless_forced() {
    let mut records = answers(20, 0, 0.0, &json!({"temperature": 1.0}));
    let texts: Vec<String> = records
        .iter()
        .map(|record| record.answer.text.clone())
        .collect();
    for (record, text) in records.iter_mut().zip(texts.into_iter().cycle().skip(1)) {
        record.answer.text = text;
    }
    let (status, printed) = train(&records, "tail", &[]);
    assert_eq!(status, 2, "{printed}");
    assert!(
        printed.contains("20 of 20 answers cannot be used") && printed.contains("do not spell"),
        "{printed}"
    );
    let (status, printed) = train(&records, "none", &[]);
    assert_eq!(status, 0, "{printed}");
    let (status, printed) = train(&records, "tail", &["--force"]);
    assert_eq!(status, 0, "{printed}");
}

#[test]
fn auto_reports_the_chosen_divergence() {
    let records = |temperature: f64| answers(40, 0, 0.0, &json!({"temperature": temperature}));
    let (status, printed) = train(&records(1.0), "auto", &[]);
    assert_eq!(status, 0, "{printed}");
    assert!(
        printed.contains("damped 0.35, weight 1, because all answers were sampled"),
        "{printed}"
    );
    let (_, printed) = train(&records(0.7), "auto", &[]);
    assert!(
        printed.contains("tail, weight 0.8, because no answer is an exact sample"),
        "{printed}"
    );
    // The answers are sampled from a sharper distribution than their logprobs describe.
    let sharpened = answers(40, 0, 0.3, &json!({"temperature": 1.0}));
    let (status, printed) = train(&sharpened, "auto", &[]);
    assert_eq!(status, 0, "{printed}");
    assert!(
        printed.contains("sampled from a sharper distribution"),
        "{printed}"
    );
    let (status, printed) = train(&sharpened, "unbiased", &[]);
    assert_eq!(status, 2, "{printed}");
    let (status, printed) = train(&records(0.7), "unbiased", &[]);
    assert!(
        status == 2 && printed.contains("temperature 1"),
        "{printed}"
    );
    for kd in [
        "temperature",
        "reverse_kl",
        "jsd",
        "skew_kl",
        "skew_reverse_kl",
        "tvd",
    ] {
        let (status, printed) = train(&records(0.7), kd, &[]);
        assert_eq!(status, 0, "{kd}: {printed}");
    }
}

#[test]
fn vocabulary_without_token_bytes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    tiny::write_model(&model, 1, 256);
    write_cache(&dir.path().join("cache"), &answers(8, 0, 0.0, &json!({})));
    let path = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].clone();
    tokenizer["model"] = json!({
        "type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": vocabulary,
    });
    tokenizer["pre_tokenizer"] = json!({"type": "BertPreTokenizer"});
    tokenizer["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let (status, printed) = train_in(dir.path(), "tail", &[]);
    assert!(status == 2 && printed.contains("WordPiece"), "{printed}");
    assert!(printed.contains("loss.kd = \"none\""), "{printed}");
    let (status, printed) = train_in(dir.path(), "none", &[]);
    assert_eq!(status, 0, "{printed}");
}
