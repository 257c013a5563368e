//! Teacher over HTTP: each call sends one request and returns the whole reply.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_openai::Client;
use futures_util::future::BoxFuture;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Request, Url};
use secrecy::SecretString;
use serde_json::Value;

use crate::client::connection;
use crate::client::connection::EndpointAddress;
use crate::client::credentials::Credentials;
use crate::client::one_attempt::{HttpSender, OneAttempt};
use crate::client::secrets::Secrets;
use crate::client::transport::{BatchApi, HttpReply, Transport, TransportError};
use crate::config;

/// Connection to a teacher.
pub(crate) struct HttpTeacher {
    /// Client for files and batches.
    pub(crate) client: Client<OpenAiSettings>,
    /// Sends completions, and file downloads, which async-openai cannot stream.
    pub(crate) http: HttpSender,
    completions: Url,
    /// Maximum time between two chunks of a file download.
    pub(crate) timeout: Duration,
}

impl HttpTeacher {
    /// Reads the key and prepares the connection pool; sends nothing.
    pub(crate) fn new(settings: &config::TeacherConfig) -> Result<HttpTeacher> {
        Self::with_path(settings, "chat/completions")
    }

    /// As [`HttpTeacher::new`], for another path than that of chat completions.
    pub(crate) fn with_path(settings: &config::TeacherConfig, path: &str) -> Result<HttpTeacher> {
        let credentials = Arc::new(Credentials::load(settings)?);
        let address = EndpointAddress::from_config(settings)?;
        let http = HttpSender {
            http: connection::client(settings, &address)?,
            credentials,
        };
        let endpoint = OpenAiSettings {
            base_url: address.text.as_str().into(),
            query: address.query.into(),
            no_key: SecretString::default(),
        };
        let once = OneAttempt { http: http.clone() };
        let mut completions = format!("{}/{path}", endpoint.base_url)
            .parse::<Url>()
            .context("`teacher.base_url` is not a valid URL")?;
        if !endpoint.query.is_empty() {
            completions
                .query_pairs_mut()
                .extend_pairs(endpoint.query.iter());
        }
        Ok(HttpTeacher {
            completions,
            client: Client::build(http.http.clone(), endpoint).with_http_service(once),
            http,
            timeout: settings.timeout,
        })
    }

    /// Sends one completion request by reqwest: async-openai's own path to the same request adds 10 % to the
    /// time of a small answer.
    async fn send_completion(&self, body: &Value) -> Result<HttpReply, TransportError> {
        let body =
            serde_json::to_vec(body).map_err(|error| TransportError::Broken(error.to_string()))?;
        let mut request = Request::new(Method::POST, self.completions.clone());
        let json = HeaderValue::from_static("application/json");
        request.headers_mut().insert(CONTENT_TYPE, json);
        *request.body_mut() = Some(body.into());
        self.http.send(request).await
    }
}

impl Transport for HttpTeacher {
    fn ask<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        Box::pin(self.send_completion(body))
    }

    fn secrets(&self) -> Arc<Secrets> {
        Arc::clone(&self.http.credentials.current().secrets)
    }

    fn batches(&self) -> Option<&dyn BatchApi> {
        Some(self)
    }
}

/// Settings of async-openai. Its own configuration type falls back to environment variables that the user did
/// not name.
#[derive(Clone)]
pub(crate) struct OpenAiSettings {
    base_url: Arc<str>,
    query: Arc<[(String, String)]>,
    /// Empty: [`HttpSender`] adds the key as a header.
    no_key: SecretString,
}

impl async_openai::config::Config for OpenAiSettings {
    fn headers(&self) -> HeaderMap {
        // `HttpSender` adds them when it sends the request.
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
