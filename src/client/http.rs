//! Teacher over HTTP: each call sends one request and returns the whole reply; file downloads are streamed.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures_util::future::BoxFuture;
use reqwest::Url;
use serde_json::Value;

use crate::client::connection;
use crate::client::connection::EndpointAddress;
use crate::client::credentials::Credentials;
use crate::client::secrets::Secrets;
use crate::client::sender::HttpSender;
use crate::client::transport::{BatchApi, HttpReply, Transport, TransportError};
use crate::config;

/// Connection to a teacher.
pub(crate) struct HttpTeacher {
    pub(crate) sender: HttpSender,
    pub(crate) address: EndpointAddress,
    completions_url: Url,
    /// Maximum time until a file download begins, and then between two of its chunks.
    pub(crate) download_idle_timeout: Duration,
}

impl HttpTeacher {
    /// Reads the key and prepares the connection pool; sends nothing.
    pub(crate) fn new(settings: &config::TeacherConfig) -> Result<HttpTeacher> {
        Self::with_path(settings, "chat/completions")
    }

    /// As [`HttpTeacher::new`], but completions are requested from `path` instead of `chat/completions`.
    pub(crate) fn with_path(settings: &config::TeacherConfig, path: &str) -> Result<HttpTeacher> {
        let credentials = Arc::new(Credentials::load(settings)?);
        let address = EndpointAddress::from_config(settings)?;
        Ok(HttpTeacher {
            sender: HttpSender {
                client: connection::client(settings, &address)?,
                credentials,
            },
            completions_url: address.method_url(path),
            address,
            download_idle_timeout: settings.timeout,
        })
    }
}

impl Transport for HttpTeacher {
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        Box::pin(self.sender.post_json(self.completions_url.clone(), body))
    }

    fn secrets(&self) -> Arc<Secrets> {
        Arc::clone(&self.sender.credentials.current().secrets)
    }

    fn batches(&self) -> Option<&dyn BatchApi> {
        Some(self)
    }
}
