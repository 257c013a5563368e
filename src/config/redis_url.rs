//! Address of a Redis server. It may contain a password, which is never printed.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

/// Error message for shared limits in a build without the feature `redis`.
pub const CANNOT_SHARE: &str = "this build cannot share limits: install with `--features redis`";

/// An address such as `redis://user:password@host:6379/0`. `Display`, `Debug` and `Serialize` omit user and password.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct RedisUrl(String);

impl RedisUrl {
    /// Returns the address with user and password, for the connection only.
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
        // Text without a scheme may be a password that was written into the wrong field.
        let Some((scheme, after_scheme)) = self.0.split_once("://") else {
            return formatter.write_str("[no URL]");
        };
        // A password may contain an unescaped `@` or `/`. The address of a socket has the password after the `?`.
        let address = after_scheme
            .rsplit_once('@')
            .map_or(after_scheme, |(_, address)| address);
        let host = address.split(['?', '#']).next().unwrap_or_default();
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
    fn redis_url_hides_user_and_password() {
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
