//! File, environment and flags, merged into one validated [`Config`]. Nothing below sees clap.
//!
//! Precedence: `--set section.key=value` > `DISTILL_SECTION_KEY` > the file > the default. Relative
//! paths of the file are relative to its folder.

pub(crate) mod data;
pub(crate) mod error;
pub(crate) mod harvest;
pub mod load;
pub(crate) mod redis_url;
pub(crate) mod settings;
pub(crate) mod student;
pub(crate) mod teacher;
pub(crate) mod validate;

pub use data::*;
pub use harvest::*;
pub use load::{LoadedConfig, load, parse};
pub use redis_url::{CANNOT_SHARE, RedisUrl};
pub use settings::*;
pub use student::*;
pub use teacher::*;
