//! Generation of answers to a list of prompts in batches.

use distill::model::Model;
use distill::model::batcher::{FinishReason, GenerateOptions};
use distill::model::generate::{Generated, batch};
use distill::model::sampling::SamplingParams;
use distill::tokenizer::Tokenizer;

use crate::tiny;

const CONTEXT: usize = 1500;

struct Fixture {
    model: Model,
    tokenizer: Tokenizer,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        tiny::write_model(folder.path(), 2, CONTEXT);
        Self {
            model: Model::load(folder.path()).unwrap(),
            tokenizer: Tokenizer::load(folder.path()).unwrap(),
        }
    }

    fn batch(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        size: usize,
    ) -> Vec<Generated> {
        batch(&self.model, &self.tokenizer, prompts, options, size).unwrap()
    }
}

fn options(temperature: f64, max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        max_tokens,
        sampling: SamplingParams {
            temperature,
            ..SamplingParams::default()
        },
        ..GenerateOptions::default()
    }
}

/// Returns prompts of 1 to 1,401 tokens. The longest ones are encoded in several steps.
fn prompts() -> Vec<Vec<u32>> {
    (0..8)
        .map(|index| {
            (0..=200 * index)
                .map(|token| (token * 7 + index) % 256)
                .collect()
        })
        .collect()
}

#[test]
fn generated_answers_do_not_depend_on_batch_size() {
    let fixture = Fixture::new();
    for temperature in [0.0, 1.0] {
        let options = options(temperature, 60);
        let unbatched = fixture.batch(&prompts(), &options, 1);
        for size in [3, 8, 100] {
            assert_eq!(fixture.batch(&prompts(), &options, size), unbatched);
        }
    }
}

#[test]
fn generated_answers_report_every_token() {
    let fixture = Fixture::new();
    let prompts: Vec<Vec<u32>> = (0..40).map(|index| vec![index]).collect();
    let options = GenerateOptions {
        top_logprobs: Some(2),
        ..options(1.0, 150)
    };
    let answers = fixture.batch(&prompts, &options, 16);
    let end_of_turn = tiny::VOCABULARY as u32 - 1;
    for answer in &answers {
        let is_ended = answer.ids.last() == Some(&end_of_turn);
        assert_eq!(is_ended, answer.finish_reason == FinishReason::Stop);
        assert!(is_ended || answer.ids.len() == 150);
        let content = &answer.ids[..answer.ids.len() - usize::from(is_ended)];
        let token_logprobs = answer.token_logprobs.iter();
        assert!(answer.ids.iter().eq(token_logprobs.map(|token| &token.id)));
        let bytes: Vec<u8> = content
            .iter()
            .filter_map(|&id| fixture.tokenizer.token_bytes(id))
            .flatten()
            .copied()
            .collect();
        assert_eq!(answer.text, String::from_utf8_lossy(&bytes));
        assert!(
            answer.ids.iter().all(|&id| id <= end_of_turn),
            "a padding token was emitted"
        );
    }
    for finish_reason in [FinishReason::Stop, FinishReason::Length] {
        assert!(
            answers
                .iter()
                .any(|answer| answer.finish_reason == finish_reason)
        );
    }
}

#[test]
fn context_length_limits_generated_answer() {
    let fixture = Fixture::new();
    let prompts = [vec![1; CONTEXT - 5], vec![1; CONTEXT], vec![1; 3]];
    let answers = fixture.batch(&prompts, &options(0.0, 9), 2);
    let lengths: Vec<usize> = answers.iter().map(|answer| answer.ids.len()).collect();
    assert_eq!(lengths, [5, 0, 9]);
    assert!(
        answers
            .iter()
            .all(|answer| answer.finish_reason == FinishReason::Length)
    );
}
