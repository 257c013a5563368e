//! From cache records to batches.
pub mod batch;
pub mod example;
