//! Requests of HTTP/1.1 in bytes, as far as they have come. Pure.

use std::ops::Range;

const MAX_HEAD: usize = 64 << 10;

/// Where the parts of a request's head are in the bytes that it was read from.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestHead {
    pub method: Range<usize>,
    pub path: Range<usize>,
    pub authorization: Option<Range<usize>>,
    pub content_type: Option<Range<usize>>,
    /// Of the body, unless it is chunked.
    pub length: usize,
    pub chunked: bool,
    /// Whether the client wants the connection closed after the answer.
    pub close: bool,
    /// Whether the client waits for a word before it sends the body.
    pub expects_continue: bool,
    /// Whether the client accepts gzip.
    pub takes_gzip: bool,
    /// Where the body begins.
    pub end: usize,
}

/// Why a request cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestError {
    Malformed,
    HeadTooLarge,
    TooLarge,
}

impl RequestError {
    pub(crate) fn status(self) -> u16 {
        match self {
            RequestError::Malformed => 400,
            RequestError::HeadTooLarge => 431,
            RequestError::TooLarge => 413,
        }
    }

    pub(crate) fn message(self) -> &'static str {
        match self {
            RequestError::Malformed => "this is no HTTP/1.1 request",
            RequestError::HeadTooLarge => "the head of the request is too large",
            RequestError::TooLarge => "the body of the request is too large",
        }
    }
}

/// The head that `input` begins with; none while it is incomplete.
pub(crate) fn parse_head(input: &[u8]) -> Result<Option<RequestHead>, RequestError> {
    let mut head = RequestHead::default();
    let mut start = 0;
    loop {
        let Some(length) = input[start..].iter().position(|byte| *byte == b'\n') else {
            return match input.len() > MAX_HEAD {
                true => Err(RequestError::HeadTooLarge),
                false => Ok(None),
            };
        };
        let mut line = start..start + length;
        let next = line.end + 1;
        if input[line.clone()].ends_with(b"\r") {
            line.end -= 1;
        }
        if start == 0 {
            parse_request_line(input, line, &mut head)?;
        } else if line.is_empty() {
            head.end = next;
            return Ok(Some(head));
        } else {
            parse_field(input, line, &mut head)?;
        }
        start = next;
    }
}

/// `POST /v1/chat/completions HTTP/1.1`
fn parse_request_line(
    input: &[u8],
    line: Range<usize>,
    head: &mut RequestHead,
) -> Result<(), RequestError> {
    let bytes = &input[line.clone()];
    let mut spaces = bytes
        .iter()
        .enumerate()
        .filter_map(|(index, byte)| (*byte == b' ').then_some(index));
    let (Some(first), Some(second)) = (spaces.next(), spaces.next()) else {
        return Err(RequestError::Malformed);
    };
    head.method = line.start..line.start + first;
    head.path = line.start + first + 1..line.start + second;
    head.close = match &bytes[second + 1..] {
        b"HTTP/1.1" => false,
        b"HTTP/1.0" => true,
        _ => return Err(RequestError::Malformed),
    };
    Ok(())
}

fn parse_field(
    input: &[u8],
    line: Range<usize>,
    head: &mut RequestHead,
) -> Result<(), RequestError> {
    let bytes = &input[line.clone()];
    let colon = bytes.iter().position(|byte| *byte == b':');
    let colon = colon.ok_or(RequestError::Malformed)?;
    let (name, value) = (&bytes[..colon], bytes[colon + 1..].trim_ascii());
    let place = || {
        let before = bytes[colon + 1..].len() - bytes[colon + 1..].trim_ascii_start().len();
        let start = line.start + colon + 1 + before;
        start..start + value.len()
    };
    let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
    let says = |word: &str| {
        value
            .split(|byte| *byte == b',')
            .any(|part| part.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
    };
    // By length first: most fields are none of these.
    match name.len() {
        6 if is("expect") => head.expects_continue = says("100-continue"),
        10 if is("connection") => head.close |= says("close"),
        12 if is("content-type") => head.content_type = Some(place()),
        13 if is("authorization") => head.authorization = Some(place()),
        14 if is("content-length") => {
            let length = std::str::from_utf8(value).ok();
            let length = length.and_then(|length| length.parse().ok());
            head.length = length.ok_or(RequestError::Malformed)?;
        }
        15 if is("accept-encoding") => head.takes_gzip = says("gzip"),
        17 if is("transfer-encoding") => head.chunked = says("chunked"),
        _ => {}
    }
    Ok(())
}

/// A chunked body, as far as it has come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ChunkedBody {
    pub body: Vec<u8>,
    /// Where the next chunk begins; at last, where the request ends.
    pub at: usize,
    /// Whether only trailers are missing.
    is_last: bool,
}

