//! From cache records to batches.
pub mod align;
pub mod batch;
pub mod dataset;
pub mod groups;
pub(crate) mod logprob_check;
pub mod prepared;
pub mod report;
pub(crate) mod sample_trie;
pub(crate) mod sampling;
