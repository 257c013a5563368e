//! Training data: from cache records and conversations to batches of token ids with labels.
//!
//! | file | content |
//! |---|---|
//! | `groups` | groups of answers in a cache, and the selection of answers to train on |
//! | `sampling` | whether an answer was sampled from the distribution of its logprobs |
//! | `dataset` | reads rows, makes examples, splits them by prompt |
//! | `align` | maps soft labels from the teacher's tokens to the student's, by bytes |
//! | `sample_trie` | soft labels from several answers to one prompt |
//! | `logprob_check` | checks that logprobs belong to the emitted tokens |
//! | `prepared` | examples on disk: safetensors shards |
//! | `report` | counts for the user |
//! | `batch` | examples laid end to end, and their order |
//! | `text_scorer` | interface to a teacher that scores given texts |
//!
//! Shapes, as suffixes of arrays: B examples, T tokens, U source tokens of an encoder-decoder, N supervised positions, N1 one more than N, K top-k, C chunks.
//! Arrays of shape NK are flat, and the number of labels (K) may differ between positions: the labels of the first
//! position, then those of the second, and so on. A separate array has the end or the offset of each position's labels.
//!
//! Invariants:
//! - The examples depend only on the content of the source, the tokenizers, the settings and the selection of records,
//!   not on the number of threads.
//! - A position without usable logprobs trains on cross-entropy.
//! - `align`, `groups`, `logprob_check`, `sample_trie` and `sampling` are pure: no clock, file or random number.
//! - `prepared::index::VERSION` is increased with every change of the examples or their files.

pub mod align;
pub mod batch;
pub mod dataset;
pub mod groups;
pub(crate) mod logprob_check;
pub mod prepared;
pub mod report;
pub(crate) mod sample_trie;
pub(crate) mod sampling;
pub mod text_scorer;