impl ChunkedBody {
    /// One that begins at `at`.
    pub(crate) fn new(at: usize) -> ChunkedBody {
        ChunkedBody {
            body: Vec::new(),
            at,
            is_last: false,
        }
    }

    /// Takes in what has come since the last call, which `input` still begins with. True once the
    /// body is whole.
    pub(crate) fn advance(&mut self, input: &[u8]) -> Result<bool, RequestError> {
        while !self.is_last {
            let Some(line) = line_at(input, self.at) else {
                return Ok(false);
            };
            // What follows a semicolon is an extension.
            let size = line.split(|byte| *byte == b';').next().unwrap_or_default();
            let size = std::str::from_utf8(size.trim_ascii()).ok();
            let size = size.and_then(|size| usize::from_str_radix(size, 16).ok());
            let size = size.ok_or(RequestError::Malformed)?;
            let start = self.at + line.len() + 2;
            if size == 0 {
                self.at = start;
                self.is_last = true;
                break;
            }
            let end = start.checked_add(size).ok_or(RequestError::Malformed)?;
            if input.len() < end.saturating_add(2) {
                return Ok(false);
            }
            self.body.extend_from_slice(&input[start..end]);
            self.at = end + 2;
        }
        // Trailers, up to an empty line.
        while let Some(line) = line_at(input, self.at) {
            self.at += line.len() + 2;
            if line.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The line that begins at `start`, without its end; none while that has not come.
fn line_at(input: &[u8], start: usize) -> Option<&[u8]> {
    let rest = input.get(start..)?;
    let end = rest.windows(2).position(|window| window == b"\r\n")?;
    Some(&rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &[u8] = b"POST /v1/x?y HTTP/1.1\r\nHost: h\r\nAUTHORIZATION:  Bearer k \r\n\
        Content-Length: 3\r\n\r\nabcGET /";

    #[test]
    fn a_head_is_found_once_it_is_whole() {
        let end = REQUEST.len() - 8;
        for cut in 0..end {
            assert_eq!(parse_head(&REQUEST[..cut]), Ok(None), "at {cut}");
        }
        let head = parse_head(REQUEST).unwrap().unwrap();
        assert_eq!(head.end, end);
        assert_eq!(&REQUEST[head.method], b"POST");
        assert_eq!(&REQUEST[head.path], b"/v1/x?y");
        assert_eq!(&REQUEST[head.authorization.unwrap()], b"Bearer k");
        assert_eq!((head.length, head.chunked, head.close), (3, false, false));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for input in [
            &b"hello\r\n\r\n"[..],
            b"GET / HTTP/2\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        ] {
            assert_eq!(parse_head(input), Err(RequestError::Malformed));
        }
        assert_eq!(
            parse_head(&[b'x'; MAX_HEAD + 1]),
            Err(RequestError::HeadTooLarge)
        );
    }

    #[test]
    fn chunks_are_joined_once_the_last_one_is_there() {
        let input = b"..3;a=b\r\nabc\r\n0A\r\n0123456789\r\n0\r\nx: y\r\n\r\nmore";
        let end = input.len() - 4;
        let mut chunks = ChunkedBody::new(2);
        for cut in 2..end {
            assert_eq!(chunks.advance(&input[..cut]), Ok(false), "at {cut}");
        }
        for mut chunks in [chunks, ChunkedBody::new(2)] {
            assert_eq!(chunks.advance(input), Ok(true));
            assert_eq!(chunks.body, b"abc0123456789");
            assert_eq!(chunks.at, end);
        }
        assert_eq!(
            ChunkedBody::new(0).advance(b"zz\r\n"),
            Err(RequestError::Malformed)
        );
    }
}
