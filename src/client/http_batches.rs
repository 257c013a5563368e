//! Files and batches over HTTP.
//!
//! async-openai turns a file request into a multipart form that streams the file from disk. Its own client is
//! not used, because it retries outside of our rate limit, discards the headers and the exact body of an error,
//! rejects replies that do not match its types, and reads a downloaded file into memory. So this file names the
//! methods and paths, and [`HttpSender`](crate::client::sender::HttpSender) sends each request once.

use std::path::Path;
use std::time::Duration;

use async_openai::traits::AsyncTryFrom;
use async_openai::types::InputSource;
use async_openai::types::files::{CreateFileRequest, FileInput, FilePurpose};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use reqwest::multipart::Form;
use reqwest::{Method, Request};
use serde_json::{Value, json};

use crate::client::http::HttpTeacher;
use crate::client::response::encoding::ContentDecoder;
use crate::client::sender::transport_error;
use crate::client::transport::{BatchApi, FileDownload, HttpReply, TransportError};

/// Batches per page; 100 is the maximum of the API.
const PAGE_SIZE: &str = "100";

/// Maximum duration of a file upload.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(6 * 3_600);

/// Maximum duration of a file download.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(24 * 3_600);

impl BatchApi for HttpTeacher {
    fn upload<'a>(&'a self, file: &'a Path) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        Box::pin(async move { self.sender.send(self.upload_request(file).await?).await })
    }

    fn create<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        let url = self.address.method_url("batches");
        Box::pin(self.sender.post_json(url, body))
    }

    fn retrieve<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        let url = self.address.method_url(&format!("batches/{batch}"));
        Box::pin(self.sender.send(Request::new(Method::GET, url)))
    }

    fn list<'a>(
        &'a self,
        after: Option<&'a str>,
    ) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        let mut url = self.address.method_url("batches");
        url.query_pairs_mut()
            .append_pair("limit", PAGE_SIZE)
            .extend_pairs(after.map(|batch| ("after", batch)));
        Box::pin(self.sender.send(Request::new(Method::GET, url)))
    }

    fn cancel<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        let url = self.address.method_url(&format!("batches/{batch}/cancel"));
        Box::pin(async move { self.sender.post_json(url, &json!({})).await })
    }

    fn content<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<FileDownload, TransportError>> {
        Box::pin(self.download(file))
    }

    fn without_key(&self, line: Bytes) -> Bytes {
        self.sender.credentials.current().secrets.clean(line)
    }
}

impl HttpTeacher {
    async fn upload_request(&self, file: &Path) -> Result<Request, TransportError> {
        let request = CreateFileRequest {
            file: FileInput {
                source: InputSource::Path { path: file.into() },
            },
            purpose: FilePurpose::Batch,
            expires_after: None,
        };
        let form = <Form as AsyncTryFrom<CreateFileRequest>>::try_from(request).await;
        let form = form.map_err(|error| TransportError::Broken(error.to_string()))?;
        let request = self.sender.client.post(self.address.method_url("files"));
        let request = request.multipart(form).timeout(UPLOAD_TIMEOUT).build();
        request.map_err(transport_error)
    }

    /// Starts the download of a file and returns its decoded chunks as a stream.
    async fn download(&self, file: &str) -> Result<FileDownload, TransportError> {
        let url = self.address.method_url(&format!("files/{file}/content"));
        let mut request = Request::new(Method::GET, url);
        *request.timeout_mut() = Some(DOWNLOAD_TIMEOUT);
        let timeout = self.download_idle_timeout;
        let response = tokio::time::timeout(timeout, self.sender.begin(request)).await;
        let (sent_headers, response) = response.map_err(|_| TransportError::Timeout)??;
        if !response.status().is_success() {
            let refusal = self.sender.finish(&sent_headers, response);
            let refusal = tokio::time::timeout(timeout, refusal).await;
            let refusal = refusal.map_err(|_| TransportError::Timeout)??;
            return Ok(FileDownload::Refused(refusal));
        }
        let decoder = ContentDecoder::new(response.headers());
        let chunks = stream::unfold(Some((response, decoder)), move |state| async move {
            let (mut response, mut decoder) = state?;
            let chunk = match tokio::time::timeout(timeout, response.chunk()).await {
                Err(_) => Err(TransportError::Timeout),
                Ok(Err(error)) => Err(transport_error(error)),
                Ok(Ok(None)) => {
                    let last = decoder.finish().map_err(undecodable);
                    return Some((last.map(Bytes::from), None));
                }
                Ok(Ok(Some(chunk))) => decoder.feed(&chunk).map_err(undecodable),
            };
            match chunk {
                Ok(decoded) => Some((Ok(decoded.into()), Some((response, decoder)))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(FileDownload::Content(chunks.boxed()))
    }
}

fn undecodable(error: std::io::Error) -> TransportError {
    TransportError::Broken(format!("the file's content encoding is invalid: {error}"))
}

#[cfg(test)]
mod tests;
