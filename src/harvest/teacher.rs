//! The endpoint: one HTTP request a call, and everything that came back.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_openai::Client;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Request, Url};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::sync::SemaphorePermit;

use super::batch::BatchApi;
use super::exchange::{self, OneAttempt};
use super::reply;
use crate::config;
use crate::exit::Exit;

/// A response, whatever its status.
#[derive(Debug, Clone, thiserror::Error)]
#[error("a reply with status {status}")]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    /// Decoded; as it came where that was not possible.
    pub body: Bytes,
    pub end: End,
    /// Held for as long as a large body is in memory.
    pub permit: Option<Permit>,
}

/// Leave for a large body to be in memory.
pub type Permit = Arc<SemaphorePermit<'static>>;

/// How a body ended.
#[derive(Debug, Clone)]
pub enum End {
    Whole,
    /// The connection ended, or the time was up, before the body did.
    Cut(Fault),
    /// All of it came, or too much of it, and it cannot be decoded.
    Unreadable(String),
}

impl Reply {
    /// A reply whose body came whole.
    pub fn whole(status: u16, headers: HeaderMap, body: Bytes) -> Reply {
        Reply {
            status,
            headers,
            body,
            end: End::Whole,
            permit: None,
        }
    }
}

/// Why there is no response.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Fault {
    /// Refused, no such host, no route, TLS: nothing was sent.
    #[error("{0}")]
    Unreachable(String),
    /// This process or this machine may open no more connections for now: nothing was sent.
    #[error("{0}")]
    NoDescriptor(String),
    /// May have been billed.
    #[error("timed out")]
    Timeout,
    /// Reset, closed early, or not HTTP: may have been billed.
    #[error("{0}")]
    Broken(String),
}

/// The way to a teacher: HTTP, or in a test a simulation on the paused clock.
pub trait Transport: Send + Sync {
    /// Asks once, and waits for the whole reply.
    fn ask<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<Reply, Fault>>;

    /// The way to its files and batches, if there is one.
    fn batches(&self) -> Option<&dyn BatchApi> {
        None
    }
}

/// The teacher, ready to be asked.
pub struct Teacher {
    /// For files and batches.
    pub(super) client: Client<Endpoint>,
    /// For completions, and for the one thing that async-openai does not do: reading a file
    /// while it comes.
    pub(super) http: reqwest::Client,
    completions: Url,
    /// Of a request for a completion.
    headers: HeaderMap,
    /// Between two pieces of such a file.
    pub(super) timeout: Duration,
}

impl Teacher {
    /// Reads the key from the environment and prepares the connection pool; sends nothing.
    pub fn new(settings: &config::Teacher) -> Result<Teacher> {
        Self::at(settings, "chat/completions")
    }

    /// As [`Teacher::new`], to be asked at another path than that of chat completions.
    pub fn at(settings: &config::Teacher, path: &str) -> Result<Teacher> {
        let base_url = base_url(settings)?;
        let http = http_client(settings, &base_url)?;
        let endpoint = Endpoint::new(settings)?;
        let once = OneAttempt { http: http.clone() };
        let completions = format!("{}/{path}", identity(settings));
        let mut headers = endpoint.headers.clone();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(Teacher {
            completions: Url::parse(&completions).context("`teacher.base_url` is no URL")?,
            headers,
            client: Client::build(http.clone(), endpoint).with_http_service(once),
            http,
            timeout: seconds("timeout_s", settings.timeout_s)?,
        })
    }

    /// By reqwest alone: async-openai's way to the same request costs a tenth of the time that a
    /// small answer takes in all.
    async fn ask_once(&self, body: &Value) -> Result<Reply, Fault> {
        let body = serde_json::to_vec(body).map_err(|error| Fault::Broken(error.to_string()))?;
        let mut request = Request::new(Method::POST, self.completions.clone());
        *request.headers_mut() = self.headers.clone();
        *request.body_mut() = Some(body.into());
        exchange::send(&self.http, request).await
    }
}

impl Transport for Teacher {
    fn ask<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<Reply, Fault>> {
        Box::pin(self.ask_once(body))
    }

    fn batches(&self) -> Option<&dyn BatchApi> {
        Some(self)
    }
}

/// The base URL as keys and records name it: without a slash at the end.
pub fn identity(settings: &config::Teacher) -> &str {
    settings.base_url.trim_end_matches('/')
}

/// What async-openai asks for with each request. Its own configuration would fall back to
/// environment variables that the user of this program has not named.
#[derive(Clone)]
pub struct Endpoint {
    base_url: Arc<str>,
    headers: HeaderMap,
    key: SecretString,
}

