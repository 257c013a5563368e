//! The append-only cache of paid answers.

pub mod record;
