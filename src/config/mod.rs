//! File, environment and flags, merged into one validated [`Config`]. Nothing below sees clap.
//!
//! Precedence: `--set section.key=value` > `DISTILL_SECTION_KEY` > the file > the default. Relative
//! paths are relative to the folder of the config file.

mod settings;

pub use settings::*;
