//! Stub of `connection` for a build without the feature `redis`.

use std::convert::Infallible;

use anyhow::Result;

use crate::config::redis_url::{CANNOT_SHARE, RedisUrl};
use crate::exit::Exit;
use crate::rate_limit::redis::rules::{ANSWERS, Arguments, KEYS};

pub(crate) struct Connection(Infallible);

impl Connection {
    pub(crate) async fn open(_: &RedisUrl, _: [String; KEYS]) -> Result<Connection> {
        Err(Exit::Usage(CANNOT_SHARE.into()).into())
    }

    pub(crate) async fn admit(&mut self, _: &Arguments) -> Result<[u64; ANSWERS], String> {
        match self.0 {}
    }
}
