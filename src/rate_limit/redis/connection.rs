//! [`Connection`]: the connection to the Redis server.

use std::time::Duration;

use anyhow::{Result, anyhow};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ErrorKind, RedisError, Script};

use crate::config::redis_url::RedisUrl;
use crate::exit::Exit;
use crate::rate_limit::redis::rules::{Arguments, KEY_COUNT, REPLY_LENGTH};

/// Timeout for connecting, and for a reply.
const TIMEOUT: Duration = Duration::from_secs(2);

const ADDRESS_HINT: &str = "write it as \"redis://user:password@host:6379/0\" (`rediss` for TLS), and \
                            percent-encode special characters of the password, such as @ as %40";

/// Connection that is opened again after an error.
pub(crate) struct Connection {
    client: Client,
    /// The password, decoded and as written in the address. Error messages must not contain it.
    passwords: Vec<String>,
    connection: Option<MultiplexedConnection>,
    script: Script,
    keys: [String; KEY_COUNT],
}

impl Connection {
    /// Connects to the server and loads the script.
    ///
    /// # Errors
    /// If the address is invalid, or the server refuses the user or is unavailable.
    pub(crate) async fn open(url: &RedisUrl, keys: [String; KEY_COUNT]) -> Result<Connection> {
        let address = url.reveal();
        let client = Client::open(address)
            // The error of the `redis` crate is not shown, because it might contain a part of the address.
            .map_err(|_| {
                Exit::Usage(format!(
                    "`limits.shared` is not a valid Redis address: {ADDRESS_HINT}"
                ))
            })?;
        let decoded = client.get_connection_info().redis_settings().password();
        let encoded = redis::parse_redis_url(address)
            .and_then(|address| address.password().map(String::from));
        let passwords = decoded.map(String::from).into_iter().chain(encoded);
        let mut connection = Connection {
            passwords: passwords.filter(|password| !password.is_empty()).collect(),
            client,
            connection: None,
            script: Script::new(include_str!("admit.lua")),
            keys,
        };
        let loaded = connection.load().await;
        loaded.map_err(|error| {
            let is_refused = error.kind() == ErrorKind::AuthenticationFailed
                || matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM"));
            let message = connection.describe(&error);
            if is_refused {
                anyhow!(
                    "the Redis server at {url} refuses the user or the password ({message}): correct \
                     them in `limits.shared`"
                )
            } else {
                anyhow!(
                    "the limits are shared, but the Redis server at {url} is unavailable ({message}): \
                     start it, or correct `limits.shared`"
                )
            }
        })?;
        Ok(connection)
    }

    /// Runs the script.
    ///
    /// # Errors
    /// A description of the error. The script may have run nevertheless.
    pub(crate) async fn admit(
        &mut self,
        arguments: &Arguments,
    ) -> Result<[u64; REPLY_LENGTH], String> {
        let reply = self.run(arguments).await;
        reply.map_err(|error| {
            // The next call connects again: if this server has become a replica, the address may lead to the new
            // primary.
            self.connection = None;
            self.describe(&error)
        })
    }

    /// Loads the script into the server.
    async fn load(&mut self) -> Result<(), RedisError> {
        let script = self.script.clone();
        script.load_async(self.connected().await?).await?;
        Ok(())
    }

    /// Runs the script. Loads it again if the server has lost it.
    async fn run(&mut self, arguments: &Arguments) -> Result<[u64; REPLY_LENGTH], RedisError> {
        let script = self.script.clone();
        let mut invocation = script.prepare_invoke();
        for key in &self.keys {
            invocation.key(key);
        }
        for argument in arguments {
            invocation.arg(*argument);
        }
        invocation.invoke_async(self.connected().await?).await
    }

    /// Returns the open connection, or connects.
    async fn connected(&mut self) -> Result<&mut MultiplexedConnection, RedisError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(TIMEOUT))
                    .set_response_timeout(Some(TIMEOUT));
                self.client
                    .get_multiplexed_async_connection_with_config(&config)
                    .await?
            }
        };
        Ok(self.connection.insert(connection))
    }

    /// Formats an error in one line, with the password removed.
    fn describe(&self, error: &RedisError) -> String {
        let message = error.to_string();
        let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
        let hide = |line: String, password: &String| line.replace(password, "[password]");
        self.passwords.iter().fold(line, hide)
    }
}
