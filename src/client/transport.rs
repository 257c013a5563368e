//! TODO

use anyhow::Result;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::header::HeaderMap;
use serde_json::Value;
use std::sync::Arc;
use tokio::sync::SemaphorePermit;

use crate::client::secrets::Secrets;
use futures_util::stream::BoxStream;
use std::path::Path;

/// A response, whatever its status.
#[derive(Debug, Clone, thiserror::Error)]
#[error("a reply with status {status}")]
pub struct HttpReply {
    pub status: u16,
    pub headers: HeaderMap,
    /// Decoded; as it came where that was not possible.
    pub body: Bytes,
    pub end: BodyEnd,
    /// Held for as long as a large body is in memory.
    pub permit: Option<LargeBodyPermit>,
}

impl HttpReply {
    /// A complete reply without headers, such as a row of a batch.
    pub fn without_headers(status: u16, body: Bytes) -> HttpReply {
        HttpReply::whole(status, HeaderMap::new(), body)
    }

    /// A reply whose body came whole.
    pub fn whole(status: u16, headers: HeaderMap, body: Bytes) -> HttpReply {
        HttpReply {
            status,
            headers,
            body,
            end: BodyEnd::Whole,
            permit: None,
        }
    }
}

/// Leave for a large body to be in memory.
pub type LargeBodyPermit = Arc<SemaphorePermit<'static>>;

/// How a body ended.
#[derive(Debug, Clone)]
pub enum BodyEnd {
    Whole,
    /// The connection ended, or the time was up, before the body did.
    Cut(TransportError),
    /// All of it came, or too much of it, and it cannot be decoded for certain. `raw` is what came, where the
    /// body is another one.
    Unreadable {
        problem: String,
        raw: Bytes,
    },
}

/// Why there is no response.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
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
    fn ask<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// Secrets to remove from answers.
    fn secrets(&self) -> Arc<Secrets> {
        Arc::default()
    }

    /// The way to its files and batches, if there is one.
    fn batches(&self) -> Option<&dyn BatchApi> {
        None
    }
}

/// The way to a teacher's files and batches: HTTP, or in a test a simulation on the paused clock.
pub trait BatchApi: Send + Sync {
    /// Uploads a file of requests.
    fn upload<'a>(&'a self, file: &'a Path) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    fn create<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    fn retrieve<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// A page of the account's batches, the newest first, from the one after `after` on.
    fn list<'a>(
        &'a self,
        after: Option<&'a str>,
    ) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    fn cancel<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// What a file holds, as it comes.
    fn content<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<FileDownload, TransportError>>;

    /// Takes an echoed key out of a line.
    fn without_key(&self, line: Bytes) -> Bytes {
        line
    }
}

pub enum FileDownload {
    /// A reply with a bad status.
    Refused(HttpReply),
    Content(BoxStream<'static, Result<Bytes, TransportError>>),
}
