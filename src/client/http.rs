//! The endpoint: one HTTP request a call, and everything that came back.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_openai::Client;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Request, Url};
use secrecy::SecretString;
use serde_json::Value;
use tokio::sync::SemaphorePermit;

use crate::client::batch_object::BatchApi;
use crate::client::connection;
use crate::client::connection::Address;
use crate::client::credentials::Credentials;
use crate::client::one_attempt::{OneAttempt, Sender};
use crate::client::secrets::Secrets;
use crate::config;

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
    /// All of it came, or too much of it, and it cannot be decoded for certain. `raw` is what came, where the
    /// body is another one.
    Unreadable {
        problem: String,
        raw: Bytes,
    },
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
    /// The key had expired, and there is a new one.
    #[error("the key had expired")]
    KeyRenewed,
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

    /// Secrets to remove from answers.
    fn secrets(&self) -> Arc<Secrets> {
        Arc::default()
    }

    /// The way to its files and batches, if there is one.
    fn batches(&self) -> Option<&dyn BatchApi> {
        None
    }
}

/// The teacher, ready to be asked.
pub struct Teacher {
    /// For files and batches.
    pub(crate) client: Client<Endpoint>,
    /// For completions, and for the one thing that async-openai does not do: reading a file
    /// while it comes.
    pub(crate) http: Sender,
    completions: Url,
    /// Between two pieces of such a file.
    pub(crate) timeout: Duration,
}

impl Teacher {
    /// Reads the key and prepares the connection pool; sends nothing.
    pub fn new(settings: &config::Teacher) -> Result<Teacher> {
        Self::at(settings, "chat/completions")
    }

    /// As [`Teacher::new`], to be asked at another path than that of chat completions.
    pub fn at(settings: &config::Teacher, path: &str) -> Result<Teacher> {
        let credentials = Arc::new(Credentials::load(settings)?);
        let address = Address::of(settings)?;
        let http = Sender {
            http: connection::client(settings, &address)?,
            credentials,
        };
        let endpoint = Endpoint {
            base_url: address.text.as_str().into(),
            query: address.query.into(),
            no_key: SecretString::default(),
        };
        let once = OneAttempt { http: http.clone() };
        let mut completions = format!("{}/{path}", endpoint.base_url)
            .parse::<Url>()
            .context("`teacher.base_url` is no URL")?;
        if !endpoint.query.is_empty() {
            completions
                .query_pairs_mut()
                .extend_pairs(endpoint.query.iter());
        }
        Ok(Teacher {
            completions,
            client: Client::build(http.http.clone(), endpoint).with_http_service(once),
            http,
            timeout: connection::seconds("timeout_s", settings.timeout_s)?,
        })
    }

    /// By reqwest alone: async-openai's way to the same request costs a tenth of the time that a
    /// small answer takes in all.
    async fn ask_once(&self, body: &Value) -> Result<Reply, Fault> {
        let body = serde_json::to_vec(body).map_err(|error| Fault::Broken(error.to_string()))?;
        let mut request = Request::new(Method::POST, self.completions.clone());
        let json = HeaderValue::from_static("application/json");
        request.headers_mut().insert(CONTENT_TYPE, json);
        *request.body_mut() = Some(body.into());
        self.http.send(request).await
    }
}

impl Transport for Teacher {
    fn ask<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<Reply, Fault>> {
        Box::pin(self.ask_once(body))
    }

    fn secrets(&self) -> Arc<Secrets> {
        Arc::clone(&self.http.credentials.current().secrets)
    }

    fn batches(&self) -> Option<&dyn BatchApi> {
        Some(self)
    }
}

/// The base URL as records name it: as the config has it, without a slash at the end.
pub fn identity(settings: &config::Teacher) -> &str {
    settings.base_url.trim_end_matches('/')
}

/// What async-openai asks for with each request. Its own configuration would fall back to
/// environment variables that the user of this program has not named.
#[derive(Clone)]
pub struct Endpoint {
    base_url: Arc<str>,
    query: Arc<[(String, String)]>,
    /// The key is in the headers.
    no_key: SecretString,
}

impl async_openai::config::Config for Endpoint {
    fn headers(&self) -> HeaderMap {
        // They are set when the request leaves.
        HeaderMap::new()
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base_url)
    }

    fn query(&self) -> Vec<(&str, &str)> {
        let pairs = self.query.iter();
        pairs
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect()
    }

    fn api_base(&self) -> &str {
        &self.base_url
    }

    fn api_key(&self) -> &SecretString {
        &self.no_key
    }
}
