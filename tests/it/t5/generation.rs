//! Generation with an encoder-decoder.

use distill::model::batcher::{FinishReason, GenerateOptions};
use distill::model::generate;
use distill::model::sampling::SamplingParams;
use distill::model::{Model, ModelInput, SourceInput};
use distill::tokenizer::Tokenizer;

use super::{golden, read_golden, write_json, write_model, write_tokenizer};

/// The sources of `generate.json` and transformers' greedy answers to them.
struct GoldenAnswers {
    model: Model,
    tokenizer: Tokenizer,
    sources: Vec<Vec<u32>>,
    answers: Vec<Vec<u32>>,
    max_tokens: usize,
    _dir: tempfile::TempDir,
}

impl GoldenAnswers {
    fn load() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let json = read_golden("generate.json");
        write_json(&dir.path().join("config.json"), &json["config"]);
        std::fs::copy(
            golden("generate.safetensors"),
            dir.path().join("model.safetensors"),
        )
        .unwrap();
        write_tokenizer(dir.path());
        let ids = |value: &serde_json::Value| serde_json::from_value(value.clone()).unwrap();
        let sequences = json["sequences"].as_array().unwrap();
        Self {
            model: Model::load(dir.path()).unwrap(),
            tokenizer: Tokenizer::load(dir.path()).unwrap(),
            sources: sequences.iter().map(|s| ids(&s["source"])).collect(),
            answers: sequences.iter().map(|s| ids(&s["generated"])).collect(),
            max_tokens: json["max_new_tokens"].as_u64().unwrap() as usize,
            _dir: dir,
        }
    }
}

/// The answers of `generate::batch` would be limited to the tokens of the tiny vocabulary, which is smaller.
#[test]
fn greedy_answers_equal_those_of_transformers() {
    let golden = GoldenAnswers::load();
    assert_eq!(golden.sources.len(), 20);
    let model = &golden.model;
    let sources: Vec<&[u32]> = golden.sources.iter().map(Vec::as_slice).collect();
    let mut caches = model.encode_sources(&sources).unwrap();
    let start = golden.tokenizer.decoder_start().unwrap();
    let mut answers: Vec<Vec<u32>> = vec![Vec::new(); sources.len()];
    for _ in 0..golden.max_tokens {
        let is_open = |answer: &Vec<u32>| answer.last() != Some(&1);
        let open: Vec<usize> = (0..answers.len())
            .filter(|&i| is_open(&answers[i]))
            .collect();
        let tokens: Vec<[u32; 1]> = open
            .iter()
            .map(|&i| [*answers[i].last().unwrap_or(&start)])
            .collect();
        let tokens: Vec<&[u32]> = tokens.iter().map(|token| token.as_slice()).collect();
        let mut open_caches: Vec<_> = caches
            .iter_mut()
            .enumerate()
            .filter(|(index, _)| open.contains(index))
            .map(|(_, cache)| cache)
            .collect();
        let logits = model.step(&tokens, &mut open_caches).unwrap();
        for (logits, &index) in logits.chunks(logits.len() / open.len()).zip(&open) {
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            answers[index].push(best.unwrap() as u32);
        }
    }
    assert_eq!(answers, golden.answers);
}

/// The logits of incremental decoding equal those of one pass over the whole answer. A wrong position of the query in
/// the relative bias would change them.
#[test]
fn decoding_step_by_step_gives_the_logits_of_one_pass() {
    let golden = GoldenAnswers::load();
    let model = &golden.model;
    for (source, answer) in golden.sources.iter().zip(&golden.answers) {
        let ids: Vec<u32> = [0].into_iter().chain(answer.iter().copied()).collect();
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let (decoder_segment, source_segment) = (0..ids.len(), 0..source.len());
        let input = ModelInput {
            input_ids_T: &ids,
            segments_B: std::slice::from_ref(&decoder_segment),
            positions_N: &positions,
            source: SourceInput {
                ids_U: source,
                segments_B: std::slice::from_ref(&source_segment),
            },
        };
        let expected = model.map_logits(input, |_, row| row.to_vec()).unwrap();
        let mut caches = model.encode_sources(&[source]).unwrap();
        for (id, expected) in ids.iter().zip(&expected) {
            let logits = model.step(&[&[*id]], &mut [&mut caches[0]]).unwrap();
            crate::model::assert_close(&logits, expected, 1e-4);
        }
    }
}

#[test]
fn answer_does_not_depend_on_other_answers_in_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), 3);
    let model = Model::load(dir.path()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    // The longest sources exceed the tokens of one step.
    let prompts: Vec<Vec<u32>> = (0..12)
        .map(|i| (0..1 + 70 * i).map(|t| (t * 7 + i) % 50).collect())
        .collect();
    for temperature in [0.0, 1.0] {
        let options = GenerateOptions {
            max_tokens: 9,
            sampling: SamplingParams {
                temperature,
                ..SamplingParams::default()
            },
            top_logprobs: Some(3),
            ..GenerateOptions::default()
        };
        let generate =
            |size| generate::batch(&model, &tokenizer, &prompts, &options, size).unwrap();
        let alone = generate(1);
        assert!(alone.iter().all(|answer| !answer.ids.is_empty()));
        for size in [3, 12] {
            let together = generate(size);
            for (alone, together) in alone.iter().zip(&together) {
                assert_eq!(alone.ids, together.ids);
                assert_eq!(alone.text, together.text);
            }
        }
    }
}

/// The tokenizer writes a space before each text, which is not part of the answer.
#[test]
fn answer_has_no_space_before_its_first_word() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), 3);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let ids = tokenizer.encode_text("the cat").unwrap();
    assert_eq!(tokenizer.answer_bytes(ids[0], true), Some(&b"the"[..]));
    assert_eq!(tokenizer.answer_bytes(ids[1], false), Some(&b" cat"[..]));
    assert_eq!(tokenizer.answer_bytes(ids[0], false), Some(&b" the"[..]));
    let model = Model::load(dir.path()).unwrap();
    let options = GenerateOptions {
        max_tokens: 5,
        sampling: SamplingParams {
            temperature: 1.0,
            ..SamplingParams::default()
        },
        ..GenerateOptions::default()
    };
    let prompts: Vec<Vec<u32>> = (0..200).map(|i| vec![3 + i % 40, 1]).collect();
    let (mut words, mut controls) = (0, 0);
    for answer in generate::batch(&model, &tokenizer, &prompts, &options, 8).unwrap() {
        let bytes = tokenizer.token_bytes(answer.ids[0]);
        controls += usize::from(bytes.is_none() && answer.ids[0] != 1);
        words += usize::from(bytes.is_some_and(|bytes| bytes.len() > 1 && bytes[0] == b' '));
        // The space of the first token with text, which may follow a control token.
        let text = answer
            .ids
            .iter()
            .filter_map(|&id| tokenizer.token_bytes(id));
        let text = text.collect::<Vec<_>>().concat();
        let text = text.strip_prefix(b" ").unwrap_or(&text);
        assert_eq!(answer.text.as_bytes(), text, "{:?}", answer.ids);
        if answer.ids.len() == 5 && !answer.ids.contains(&1) {
            assert_eq!(answer.finish_reason, FinishReason::Length);
        }
    }
    assert!(words > 20, "{words} answers begin with a word");
    assert!(
        controls > 3,
        "{controls} answers begin with a control token"
    );
}