impl Endpoint {
    fn new(settings: &config::Teacher) -> Result<Endpoint> {
        let key = api_key(&settings.api_key_env)?;
        let mut headers = HeaderMap::new();
        if !settings.api_key_env.is_empty() {
            let mut value = HeaderValue::try_from(format!("Bearer {}", key.expose_secret()))
                .map_err(|_| {
                    Exit::Usage(format!(
                        "the key in `{}` has characters that no header may have: set it again, \
                         without line ends",
                        settings.api_key_env
                    ))
                })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        headers.insert(
            ACCEPT_ENCODING,
            HeaderValue::from_static(reply::encoding::ACCEPTED),
        );
        Ok(Endpoint {
            base_url: identity(settings).into(),
            headers,
            key,
        })
    }
}

impl async_openai::config::Config for Endpoint {
    fn headers(&self) -> HeaderMap {
        self.headers.clone()
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base_url)
    }

    fn query(&self) -> Vec<(&str, &str)> {
        Vec::new()
    }

    fn api_base(&self) -> &str {
        &self.base_url
    }

    fn api_key(&self) -> &SecretString {
        &self.key
    }
}

fn api_key(variable: &str) -> Result<SecretString> {
    if variable.is_empty() {
        return Ok(SecretString::default());
    }
    match std::env::var(variable) {
        Ok(key) if !key.trim().is_empty() => Ok(key.trim().into()),
        _ => Err(Exit::Usage(format!(
            "the variable `{variable}`, which `teacher.api_key_env` names, is not set: run `export \
             {variable}=...` with the key of the endpoint, or set `teacher.api_key_env = \"\"` for \
             an endpoint that needs none"
        ))
        .into()),
    }
}

/// Checks the base URL: https, or http on this machine; no credentials in it.
fn base_url(settings: &config::Teacher) -> Result<Url> {
    let shown = &settings.base_url;
    let url = Url::parse(shown)
        .map_err(|error| Exit::Usage(format!("`teacher.base_url` is no URL: {error}")))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Exit::Usage(
            "`teacher.base_url` must hold no user name and no password: set \
             `teacher.api_key_env` to the name of the variable that holds the key"
                .into(),
        )
        .into());
    }
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_loopback(&url) => Ok(url),
        "http" => Err(Exit::Usage(format!(
            "`teacher.base_url` = \"{shown}\" would send the key and the prompts unencrypted: use \
             https (http is for this machine only)"
        ))
        .into()),
        _ => Err(Exit::Usage(format!(
            "`teacher.base_url` = \"{shown}\" must begin with https://"
        ))
        .into()),
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

fn http_client(settings: &config::Teacher, base_url: &Url) -> Result<reqwest::Client> {
    // An error means that a provider is installed already, which is what we want.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("distill/", env!("CARGO_PKG_VERSION")))
        // A redirect could carry the key and the prompts to another host.
        .redirect(reqwest::redirect::Policy::none())
        // Retries are the dispatcher's, under the rate limit.
        .retry(reqwest::retry::never())
        .connect_timeout(seconds("connect_timeout_s", settings.connect_timeout_s)?)
        .timeout(seconds("timeout_s", settings.timeout_s)?);
    if is_loopback(base_url) {
        builder = builder.no_proxy();
    }
    if base_url.scheme() == "http" {
        // No certificate is ever checked, so a machine that has none installed can go on.
        builder = builder.tls_certs_only([]);
    }
    builder.build().context("cannot set up the HTTP client")
}

fn seconds(name: &str, value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| Exit::Usage(format!("`teacher.{name}` = {value} is no time to wait")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> config::Teacher {
        config::Teacher {
            base_url: url.into(),
            api_key_env: String::new(),
            ..config::Teacher::default()
        }
    }

    #[test]
    fn only_this_machine_is_spoken_to_without_encryption() {
        for url in [
            "https://api.example.com/v1",
            "http://localhost:8000/v1",
            "http://127.0.0.2/v1",
            "http://[::1]:80/v1/",
        ] {
            assert!(Teacher::new(&settings(url)).is_ok(), "{url}");
        }
        let cases = [
            ("http://api.example.com/v1", "use https"),
            ("http://localhost.example.com/v1", "use https"),
            ("http://192.168.0.1/v1", "use https"),
            ("ftp://example.com", "must begin with https"),
            ("example.com", "no URL"),
            ("https://user:pw@example.com", "no user name"),
        ];
        for (url, expected) in cases {
            let error = Teacher::new(&settings(url)).err().unwrap();
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(Exit::code_of(&error), 2);
        }
    }

    #[test]
    fn a_missing_key_is_named_by_its_variable() {
        let settings = config::Teacher {
            api_key_env: "DISTILL_TEST_NO_SUCH_VARIABLE".into(),
            ..settings("https://example.com")
        };
        let error = Teacher::new(&settings).err().unwrap();
        assert!(
            error
                .to_string()
                .contains("export DISTILL_TEST_NO_SUCH_VARIABLE=..."),
            "{error}"
        );
        assert_eq!(Exit::code_of(&error), 2);
    }
}
