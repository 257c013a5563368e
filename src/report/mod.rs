//! TODO

pub mod advice;
pub mod failures;
pub mod progress;
pub mod summary;
pub mod table;
pub mod timeline;
