//! The way to the Redis server.

use std::time::Duration;

use anyhow::{Result, anyhow};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ErrorKind, RedisError, Script};

use crate::config::redis_url::RedisUrl;
use crate::exit::Exit;
use crate::rate_limit::redis::rules::{ANSWERS, Arguments, KEYS};

/// For a connection, and for an answer.
const TIMEOUT: Duration = Duration::from_secs(2);

const NO_ADDRESS: &str = "write it as \"redis://user:password@host:6379/0\" (`rediss` for TLS), what \
                          is special in the password as %40";

pub(crate) struct Connection {
    client: Client,
    /// As it stands in the address, and as the server gets it.
    passwords: Vec<String>,
    open: Option<MultiplexedConnection>,
    script: Script,
    keys: [String; KEYS],
}

impl Connection {
    /// Connects, and loads the script.
    ///
    /// # Errors
    /// With what to do about it, where the server cannot be asked.
    pub(crate) async fn open(url: &RedisUrl, keys: [String; KEYS]) -> Result<Connection> {
        let address = url.reveal();
        let client = Client::open(address)
            // The crate's words for it might repeat a part of the address.
            .map_err(|_| {
                Exit::Usage(format!(
                    "`limits.shared` is no address of a Redis server: {NO_ADDRESS}"
                ))
            })?;
        let decoded = client.get_connection_info().redis_settings().password();
        let written = redis::parse_redis_url(address)
            .and_then(|address| address.password().map(String::from));
        let passwords = decoded.map(String::from).into_iter().chain(written);
        let mut connection = Connection {
            passwords: passwords.filter(|password| !password.is_empty()).collect(),
            client,
            open: None,
            script: Script::new(include_str!("admit.lua")),
            keys,
        };
        let opened = connection.load().await;
        opened.map_err(|error| {
            let is_refused = error.kind() == ErrorKind::AuthenticationFailed
                || matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM"));
            let words = connection.words(&error);
            match is_refused {
                true => anyhow!(
                    "the Redis server at {url} refuses the user or the password ({words}): correct \
                     them in `limits.shared`"
                ),
                false => anyhow!(
                    "the limits are shared, and the Redis server at {url} cannot be asked ({words}): \
                     start it, or correct `limits.shared`"
                ),
            }
        })?;
        Ok(connection)
    }

    /// Runs the script.
    ///
    /// # Errors
    /// Why it could not be run. Nobody knows then whether it was.
    pub(crate) async fn ask(&mut self, arguments: &Arguments) -> Result<[u64; ANSWERS], String> {
        let answer = self.run(arguments).await;
        answer.map_err(|error| {
            // A server that has become a replica, say: its address may lead to another one by now.
            self.open = None;
            self.words(&error)
        })
    }

    async fn load(&mut self) -> Result<(), RedisError> {
        let script = self.script.clone();
        script.load_async(self.connected().await?).await?;
        Ok(())
    }

    /// A server that does not have the script, since it was restarted, is given it again.
    async fn run(&mut self, arguments: &Arguments) -> Result<[u64; ANSWERS], RedisError> {
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

    async fn connected(&mut self) -> Result<&mut MultiplexedConnection, RedisError> {
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(TIMEOUT))
                    .set_response_timeout(Some(TIMEOUT));
                self.client
                    .get_multiplexed_async_connection_with_config(&config)
                    .await?
            }
        };
        Ok(self.open.insert(open))
    }

    /// An error in one line, without the password, whoever has put it there.
    fn words(&self, error: &RedisError) -> String {
        let words = error.to_string();
        let line = words.split_whitespace().collect::<Vec<_>>().join(" ");
        let hide = |line: String, password: &String| line.replace(password, "[password]");
        self.passwords.iter().fold(line, hide)
    }
}
