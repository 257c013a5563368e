//! TODO

pub(crate) mod bucket;
pub(crate) mod concurrency;
pub(crate) mod cost;
pub(crate) mod daily;
pub(crate) mod headers;
pub(crate) mod pacer;
pub(crate) mod redis;
pub(crate) mod send_ticket;
pub(crate) mod server_limits;
pub(crate) mod user_limits;
pub(crate) mod wait;
