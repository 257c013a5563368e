//! From cache records to batches.
pub mod align;
pub mod batch;
pub mod classes;
pub mod dataset;
pub mod groups;
pub mod logprob_check;
pub mod prepared;
pub mod sample_trie;
pub mod sampling;
