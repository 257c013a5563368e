//! The config: file, environment and flags, merged into one validated [`Config`], without clap.
//!
//! Precedence: `--set section.key=value` > `DISTILL_SECTION_KEY` > the file > the default. Relative paths are
//! relative to the folder of the config file.
//!
//! | file | content |
//! |---|---|
//! | `load` | merging of the sources, and the origin of each value |
//! | `validate`, `validate_student`, `check` | checks beyond the types of the values |
//! | `error` | messages about mistakes, with file, line, column and the nearest key |
//! | `settings` | [`Config`], and values derived from several sections |
//! | `teacher` | `[teacher]`: the endpoint and its API key |
//! | `harvest` | `[prompts]` to `[cache]`: requests, limits, prices, schedule |
//! | `student` | `[student]`, `[loss]`, `[lora]`, `[train]`, `[on_policy]`, `[eval]` |
//! | `data` | `[data]`: selection of the training data |
//! | `request_fields` | fields that `sampling.extra` must not contain |
//! | `address` | checks of the endpoint's address and headers |
//! | `parsed` | settings that are written as text: patterns, times, dates |
//! | `redis_url` | address of a Redis server that never shows its password |
//!
//! Invariants: `config.example.toml` has every key with its default (a test compares them); the names and the order of
//! the fields of [`TrainConfig`], [`LossConfig`], [`LoraConfig`], [`StudentConfig`] and [`OnPolicyConfig`] are part of
//! the checkpoint fingerprint; no message repeats an API key.

pub(crate) mod address;
pub(crate) mod check;
pub(crate) mod data;
pub(crate) mod error;
pub(crate) mod harvest;
pub mod load;
pub(crate) mod parsed;
pub(crate) mod redis_url;
pub(crate) mod request_fields;
pub(crate) mod settings;
pub(crate) mod student;
pub(crate) mod teacher;
pub(crate) mod validate;
pub(crate) mod validate_student;

pub use data::*;
pub use harvest::*;
pub use load::{LoadedConfig, Origin, load, parse};
pub use parsed::{DailyWindow, Deadline, ParseSetting, Parsed};
pub use redis_url::{CANNOT_SHARE, RedisUrl};
pub use settings::*;
pub use student::*;
pub use teacher::*;
