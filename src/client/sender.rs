//! One HTTP exchange: sends a request exactly once and reads the whole reply.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Request, Response, Url};
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::client::credentials::{Credentials, RequestHeaders};
use crate::client::response::encoding;
use crate::client::response::encoding::ContentDecoder;
use crate::client::response::json;
use crate::client::transport::{BodyEnd, HttpReply, LargeBodyPermit, TransportError};
use crate::ops::process;

/// Maximum size of a decoded body in bytes; no useful chat completion is larger.
const MAX_BODY_LENGTH: usize = 64 << 20;

/// Sends requests with the key and the headers of an endpoint.
pub(crate) struct HttpSender {
    pub client: reqwest::Client,
    pub credentials: Arc<Credentials>,
}

impl HttpSender {
    /// Sends a POST request with a JSON body and reads the whole reply.
    ///
    /// # Errors
    /// As [`HttpSender::send`].
    pub(crate) async fn post_json(
        &self,
        url: Url,
        body: &Value,
    ) -> Result<HttpReply, TransportError> {
        let body =
            serde_json::to_vec(body).map_err(|error| TransportError::Broken(error.to_string()))?;
        let mut request = Request::new(Method::POST, url);
        let content_type = HeaderValue::from_static("application/json");
        request.headers_mut().insert(CONTENT_TYPE, content_type);
        *request.body_mut() = Some(body.into());
        self.send(request).await
    }

    /// Sends a request and reads the whole reply, decoded and with keys removed.
    ///
    /// # Errors
    /// If no reply arrived, or the endpoint rejected the key and a new key is in place. A reply with an incomplete body is
    /// returned with the received part.
    pub(crate) async fn send(&self, request: Request) -> Result<HttpReply, TransportError> {
        let (sent_headers, response) = self.begin(request).await?;
        self.finish(&sent_headers, response).await
    }

    /// Sends a request. Returns the headers that were added to it, and the response before its body is read.
    pub(crate) async fn begin(
        &self,
        mut request: Request,
    ) -> Result<(Arc<RequestHeaders>, Response), TransportError> {
        let sent_headers = self.credentials.current();
        for (name, value) in &sent_headers.headers {
            request.headers_mut().insert(name, value.clone());
        }
        let response = self.client.execute(request).await;
        Ok((sent_headers, response.map_err(transport_error)?))
    }

    /// Reads the response to a request with the headers `sent_headers`, and removes keys from it. Renews the key if the
    /// endpoint rejected it.
    ///
    /// # Errors
    /// [`TransportError::KeyRenewed`] if a new key is in place.
    pub(crate) async fn finish(
        &self,
        sent_headers: &RequestHeaders,
        response: Response,
    ) -> Result<HttpReply, TransportError> {
        let mut reply = read_reply(response).await;
        let body = sent_headers.secrets.clean(reply.body.clone());
        if let BodyEnd::Unreadable { raw, .. } = &mut reply.end
            && body != reply.body
        {
            // The raw bytes contain the key, too.
            *raw = body.clone();
        }
        reply.body = body;
        sent_headers.secrets.clean_headers(&mut reply.headers);
        match reply.status {
            401 if self.credentials.renew(sent_headers).await => {
                return Err(TransportError::KeyRenewed);
            }
            200..300 => self.credentials.mark_accepted(),
            _ => {}
        }
        Ok(reply)
    }
}

/// Reads a response to its end.
async fn read_reply(mut response: Response) -> HttpReply {
    let status = response.status().as_u16();
    let headers = std::mem::take(response.headers_mut());
    let mut reader = BodyReader::new(&headers);
    let end = reader.read_all(response).await;
    let (body, end) = reader.finish(end);
    HttpReply {
        status,
        headers,
        body,
        end,
        permit: reader.permit,
    }
}

/// Permits for bodies longer than [`LARGE_BODY_LENGTH`]. A body occupies several times its size in memory until it
/// is written as a record.
static LARGE_BODY_PERMITS: Semaphore = Semaphore::const_new(2);

/// Length in bytes above which a body needs a permit.
const LARGE_BODY_LENGTH: usize = 4 << 20;

/// Reads and decodes the body of one response.
struct BodyReader {
    /// None after the end of the body.
    decoder: Option<ContentDecoder>,
    /// Decoded bytes.
    body: BodyChunks,
    /// Received bytes of an encoded body, kept in case they cannot be decoded.
    raw: BytesMut,
    permit: Option<LargeBodyPermit>,
}

impl BodyReader {
    fn new(headers: &HeaderMap) -> BodyReader {
        BodyReader {
            decoder: Some(ContentDecoder::new(headers)),
            body: BodyChunks::default(),
            raw: BytesMut::new(),
            permit: None,
        }
    }

