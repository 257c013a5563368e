//! From cache records to batches.
pub mod align;
pub mod batch;
pub mod chat_template;
pub mod classes;
pub mod dataset;
pub mod gate;
pub mod groups;
pub mod prepared;
pub mod samples;
pub mod sampling;
pub mod tokenizer;
