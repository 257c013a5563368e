//! Serves the mock over raw TCP: HTTP/1.1 with keep-alive, and failures of the connection.
//!
//! Load tests use this server, so a small request needs only one read and one write.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::mock::Mock;
use crate::mock::parse::{ChunkedBody, RequestError, RequestHead, parse_head};
use crate::mock::request::MockRequest;
use crate::mock::response::{MockReply, MockResponse};

/// Maximum length of a request body in bytes. A batch file may have 200 MB.
const MAX_BODY_BYTES: usize = 512 << 20;
/// A body of at most this many bytes is sent in one write with its head.
const SINGLE_WRITE_BYTES: usize = 64 << 10;
/// Number of bytes of the next request after which reading pauses until the current request is answered.
const MAX_READ_AHEAD_BYTES: usize = 64 << 10;
/// Delay before a reset, so that the reset does not overtake the bytes sent before it.
const RESET_DELAY: Duration = Duration::from_millis(20);

/// Accepts connections until the future is dropped. Connections end with the runtime.
pub async fn serve(mock: Arc<Mock>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let mock = Arc::clone(&mock);
                tokio::spawn(async move {
                    mock.state().stats.record_connection();
                    if let Err(error) = serve_connection(stream, &mock).await {
                        tracing::debug!("connection failed: {error}");
                    }
                });
            }
            // Usually, too many files are open: wait until some are closed.
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Answers requests one by one until either side closes the connection.
async fn serve_connection(stream: TcpStream, mock: &Mock) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut connection = MockConnection {
        stream,
        input: Vec::with_capacity(8 << 10),
        output: Vec::with_capacity(8 << 10),
    };
    loop {
        let head = match connection.read_head().await? {
            Some(Ok(head)) => head,
            Some(Err(error)) => return connection.send_error(error).await,
            None => return Ok(()),
        };
        let chunks = match connection.read_body(&head).await? {
            Some(Ok(body)) => body,
            Some(Err(error)) => return connection.send_error(error).await,
            None => return Ok(()),
        };
        let end = chunks
            .as_ref()
            .map_or(head.end + head.body_length, |chunks| chunks.offset);
        let request = MockRequest {
            method: &head.method,
            path: &head.path,
            authorization: head.authorization.as_deref(),
            content_type: head.content_type.as_deref(),
            body: match &chunks {
                Some(chunks) => &chunks.body,
                None => &connection.input[head.end..end],
            },
        };
        let mut next_request = Vec::new();
        let response = tokio::select! {
            biased;
            response = mock.respond(request) => response,
            closed = wait_for_close(&mut connection.stream, &mut next_request) => return closed,
        };
        connection.input.drain(..end);
        connection.input.extend_from_slice(&next_request);
        let response = match response {
            MockResponse::Complete(reply) if mock.script.answers.gzip && head.accepts_gzip => {
                MockResponse::Complete(gzip_reply(reply)?)
            }
            other => other,
        };
        let is_reusable = connection.send_response(response, head.must_close).await?;
        if !is_reusable {
            return Ok(());
        }
    }
}

/// Compresses the body at the fastest level, as gateways do.
fn gzip_reply(reply: MockReply) -> io::Result<MockReply> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&reply.body)?;
    let mut headers = reply.headers;
    headers.push(("content-encoding".into(), "gzip".into()));
    Ok(MockReply {
        headers,
        body: encoder.finish()?.into(),
        ..reply
    })
}

/// Returns when the client closes the connection. Bytes that the client sends before that, which belong to its next
/// request, are appended to `received`.
async fn wait_for_close(stream: &mut TcpStream, received: &mut Vec<u8>) -> io::Result<()> {
    while received.len() < MAX_READ_AHEAD_BYTES {
        if stream.read_buf(received).await? == 0 {
            return Ok(());
        }
    }
    // The client counts as connected from here on: its close is not detected.
    std::future::pending().await
}

/// A connection of a client.
struct MockConnection {
    stream: TcpStream,
    /// Received bytes, from the start of the current request.
    input: Vec<u8>,
    /// Bytes to send: a head, and its body if that is small.
    output: Vec<u8>,
}

