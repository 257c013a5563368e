//! Parses HTTP/1.1 requests from the bytes received so far, with `httparse`. Pure.

use httparse::{EMPTY_HEADER, Status, parse_chunk_size, parse_headers};

/// Maximum length of a head in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Maximum number of headers, and of trailers.
const MAX_HEADERS: usize = 128;

/// The request line, and the headers that the mock reads.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestHead {
    pub method: String,
    /// Path and query.
    pub path: String,
    pub authorization: Option<String>,
    pub content_type: Option<String>,
    /// Content length in bytes; 0 for a chunked body.
    pub body_length: usize,
    pub is_chunked: bool,
    /// True if the connection must be closed after the reply.
    pub must_close: bool,
    /// True if the client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    pub accepts_gzip: bool,
    /// Length of the head in bytes, which is the offset of the body.
    pub end: usize,
}

/// The reason why a request cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestError {
    Malformed,
    HeadTooLarge,
    BodyTooLarge,
}

impl RequestError {
    pub(crate) fn status(self) -> u16 {
        match self {
            RequestError::Malformed => 400,
            RequestError::HeadTooLarge => 431,
            RequestError::BodyTooLarge => 413,
        }
    }

    pub(crate) fn message(self) -> &'static str {
        match self {
            RequestError::Malformed => "not a valid HTTP/1.1 request",
            RequestError::HeadTooLarge => "the head of the request is too large",
            RequestError::BodyTooLarge => "the body of the request is too large",
        }
    }
}

/// Parses the head at the start of `input`. Returns None while the head is incomplete.
pub(crate) fn parse_head(input: &[u8]) -> Result<Option<RequestHead>, RequestError> {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let end = match request.parse(input) {
        Ok(Status::Complete(end)) => end,
        Ok(Status::Partial) if input.len() > MAX_HEAD_BYTES => {
            return Err(RequestError::HeadTooLarge);
        }
        Ok(Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(RequestError::HeadTooLarge),
        Err(_) => return Err(RequestError::Malformed),
    };
    let mut head = RequestHead {
        method: request.method.unwrap_or_default().into(),
        path: request.path.unwrap_or_default().into(),
        must_close: request.version == Some(0),
        end,
        ..RequestHead::default()
    };
    for header in request.headers.iter() {
        read_header(header.name, header.value, &mut head)?;
    }
    Ok(Some(head))
}

fn read_header(name: &str, value: &[u8], head: &mut RequestHead) -> Result<(), RequestError> {
    let is_named = |other: &str| name.eq_ignore_ascii_case(other);
    let contains = |word: &str| {
        value
            .split(|byte| *byte == b',')
            .any(|part| part.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
    };
    let text = || String::from_utf8_lossy(value).into_owned();
    if is_named("authorization") {
        head.authorization = Some(text());
    } else if is_named("content-type") {
        head.content_type = Some(text());
    } else if is_named("content-length") {
        head.body_length = text().parse().map_err(|_| RequestError::Malformed)?;
    } else if is_named("transfer-encoding") {
        head.is_chunked = contains("chunked");
    } else if is_named("connection") {
        head.must_close |= contains("close");
    } else if is_named("expect") {
        head.expects_continue = contains("100-continue");
    } else if is_named("accept-encoding") {
        head.accepts_gzip = contains("gzip");
    }
    Ok(())
}

/// A chunked body, decoded as far as it has been received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ChunkedBody {
    pub body: Vec<u8>,
    /// Offset of the next chunk in the input; once the body is complete, of the end of the request.
    pub offset: usize,
    /// True if the last chunk was received, so that only the trailers can be missing.
    has_last_chunk: bool,
}

impl ChunkedBody {
    /// Starts decoding at `offset` in the input.
    pub(crate) fn new(offset: usize) -> ChunkedBody {
        ChunkedBody {
            body: Vec::new(),
            offset,
            has_last_chunk: false,
        }
    }

    /// Decodes the chunks received since the last call. `input` must begin with the input of the last call. Returns
    /// true if the body is complete.
    pub(crate) fn advance(&mut self, input: &[u8]) -> Result<bool, RequestError> {
        let malformed = || RequestError::Malformed;
        while !self.has_last_chunk {
            let size = parse_chunk_size(&input[self.offset..]).map_err(|_| malformed())?;
            let Status::Complete((line_length, size)) = size else {
                return Ok(false);
            };
            let start = self.offset + line_length;
            if size == 0 {
                self.offset = start;
                self.has_last_chunk = true;
                break;
            }
            let size = usize::try_from(size).map_err(|_| malformed())?;
            let end = start.checked_add(size).ok_or_else(malformed)?;
            if input.len() < end.saturating_add(2) {
                return Ok(false);
            }
            self.body.extend_from_slice(&input[start..end]);
            self.offset = end + 2;
        }
        let mut trailers = [EMPTY_HEADER; MAX_HEADERS];
        match parse_headers(&input[self.offset..], &mut trailers).map_err(|_| malformed())? {
            Status::Complete((length, _)) => {
                self.offset += length;
                Ok(true)
            }
            Status::Partial => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &[u8] = b"POST /v1/x?y HTTP/1.1\r\nHost: h\r\nAUTHORIZATION:  Bearer k \r\n\
        Content-Length: 3\r\n\r\nabcGET /";

    #[test]
    fn head_is_parsed_once_complete() {
        let end = REQUEST.len() - 8;
        for cut in 0..end {
            assert_eq!(parse_head(&REQUEST[..cut]), Ok(None), "at {cut}");
        }
        let head = parse_head(REQUEST).unwrap().unwrap();
        assert_eq!(head.end, end);
        assert_eq!(head.method, "POST");
        assert_eq!(head.path, "/v1/x?y");
        assert_eq!(head.authorization.unwrap(), "Bearer k");
        assert_eq!(
            (head.body_length, head.is_chunked, head.must_close),
            (3, false, false)
        );
    }

    #[test]
    fn malformed_and_oversized_heads_are_rejected() {
        for input in [
            &b"hello\r\n\r\n"[..],
            b"GET / HTTP/2\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        ] {
            assert_eq!(parse_head(input), Err(RequestError::Malformed));
        }
        assert_eq!(
            parse_head(&[b'x'; MAX_HEAD_BYTES + 1]),
            Err(RequestError::HeadTooLarge)
        );
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "a: b\r\n".repeat(MAX_HEADERS + 1)
        );
        assert_eq!(parse_head(many.as_bytes()), Err(RequestError::HeadTooLarge));
    }

    #[test]
    fn chunks_are_joined_once_the_last_chunk_is_received() {
        let input = b"..3;a=b\r\nabc\r\n0A\r\n0123456789\r\n0\r\nx: y\r\n\r\nmore";
        let end = input.len() - 4;
        let mut chunks = ChunkedBody::new(2);
        for cut in 2..end {
            assert_eq!(chunks.advance(&input[..cut]), Ok(false), "at {cut}");
        }
        for mut chunks in [chunks, ChunkedBody::new(2)] {
            assert_eq!(chunks.advance(input), Ok(true));
            assert_eq!(chunks.body, b"abc0123456789");
            assert_eq!(chunks.offset, end);
        }
        assert_eq!(
            ChunkedBody::new(0).advance(b"zz\r\n"),
            Err(RequestError::Malformed)
        );
    }
}
