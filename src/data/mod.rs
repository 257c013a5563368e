//! From cache records to batches.
pub mod align;
pub mod batch;
pub mod chat_template;
pub mod dataset;
pub mod prepared;
pub mod tokenizer;
