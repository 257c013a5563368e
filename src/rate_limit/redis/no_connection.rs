//! Stub of `connection` for a build without the feature `redis`.

use std::convert::Infallible;

use anyhow::Result;

use crate::config::redis_url::{CANNOT_SHARE, RedisUrl};
use crate::exit::Exit;
use crate::rate_limit::redis::rules::{Arguments, KEY_COUNT, REPLY_LENGTH};

/// Connection that cannot exist.
pub(crate) struct Connection(Infallible);

impl Connection {
    pub(crate) async fn open(_: &RedisUrl, _: [String; KEY_COUNT]) -> Result<Connection> {
        Err(Exit::Usage(CANNOT_SHARE.into()).into())
    }

    pub(crate) async fn admit(&mut self, _: &Arguments) -> Result<[u64; REPLY_LENGTH], String> {
        match self.0 {}
    }
}
