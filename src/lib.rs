//! Black-box distillation: harvest a hosted teacher overnight, train a student that you own.
//!
//! # The map
//!
//! Data flows one way, and each noun has one room:
//!
//! ```text
//! prompts, templates --prompt--> Prompt --crate::client::request--> request body --cache::question--> key
//!   --harvest (limiter, teacher, retry)--> answer --cache::record--> cache (append-only JSONL)
//!   --data (chat template, tokenizer, align)--> prepared examples (mapped) --data::batch--> Batch
//!   --model (a tape over ops)--> hidden states --train::loss, fused with the LM head--> gradients
//!   --train::optimizer--> weights --train::checkpoint, train::trainable--> Hugging Face folder
//!   --train::on_policy--> texts of the student's own --crate::harvest::scorer, cache--> logprobs --data--> Batch
//!   --evaluate--> Report          --serve, model::generate--> answers
//!                                        cache --export--> files for other trainers
//! ```
//!
//! | room | holds |
//! |---|---|
//! | [`cli`], [`commands`] | clap types; one thin file per verb |
//! | [`config`] | file + environment + flags -> one validated `Config`; nothing else sees clap |
//! | [`prompt`] | prompt sources and templates |
//! | [`harvest`] | what to ask, when, one by one or in batches, and what a reply means; a teacher that judges texts; async, knows no tensors |
//! | [`cache`] | the record, its lines and frames, recovery, the one writer, repair and merge |
//! | [`data`] | chat template, tokenizer, alignment of teacher and student tokens, prepared examples, batches |
//! | [`model`] | a Hugging Face folder in memory; each architecture, written once over a graph; the tape that runs it on the CPU, candle's operations elsewhere; adapters; generation |
//! | [`ops`] | the arithmetic: fused operations with hand-written backward passes, matrix products, memory; all `unsafe` code |
//! | [`train`] | THE loop, and what it needs: device, loss, a teacher on this machine, answers of the student's own, optimizer, schedule, checkpoints, metrics |
//! | [`export`] | the cache in the formats of other trainers, one file per format |
//! | [`evaluate`] | a model against the truth and against its teacher |
//! | [`serve`] | the OpenAI dialect over a local model, or by a script that fails on purpose (`crate::mock`) |
//! | [`demo`] | the whole way, through the rooms above |
//! | [`fs`], [`terminal`], [`log`], [`signal`], [`exit`] | files written whole; text for people; exit statuses |
//!
//! # Invariants
//!
//! 1. `harvest` and `cache` never touch candle; `model`, `ops` and `train` never touch the network.
//! 2. `harvest::{request, scoring, plan, shard, retry, cost, budget, record, schedule}`, `cache::recovery`,
//!    `data::{align, chat_template, gate, groups, samples, sampling}` and `train::{loss, schedule}` are pure: no
//!    clock, file, network or random number that is not an argument.
//! 3. An acknowledged record is never changed or lost.
//! 4. Every trainable parameter receives a gradient, and no sum depends on the number of threads.
//! 5. The API key is exposed in one expression (`crate::client::credentials`), and printed, logged, cached and
//!    hashed nowhere.
//! 6. Text that came from a model reaches a terminal only through [`terminal::sanitise`].
//! 7. Waiting uses the monotonic clock; wall-clock time only stamps records, reads HTTP dates,
//!    opens the window of the night, and is the date of chat templates outside training.
//! 8. Files are written by [`fs`] and `cache::storage` alone.

// What is `pub` is what the binary and the tests use.
#![warn(unreachable_pub)]

pub mod budget;
pub mod cache;
pub mod cli;
pub mod client;
pub mod clock;
pub mod commands;
pub mod config;
pub mod data;
pub(crate) mod demo;
pub(crate) mod eval;
pub mod exit;
pub mod export;
pub mod fs;
pub mod harvest;
pub mod log;
pub mod mock;
pub mod model;
pub mod ops;
pub mod plan;
pub mod probe;
pub mod prompt;
pub(crate) mod rate_limit;
pub mod report;
pub mod serve;
pub mod signal;
pub mod terminal;
pub mod tokenizer;
pub mod train;
