//! Examples laid end to end for one forward pass.

use std::ops::Range;

use super::example::Example;

/// B examples of T tokens in all, one after the other without padding. Attention stays inside a
/// segment and positions start at 0 in each, so an example's result does not depend on its
/// neighbours. N is the number of supervised positions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// (T)
    pub input_ids: Vec<u32>,
    /// Where each example lies in `input_ids` (B).
    pub segments: Vec<Range<usize>>,
    /// Index in `input_ids` of each supervised position (N).
    pub positions: Vec<u32>,
    /// The token that each must predict (N).
    pub labels: Vec<u32>,
    /// Soft labels of position n are `soft_ids[soft_offsets[n]..soft_offsets[n + 1]]`; an empty
    /// range means none (N + 1).
    pub soft_offsets: Vec<usize>,
    pub soft_ids: Vec<u32>,
    pub soft_logprobs: Vec<f32>,
    /// Keys of the examples, for error messages (B).
    pub keys: Vec<String>,
}

impl Batch {
    /// Lays `examples` end to end.
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut batch = Batch {
            soft_offsets: vec![0],
            ..Batch::default()
        };
        for example in examples {
            let start = batch.input_ids.len();
            batch.input_ids.extend_from_slice(&example.input_ids);
            batch.segments.push(start..batch.input_ids.len());
            batch.keys.push(example.key.clone());
            for target in &example.targets {
                batch.positions.push((start + target.position) as u32);
                batch.labels.push(target.label);
                if let Some(soft) = &target.soft {
                    batch.soft_ids.extend_from_slice(&soft.ids);
                    batch.soft_logprobs.extend_from_slice(&soft.logprobs);
                }
                batch.soft_offsets.push(batch.soft_ids.len());
            }
        }
        batch
    }
}
