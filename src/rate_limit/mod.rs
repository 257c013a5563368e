//! TODO

pub mod bucket;
pub mod concurrency;
pub mod daily;
pub mod headers;
pub mod pacer;
pub mod redis;
pub mod server_limits;
pub mod user_limits;
