//! Black-box distillation: harvest a hosted teacher overnight, train a student that you own.
//!
//! # The map
//!
//! Data flows one way:
//!
//! ```text
//! prompts, templates --prompt--> Prompt --plan: prompts x endpoints x samples, minus the cache--> rows
//!   --harvest (rate_limit, budget, client)--> answer --cache--> responses.jsonl (append-only)
//!   --data (tokenizer, alignment)--> prepared examples (mapped) --data::batch--> Batch
//!   --model (a tape over ops)--> hidden states --train::loss, fused with the LM head--> gradients
//!   --train::optimizer--> weights --train::checkpoint--> Hugging Face folder
//!   --train::on_policy--> answers of the student --harvest::scorer--> logprobs --data--> Batch
//!   --eval--> EvalReport          --serve, model::generate--> answers
//!                                cache --export--> files for other trainers
//! ```
//!
//! The modules ("rooms"), from the top. A room imports only from rooms on lower floors, and the imports of files form
//! no cycle; `tests/it/imports.rs` checks both.
//!
//! | floor | rooms | content |
//! |---|---|---|
//! | 14 | [`commands`] | one thin file per verb |
//! | 13 | [`cli`] | clap types |
//! | 12 | [`demo`] | harvest, train and eval with a local model as the teacher |
//! | 11 | [`harvest`] | the run: dispatch of single requests, batch mode, decisions after errors, scoring of given texts |
//! | 10 | [`report`], [`eval`] | summary, table, progress and advice of a run; a model compared with the truth and with its teacher |
//! | 9 | [`plan`] | which rows are requested |
//! | 8 | [`probe`], [`train`], [`serve`] | what an endpoint supports; the training loop and its parts; the OpenAI API over a local model |
//! | 7 | [`client`], [`model`], [`export`] | requests and replies over HTTP, and their classification; architectures, weights, the tape, generation; the cache in the formats of other trainers |
//! | 6 | [`data`], [`budget`] | alignment of teacher and student tokens, prepared examples, batches; the account of a run folder and its ledger |
//! | 5 | [`cache`], [`tokenizer`] | records, their files, recovery, the one writer, repair and merge; tokenizer and chat template of a model folder |
//! | 4 | [`prompt`], [`rate_limit`], [`mock`] | prompt sources and templates; when a request may leave; a scripted teacher that fails on purpose |
//! | 3 | [`config`], [`signal`] | file + environment + flags -> one validated `Config`; stop signals |
//! | 2 | [`ops`], [`fs`], [`terminal`], [`exit`], [`log`], [`clock`] | fused operations and all `unsafe` code; files written atomically; text for people; exit statuses |
//!
//! # Invariants
//!
//! 1. `harvest`, `client` and `cache` never use candle; `model`, `ops` and `train` never use the network.
//! 2. Files whose doc says "Pure" do not access clock, files, network or random numbers, except through arguments.
//! 3. An acknowledged record is never changed or lost.
//! 4. Every trainable parameter receives a gradient, and no sum depends on the number of threads.
//! 5. The API key is exposed in one expression (`client::credentials`), and printed, logged, cached and hashed nowhere.
//! 6. Text that came from a model reaches a terminal only through [`terminal::sanitise`].
//! 7. Waiting uses the monotonic clock. Wall-clock time is only for timestamps, the daily count across restarts, HTTP
//!    dates, the request window, the deadline, the age of prices, and the date of chat templates outside training.
//! 8. Only [`fs`] and `cache::storage` write files.

// Items are `pub` only if the binary or the tests use them.
#![warn(unreachable_pub)]

pub mod budget;
pub mod cache;
pub mod cli;
pub mod client;
pub mod clock;
pub mod commands;
pub mod config;
pub mod data;
pub mod demo;
pub mod eval;
pub mod exit;
pub mod export;
pub mod fs;
pub mod harvest;
pub mod log;
pub mod mock;
pub mod model;
#[allow(unsafe_code, reason = "mapped files, SIMD and calls of the C library")]
pub mod ops;
pub mod plan;
pub mod probe;
pub mod prompt;
pub mod rate_limit;
pub mod report;
pub mod serve;
pub mod signal;
pub mod terminal;
pub mod tokenizer;
pub mod train;