impl MockConnection {
    /// Reads until the head is complete. Returns None if the client closes the connection first.
    async fn read_head(&mut self) -> io::Result<Option<Result<RequestHead, RequestError>>> {
        loop {
            match parse_head(&self.input) {
                Ok(Some(head)) => return Ok(Some(Ok(head))),
                Ok(None) => {}
                Err(error) => return Ok(Some(Err(error))),
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Reads until the body is complete. A plain body stays in `input`; a chunked body is returned
    /// decoded. Returns None if the client closes the connection first.
    async fn read_body(
        &mut self,
        head: &RequestHead,
    ) -> io::Result<Option<Result<Option<ChunkedBody>, RequestError>>> {
        if head.body_length > MAX_BODY_BYTES {
            return Ok(Some(Err(RequestError::BodyTooLarge)));
        }
        if head.expects_continue && self.input.len() == head.end {
            self.stream
                .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                .await?;
        }
        let mut chunks = head.is_chunked.then(|| ChunkedBody::new(head.end));
        let end = head.end + head.body_length;
        self.input.reserve(end.saturating_sub(self.input.len()));
        loop {
            let is_complete = match &mut chunks {
                None => Ok(self.input.len() >= end),
                Some(_) if self.input.len() > MAX_BODY_BYTES => Err(RequestError::BodyTooLarge),
                Some(chunks) => chunks.advance(&self.input),
            };
            match is_complete {
                Ok(true) => return Ok(Some(Ok(chunks))),
                Ok(false) => {}
                Err(error) => return Ok(Some(Err(error))),
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Ok(None);
            }
        }
    }

    async fn send_error(&mut self, error: RequestError) -> io::Result<()> {
        let reply = MockReply::error(error.status(), error.message(), "bad_request");
        self.send_response(MockResponse::Complete(reply), true)
            .await?;
        Ok(())
    }

    /// Sends a response. Returns true if the connection can be used for another request.
    async fn send_response(
        &mut self,
        response: MockResponse,
        must_close: bool,
    ) -> io::Result<bool> {
        match response {
            MockResponse::Complete(reply) => {
                self.write_head(&reply, Some(reply.body.len()), must_close);
                if reply.body.len() <= SINGLE_WRITE_BYTES {
                    self.output.extend_from_slice(&reply.body);
                    self.flush().await?;
                } else {
                    self.flush().await?;
                    self.stream.write_all(&reply.body).await?;
                }
                return Ok(!must_close);
            }
            MockResponse::Refused | MockResponse::Reset => self.stream.set_zero_linger()?,
            MockResponse::ResetInBody(reply) => {
                self.send_half(&reply).await?;
                tokio::time::sleep(RESET_DELAY).await;
                self.stream.set_zero_linger()?;
            }
            MockResponse::ShortBody(reply) => {
                self.send_half(&reply).await?;
                self.stream.shutdown().await?;
            }
            MockResponse::UnfinishedChunks(reply) => {
                self.write_head(&reply, None, must_close);
                let size = format!("{:x}\r\n", reply.body.len());
                self.output.extend_from_slice(size.as_bytes());
                self.output.extend_from_slice(&reply.body);
                self.output.extend_from_slice(b"\r\n");
                self.flush().await?;
                self.stream.shutdown().await?;
            }
            MockResponse::StallInBody(reply) => {
                self.send_half(&reply).await?;
                wait_for_close(&mut self.stream, &mut Vec::new()).await?;
            }
            MockResponse::Drip {
                reply,
                slow,
                interval,
            } => {
                self.write_head(&reply, Some(reply.body.len()), must_close);
                self.flush().await?;
                let (slow, remaining) = reply.body.split_at(slow.min(reply.body.len()));
                for byte in slow {
                    tokio::time::sleep(interval).await;
                    self.stream.write_all(&[*byte]).await?;
                }
                self.stream.write_all(remaining).await?;
                return Ok(!must_close);
            }
        }
        Ok(false)
    }

    /// Sends the head and the first half of the body.
    async fn send_half(&mut self, reply: &MockReply) -> io::Result<()> {
        self.write_head(reply, Some(reply.body.len()), false);
        self.output
            .extend_from_slice(&reply.body[..reply.body.len() / 2]);
        self.flush().await
    }

    /// Appends the head of a reply to `output`; without a `length`, the body is chunked.
    fn write_head(&mut self, reply: &MockReply, length: Option<usize>, must_close: bool) {
        let out = &mut self.output;
        match reply.status {
            200 => out.extend_from_slice(b"HTTP/1.1 200 OK\r\ncontent-type: "),
            status => {
                let line = format!("HTTP/1.1 {status} Mock\r\ncontent-type: ");
                out.extend_from_slice(line.as_bytes());
            }
        }
        out.extend_from_slice(reply.content_type.as_bytes());
        match length {
            Some(length) => {
                out.extend_from_slice(b"\r\ncontent-length: ");
                crate::mock::logprobs::write_number(out, length as u64);
            }
            None => out.extend_from_slice(b"\r\ntransfer-encoding: chunked"),
        }
        for (name, value) in &reply.headers {
            for part in ["\r\n", name, ": ", value] {
                out.extend_from_slice(part.as_bytes());
            }
        }
        if must_close {
            out.extend_from_slice(b"\r\nconnection: close");
        }
        out.extend_from_slice(b"\r\n\r\n");
    }

    /// Sends `output` and clears it.
    async fn flush(&mut self) -> io::Result<()> {
        let result = self.stream.write_all(&self.output).await;
        self.output.clear();
        result
    }
}
