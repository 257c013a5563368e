//! Batches, the order of the examples, and micro-batches.

use distill::config::{Config, TrainConfig};
use distill::data::batch::{Batch, BatchSampler, Cursor, micro_batches};
use distill::data::prepared::shard::ExampleView;
use serde_json::json;

use super::dataset::load;
use super::{ask, tokenizer};

#[test]
fn epochs_take_each_example_once_in_different_orders() {
    let mut batches = BatchSampler::new(10, 4, 3, Cursor::default()).unwrap();
    let indices: Vec<usize> = (0..5).flat_map(|_| batches.next_step()).collect();
    let (first, second) = indices.split_at(10);
    for epoch in [first, second] {
        let mut sorted = epoch.to_vec();
        sorted.sort();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
    assert_ne!(first, second);
    let with_other_seed = BatchSampler::new(10, 10, 4, Cursor::default())
        .unwrap()
        .next_step();
    assert_ne!(first, with_other_seed);
}

#[test]
fn resumed_batches_match_uninterrupted_ones() {
    let run = |batches: &mut BatchSampler, steps: usize| -> Vec<Vec<usize>> {
        (0..steps).map(|_| batches.next_step()).collect()
    };
    let mut uninterrupted = BatchSampler::new(7, 3, 5, Cursor::default()).unwrap();
    let expected = run(&mut uninterrupted, 12);
    for stop in 0..12 {
        let mut before = BatchSampler::new(7, 3, 5, Cursor::default()).unwrap();
        run(&mut before, stop);
        let saved = serde_json::to_string(&before.cursor()).unwrap();
        let cursor = serde_json::from_str(&saved).unwrap();
        let mut after = BatchSampler::new(7, 3, 5, cursor).unwrap();
        assert_eq!(run(&mut after, 12 - stop), expected[stop..]);
    }
    assert!(BatchSampler::new(7, 3, 5, Cursor { epoch: 0, index: 8 }).is_err());
    assert!(BatchSampler::new(0, 3, 5, Cursor::default()).is_err());
}

/// Also checks that the segments and positions of a micro-batch are those of its examples, one after another.
#[test]
fn micro_batches_contain_each_example_once_within_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..60)
        .map(|i| {
            let answer = "word ".repeat(1 + i * i % 37);
            format!("{}\n", json!({"messages": ask("Hello", &answer)}))
        })
        .collect();
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.source = Some(dir.path().join("rows.jsonl"));
    config.data.validation_share = 0.0;
    std::fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
    let data = load(&config, &tokenizer("bytelevel")).unwrap();
    let examples: Vec<ExampleView> = data.train().iter().collect();
    assert_eq!(examples.len(), 60);
    let longest = examples.iter().map(|e| e.tokens()).max().unwrap();
    let total: usize = examples.iter().map(|e| e.tokens()).sum();

    for tokens in [0, 1, longest - 1, longest, 200, 500, total] {
        let settings = TrainConfig {
            micro_batch_size: 7,
            micro_batch_tokens: tokens,
            ..TrainConfig::default()
        };
        let micro_batches = micro_batches(&examples, &settings);
        let mut keys = Vec::new();
        for micro_batch in &micro_batches {
            let batch = Batch::new(micro_batch.iter().copied());
            match tokens {
                0 => assert!(micro_batch.len() <= 7),
                _ => assert!(batch.input_ids_T.len() <= tokens || micro_batch.len() == 1),
            }
            let mut start = 0;
            let mut targets = 0;
            for (example, segment) in micro_batch.iter().zip(&batch.segments_B) {
                let alone = Batch::new([*example]);
                assert_eq!(*segment, start..start + alone.input_ids_T.len());
                assert_eq!(batch.input_ids_T[segment.clone()], alone.input_ids_T);
                for (at, position) in alone.positions_N.iter().enumerate() {
                    assert_eq!(batch.positions_N[targets + at], start as u32 + position);
                }
                start = segment.end;
                targets += alone.positions_N.len();
            }
            assert_eq!(
                (start, targets),
                (batch.input_ids_T.len(), batch.labels_N.len())
            );
            keys.extend(batch.keys_B);
        }
        match tokens {
            0 => assert_eq!(micro_batches.len(), 60usize.div_ceil(7)),
            1 => assert_eq!(micro_batches.len(), 60),
            // First fit leaves at most one micro-batch that is at most half full.
            _ => assert!(tokens < longest || micro_batches.len() <= 2 * total.div_ceil(tokens)),
        }
        keys.sort();
        let mut expected: Vec<&str> = examples.iter().map(|e| e.key()).collect();
        expected.sort();
        assert_eq!(keys, expected, "{tokens}");
    }
}
