//! Black-box distillation: harvest a hosted teacher, train a student that you own.

pub mod cache;
pub mod cli;
pub mod commands;
pub mod config;
pub mod data;
pub mod evaluate;
pub mod exit;
pub mod fs;
pub mod harvest;
pub mod model;
pub mod ops;
pub mod prompt;
pub mod serve;
pub mod terminal;
pub mod train;
