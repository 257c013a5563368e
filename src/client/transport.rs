//! Traits of a teacher's API, which tests implement without a network; raw replies; transport errors.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use reqwest::header::HeaderMap;
use serde_json::Value;
use tokio::sync::SemaphorePermit;

use crate::client::secrets::Secrets;

/// A raw HTTP reply of any status.
#[derive(Debug, Clone)]
pub struct HttpReply {
    pub status: u16,
    pub headers: HeaderMap,
    /// The decoded body. If decoding failed: the part of a gzip body that could be decoded, else the received bytes.
    pub body: Bytes,
    pub end: BodyEnd,
    /// Permit of a large body, released when the body is no longer in memory.
    pub permit: Option<LargeBodyPermit>,
}

impl HttpReply {
    /// Returns a complete reply without headers, such as a line of a batch's result file.
    pub(crate) fn without_headers(status: u16, body: Bytes) -> HttpReply {
        HttpReply::complete(status, HeaderMap::new(), body)
    }

    /// Returns a reply with a complete body.
    pub fn complete(status: u16, headers: HeaderMap, body: Bytes) -> HttpReply {
        HttpReply {
            status,
            headers,
            body,
            end: BodyEnd::Complete,
            permit: None,
        }
    }
}

/// Permit for one large body in memory.
pub(crate) type LargeBodyPermit = Arc<SemaphorePermit<'static>>;

/// How a body ended.
#[derive(Debug, Clone)]
pub enum BodyEnd {
    Complete,
    /// The connection broke or timed out before the body ended.
    Truncated(TransportError),
    /// The body is too large, or its content encoding is invalid. `raw` holds the received bytes of an encoded body,
    /// and is empty for any other.
    Unreadable {
        problem: String,
        raw: Bytes,
    },
}

/// Failure of a request that got no usable reply.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
    /// Connection refused, unknown host, no route, TLS failure: nothing was sent.
    #[error("{0}")]
    Unreachable(String),
    /// The endpoint rejected the key, and a new key is in place.
    #[error("the key had expired")]
    KeyRenewed,
    /// The process or machine is out of file descriptors: nothing was sent.
    #[error("{0}")]
    NoDescriptor(String),
    /// No complete reply within the timeout; the request may have been billed.
    #[error("timed out")]
    Timeout,
    /// The connection was reset or closed early, or the reply is not HTTP; the request may have been billed.
    #[error("{0}")]
    Broken(String),
}

/// Sends requests to a teacher: over HTTP, or in tests to a simulation on the paused clock.
pub trait Transport: Send + Sync {
    /// Sends one completion request and waits for the whole reply.
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// Returns the keys to remove from answers.
    fn secrets(&self) -> Arc<Secrets> {
        Arc::default()
    }

    /// Returns the batch API, if the teacher has one.
    fn batches(&self) -> Option<&dyn BatchApi> {
        None
    }
}

/// The files and batches API of a teacher: over HTTP, or in tests a simulation on the paused clock.
pub trait BatchApi: Send + Sync {
    /// Uploads the input file of a batch.
    fn upload<'a>(&'a self, file: &'a Path) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// Creates a batch.
    fn create<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// Requests the batch object of the batch with this id.
    fn retrieve<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// Requests a page of the account's batches, newest first: the first page, or the one after the batch with id
    /// `after`.
    fn list<'a>(
        &'a self,
        after: Option<&'a str>,
    ) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// Cancels the batch with this id.
    fn cancel<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>>;

    /// Streams the content of the file with this id.
    fn content<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<FileDownload, TransportError>>;

    /// Removes keys from a line of a downloaded file.
    fn without_key(&self, line: Bytes) -> Bytes {
        line
    }
}

/// Decoded bytes of a file in the order in which they arrive.
pub(crate) type FileChunks = BoxStream<'static, Result<Bytes, TransportError>>;

/// Result of a file download.
pub enum FileDownload {
    /// A reply with an error status.
    Refused(HttpReply),
    Content(FileChunks),
}
