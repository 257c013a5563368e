//! The training loop.

pub mod loss;