    async fn read_all(&mut self, mut response: Response) -> BodyEnd {
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return BodyEnd::Complete,
                Err(error) => return BodyEnd::Truncated(transport_error(error)),
            };
            if let Err(end) = self.add(chunk) {
                return end;
            }
            if self.body.len() > MAX_BODY_LENGTH {
                let limit = MAX_BODY_LENGTH >> 20;
                let problem = format!("the body is larger than {limit} MiB");
                let raw = Bytes::new();
                return BodyEnd::Unreadable { problem, raw };
            }
            if self.body.len() > LARGE_BODY_LENGTH && self.permit.is_none() {
                // A static semaphore is never closed.
                self.permit = LARGE_BODY_PERMITS.acquire().await.ok().map(Arc::new);
            }
        }
    }

    /// Decodes a received chunk.
    ///
    /// # Errors
    /// [`BodyEnd::Unreadable`] if the encoding is invalid.
    fn add(&mut self, chunk: Bytes) -> Result<(), BodyEnd> {
        let Some(decoder) = &mut self.decoder else {
            return Ok(());
        };
        if decoder.begins_plain(&chunk) {
            self.body.add(chunk);
            return Ok(());
        }
        self.raw.extend_from_slice(&chunk);
        let decoded = decoder.feed(&chunk).map_err(undecodable)?;
        self.body.add(decoded.into());
        if decoder.is_plain() {
            self.raw.clear();
        }
        Ok(())
    }

    /// Returns the body and how it ended; `end` is the result of [`BodyReader::read_all`].
    fn finish(&mut self, end: BodyEnd) -> (Bytes, BodyEnd) {
        let last = match self.decoder.take() {
            Some(decoder) => decoder.finish().map_err(undecodable),
            None => Ok(Vec::new()),
        };
        let end = match (end, last) {
            (BodyEnd::Complete, Err(undecodable)) => undecodable,
            (end, last) => {
                self.body.add(last.unwrap_or_default().into());
                end
            }
        };
        let raw = self.raw.split().freeze();
        match end {
            BodyEnd::Unreadable { problem, .. } if !raw.is_empty() => {
                let body = encoding::salvage_gzip(&raw).map_or_else(|| raw.clone(), Bytes::from);
                (as_utf8(body), BodyEnd::Unreadable { problem, raw })
            }
            end => (as_utf8(encoding::decode_again(self.body.take())), end),
        }
    }
}

/// Concatenated chunks of a body; a single chunk is not copied.
#[derive(Default)]
struct BodyChunks {
    first: Bytes,
    /// All chunks, including the first; empty while there is only one.
    joined: BytesMut,
}

impl BodyChunks {
    fn add(&mut self, chunk: Bytes) {
        if self.len() == 0 {
            self.first = chunk;
            return;
        }
        if self.joined.is_empty() {
            self.joined.extend_from_slice(&self.first);
        }
        self.joined.extend_from_slice(&chunk);
    }

    fn len(&self) -> usize {
        self.first.len().max(self.joined.len())
    }

    fn take(&mut self) -> Bytes {
        if self.joined.is_empty() {
            std::mem::take(&mut self.first)
        } else {
            self.joined.split().freeze()
        }
    }
}

/// Converts a UTF-16 body to UTF-8, since keys are searched in UTF-8.
fn as_utf8(body: Bytes) -> Bytes {
    json::utf16(&body).map_or(body, Bytes::from)
}

fn undecodable(error: std::io::Error) -> BodyEnd {
    BodyEnd::Unreadable {
        problem: format!("the content encoding is invalid: {error}"),
        raw: Bytes::new(),
    }
}

/// Converts an error of the HTTP client.
pub(crate) fn transport_error(error: reqwest::Error) -> TransportError {
    let is_connect = error.is_connect();
    if error.is_timeout() && !is_connect {
        return TransportError::Timeout;
    }
    // The outer error messages ("error sending request") are generic; the innermost one names the cause.
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let io = cause.downcast_ref::<std::io::Error>();
    if io.is_some_and(process::is_out_of_descriptors) {
        return TransportError::NoDescriptor(cause.to_string());
    }
    let mut message = cause.to_string();
    if message.contains("UnknownIssuer") {
        message.push_str(
            " (the issuer of the endpoint's certificate is not trusted: set `teacher.ca_file` or \
             SSL_CERT_FILE)",
        );
    }
    if is_connect {
        TransportError::Unreachable(message)
    } else {
        TransportError::Broken(message)
    }
}
