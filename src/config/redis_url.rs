//! The address of a Redis server: it holds a password, and shows it to nobody.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

/// To whoever shares limits in a build that has no way to Redis.
pub const CANNOT_SHARE: &str = "this build cannot share limits: install with `--features redis`";

/// `redis://user:password@host:6379/0`. However it is printed, user and password are left out.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct RedisUrl(String);

impl RedisUrl {
    /// With user and password, for the connection alone.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for RedisUrl {
    fn from(url: &str) -> Self {
        Self(url.into())
    }
}

impl fmt::Display for RedisUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        // What is no URL may be a password that went into the wrong place.
        let Some((scheme, rest)) = self.0.split_once("://") else {
            return formatter.write_str("[no URL]");
        };
        // A password with an `@` or a `/` that should have been written `%40` or `%2F` is one all
        // the same; the address of a socket has it behind the `?`.
        let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
        let host = rest.split(['?', '#']).next().unwrap_or_default();
        write!(formatter, "{scheme}://{host}")
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl Serialize for RedisUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_password_are_not_shown() {
        for (url, shown) in [
            ("redis://host:6379/0", "redis://host:6379/0"),
            ("redis://user:secret@host", "redis://host"),
            ("rediss://:secret@host:1/2#secret", "rediss://host:1/2"),
            ("redis://:se/cr@et@host/1?x=secret", "redis://host/1"),
            (
                "redis+unix:///run/r.sock?pass=secret",
                "redis+unix:///run/r.sock",
            ),
            ("secret", "[no URL]"),
            ("user:secret@host", "[no URL]"),
        ] {
            let url = RedisUrl::from(url);
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), shown);
            assert_eq!(serde_json::to_value(&url).unwrap(), shown);
        }
    }
}
