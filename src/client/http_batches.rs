//! Files and batches over HTTP. async-openai builds the requests, except for file downloads: it would read
//! gigabytes into memory instead of streaming them.

use std::path::Path;
use std::time::Duration;

use async_openai::config::Config;
use async_openai::error::OpenAIError;
use async_openai::traits::RequestOptionsBuilder;
use async_openai::types::InputSource;
use async_openai::types::files::{CreateFileRequest, FileInput, FilePurpose};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use reqwest::{Method, Request, Url};
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::client::http::HttpTeacher;
use crate::client::one_attempt;
use crate::client::one_attempt::unpack;
use crate::client::response::encoding::Decoder;
use crate::client::transport::{BatchApi, FileDownload, HttpReply, TransportError};

/// Batches per page; 100 is the maximum of the API.
const PAGE: &str = "100";

/// Maximum duration of a download that keeps receiving data.
const LONGEST_DOWNLOAD: Duration = Duration::from_secs(24 * 3_600);

type Ignored = Result<IgnoredAny, OpenAIError>;

impl BatchApi for HttpTeacher {
    fn upload<'a>(&'a self, file: &'a Path) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        let request = CreateFileRequest {
            file: FileInput {
                source: InputSource::Path { path: file.into() },
            },
            purpose: FilePurpose::Batch,
            expires_after: None,
        };
        Box::pin(async move {
            let reply: Ignored = self.client.files().create_byot(request).await;
            unpack(reply)
        })
    }

    fn create<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        Box::pin(async move {
            let reply: Ignored = self.client.batches().create_byot(body).await;
            unpack(reply)
        })
    }

    fn retrieve<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        Box::pin(async move {
            let reply: Ignored = self.client.batches().retrieve_byot(batch).await;
            unpack(reply)
        })
    }

    fn list<'a>(
        &'a self,
        after: Option<&'a str>,
    ) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        Box::pin(async move {
            let mut query = vec![("limit", PAGE)];
            query.extend(after.map(|after| ("after", after)));
            let batches = self.client.batches().query(&query);
            let batches = batches.map_err(|error| TransportError::Broken(error.to_string()))?;
            let reply: Ignored = batches.list_byot().await;
            unpack(reply)
        })
    }

    fn cancel<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        Box::pin(async move {
            let reply: Ignored = self.client.batches().cancel_byot(batch).await;
            unpack(reply)
        })
    }

    fn content<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<FileDownload, TransportError>> {
        Box::pin(self.download(file))
    }

    fn without_key(&self, line: Bytes) -> Bytes {
        self.http.credentials.current().secrets.clean(line)
    }
}

impl HttpTeacher {
    /// Starts the download of a file and returns its decoded chunks as a stream.
    async fn download(&self, file: &str) -> Result<FileDownload, TransportError> {
        let endpoint = self.client.config();
        let url = endpoint.url(&format!("/files/{file}/content"));
        let mut url: Url = url
            .parse()
            .map_err(|_| TransportError::Broken("the file id gives an invalid URL".into()))?;
        if !endpoint.query().is_empty() {
            url.query_pairs_mut().extend_pairs(endpoint.query());
        }
        let mut request = Request::new(Method::GET, url);
        *request.timeout_mut() = Some(LONGEST_DOWNLOAD);
        let timeout = self.timeout;
        let response = tokio::time::timeout(timeout, self.http.begin(request)).await;
        let (sent, response) = response.map_err(|_| TransportError::Timeout)??;
        let status = response.status();
        if !status.is_success() {
            let mut reply = one_attempt::read(response).await;
            reply.body = self.without_key(reply.body);
            sent.secrets.clean_headers(&mut reply.headers);
            self.http
                .renew_key_if_rejected(&sent, status.as_u16())
                .await?;
            return Ok(FileDownload::Refused(reply));
        }
        let decoder = Decoder::new(response.headers());
        let chunks = stream::unfold(Some((response, decoder)), move |state| async move {
            let (mut response, mut decoder) = state?;
            let chunk = match tokio::time::timeout(timeout, response.chunk()).await {
                Err(_) => Err(TransportError::Timeout),
                Ok(Err(error)) => Err(one_attempt::transport_error(error)),
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
