//! `Content-Encoding`: the accepted encodings, and decoding of bodies chunk by chunk.
//!
//! Compression reduces top-k logprobs to a tenth, so requests accept it. Some servers compress without being asked
//! or label a body wrongly, so the magic number of the first bytes takes precedence over the label.

use std::io::{self, Read, Write};

use brotli_decompressor::DecompressorWriter;
use bytes::Bytes;
use flate2::write::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use reqwest::header::{CONTENT_ENCODING, HeaderMap};
use zstd::stream::raw;

/// Value of `Accept-Encoding`.
pub(crate) const ACCEPTED: &str = "zstd, gzip, br, deflate";

/// Maximum decoded size of one chunk in bytes: a few kilobytes can unpack to gigabytes.
const MAX_DECODED_CHUNK: usize = 64 << 20;

/// Number of leading bytes that identify the encoding.
const MAGIC_LENGTH: usize = 4;

/// Buffer size of the Brotli decoder, in bytes.
const BROTLI_BUFFER: usize = 4096;

/// Decodes the body of one response.
pub(crate) struct ContentDecoder {
    declared: Option<Encoding>,
    state: DecoderState,
}

/// A content encoding that can be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Gzip,
    Zstd,
    Brotli,
    Deflate,
}

/// The decoder of a body, once its encoding is known.
enum DecoderState {
    /// Fewer than [`MAGIC_LENGTH`] bytes have arrived.
    Beginning(Vec<u8>),
    Plain,
    Gzip(MultiGzDecoder<Sink>),
    Zlib(ZlibDecoder<Sink>),
    Deflate(DeflateDecoder<Sink>),
    Zstd(ZstdDecoder),
    Brotli(Box<DecompressorWriter<Sink>>),
}

/// Unlike `zstd::stream::write::Decoder`, it tells a complete frame from a truncated one.
type ZstdDecoder = zstd::stream::zio::Writer<Sink, raw::Decoder<'static>>;

/// Output of a decoder: decoded bytes that [`DecoderState::feed`] has not returned yet.
#[derive(Default)]
struct Sink(Vec<u8>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_DECODED_CHUNK {
            return Err(io::Error::other("one chunk unpacks to more than 64 MiB"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ContentDecoder {
    /// Returns a decoder for the body of a response with these headers.
    pub(crate) fn new(headers: &HeaderMap) -> ContentDecoder {
        let label = headers
            .get_all(CONTENT_ENCODING)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(|word| word.trim().to_ascii_lowercase())
            .rfind(|word| word != "identity");
        let declared = match label.as_deref() {
            Some("gzip" | "x-gzip") => Some(Encoding::Gzip),
            Some("zstd") => Some(Encoding::Zstd),
            Some("br") => Some(Encoding::Brotli),
            Some("deflate") => Some(Encoding::Deflate),
            _ => None,
        };
        ContentDecoder {
            declared,
            state: DecoderState::Beginning(Vec::new()),
        }
    }

    /// Returns true if the body is not encoded.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.state, DecoderState::Plain)
    }

    /// As [`ContentDecoder::is_plain`], but if no chunk has arrived yet, also inspects `chunk`, the first one. Does not
    /// decode it.
    pub(crate) fn begins_plain(&mut self, chunk: &[u8]) -> bool {
        let is_first =
            matches!(&self.state, DecoderState::Beginning(first_bytes) if first_bytes.is_empty());
        if is_first && chunk.len() >= MAGIC_LENGTH && encoding(chunk, self.declared).is_none() {
            self.state = DecoderState::Plain;
        }
        self.is_plain()
    }

    /// Decodes the next chunk of the body.
    ///
    /// # Errors
    /// If the encoding is invalid, or the chunk unpacks to more than [`MAX_DECODED_CHUNK`] bytes.
    pub(crate) fn feed(&mut self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        let DecoderState::Beginning(first_bytes) = &mut self.state else {
            return self.state.feed(chunk);
        };
        first_bytes.extend_from_slice(chunk);
        if first_bytes.len() < MAGIC_LENGTH {
            return Ok(Vec::new());
        }
        self.begin()
    }

    /// Ends the body. Returns its last decoded bytes.
    ///
    /// # Errors
    /// If the encoded stream is truncated or invalid.
    pub(crate) fn finish(mut self) -> io::Result<Vec<u8>> {
        let mut decoded = Vec::new();
        if matches!(self.state, DecoderState::Beginning(_)) {
            decoded = self.begin()?;
        }
        decoded.extend(self.state.finish()?);
        Ok(decoded)
    }

    /// Selects the decoder by the first bytes of the body and decodes them.
    fn begin(&mut self) -> io::Result<Vec<u8>> {
        let DecoderState::Beginning(first_bytes) = &mut self.state else {
            return Ok(Vec::new());
        };
        let first_bytes = std::mem::take(first_bytes);
        self.state = match encoding(&first_bytes, self.declared) {
            None => DecoderState::Plain,
            Some(Encoding::Gzip) => DecoderState::Gzip(MultiGzDecoder::new(Sink::default())),
            Some(Encoding::Zstd) => {
                DecoderState::Zstd(ZstdDecoder::new(Sink::default(), raw::Decoder::new()?))
            }
            Some(Encoding::Brotli) => {
                let writer = DecompressorWriter::new(Sink::default(), BROTLI_BUFFER);
                DecoderState::Brotli(Box::new(writer))
            }
            // "deflate" means zlib, but some servers omit its two header bytes.
            Some(Encoding::Deflate) if is_zlib(&first_bytes) => {
                DecoderState::Zlib(ZlibDecoder::new(Sink::default()))
            }
            Some(Encoding::Deflate) => DecoderState::Deflate(DeflateDecoder::new(Sink::default())),
        };
        self.state.feed(&first_bytes)
    }
}

impl DecoderState {
    fn feed(&mut self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            DecoderState::Beginning(_) | DecoderState::Plain => Ok(chunk.to_vec()),
            DecoderState::Gzip(decoder) => decode(decoder, chunk, MultiGzDecoder::get_mut),
            DecoderState::Zlib(decoder) => decode(decoder, chunk, ZlibDecoder::get_mut),
            DecoderState::Deflate(decoder) => decode(decoder, chunk, DeflateDecoder::get_mut),
            DecoderState::Zstd(decoder) => decode(decoder, chunk, ZstdDecoder::writer_mut),
            DecoderState::Brotli(decoder) => {
                decode(&mut **decoder, chunk, |brotli| brotli.get_mut())
            }
        }
    }

    fn finish(self) -> io::Result<Vec<u8>> {
        let sink = match self {
            DecoderState::Beginning(_) | DecoderState::Plain => return Ok(Vec::new()),
            DecoderState::Gzip(decoder) => decoder.finish()?,
            DecoderState::Zlib(decoder) => decoder.finish()?,
            DecoderState::Deflate(decoder) => decoder.finish()?,
            DecoderState::Zstd(mut decoder) => {
                decoder.finish()?;
                decoder.into_inner().0
            }
            DecoderState::Brotli(mut decoder) => {
                decoder.close()?;
                decoder
                    .into_inner()
                    .map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?
            }
        };
        Ok(sink.0)
    }
}

/// Feeds a chunk to a decoder. Returns the bytes that arrived in the decoder's sink.
fn decode<D: Write>(
    decoder: &mut D,
    chunk: &[u8],
    sink: impl Fn(&mut D) -> &mut Sink,
) -> io::Result<Vec<u8>> {
    decoder.write_all(chunk)?;
    Ok(std::mem::take(&mut sink(decoder).0))
}

/// Decodes a body again while it begins with the magic number of an encoding, up to three times.
pub(crate) fn decode_again(mut body: Bytes) -> Bytes {
    const MAX_LAYERS: usize = 3;
    for _ in 0..MAX_LAYERS {
        if encoding(&body, None).is_none() {
            break;
        }
        let mut decoder = ContentDecoder::new(&HeaderMap::new());
        let decoded = decoder.feed(&body).and_then(|mut decoded| {
            decoded.extend(decoder.finish()?);
            Ok(decoded)
        });
        match decoded {
            Ok(decoded) => body = decoded.into(),
            Err(_) => break,
        }
    }
    body
}

/// Decodes a gzip stream that is followed by other bytes or truncated. A member with invalid data or a wrong checksum
/// ends the result, without its text. None if nothing could be decoded.
pub(crate) fn salvage_gzip(raw: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::new();
    let mut remaining = raw;
    while encoding(remaining, None).is_some() {
        let before = decoded.len();
        let limit = (MAX_DECODED_CHUNK - before) as u64;
        let mut member = flate2::bufread::GzDecoder::new(remaining).take(limit);
        match member.read_to_end(&mut decoded) {
            Ok(_) => remaining = member.into_inner().into_inner(),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(_) if before > 0 => {
                decoded.truncate(before);
                break;
            }
            Err(_) => return None,
        }
    }
    (!decoded.is_empty()).then_some(decoded)
}

/// Determines the encoding by its magic number, or else by the label. The label is ignored if the bytes are plain text,
/// or lack the magic number of a labelled gzip or zstd body.
fn encoding(first_bytes: &[u8], declared: Option<Encoding>) -> Option<Encoding> {
    match first_bytes {
        [0x1f, 0x8b, ..] => return Some(Encoding::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => return Some(Encoding::Zstd),
        // zlib at the usual compression levels.
        [0x78, 0x01 | 0x9c | 0xda, ..] if declared != Some(Encoding::Brotli) => {
            return Some(Encoding::Deflate);
        }
        _ => {}
    }
    let text = first_bytes.trim_ascii_start();
    let is_plain_text =
        text.starts_with(b"{\"") || text.starts_with(b"data:") || text.starts_with(b"<!");
    let lacks_magic_number = matches!(declared, Some(Encoding::Gzip | Encoding::Zstd));
    declared.filter(|_| !is_plain_text && !lacks_magic_number)
}

/// Returns true if the bytes begin with a zlib header (RFC 1950).
fn is_zlib(first_bytes: &[u8]) -> bool {
    match first_bytes {
        // The two bytes are a multiple of 31; the low half of the first one is 8, for deflate.
        [cmf, flags, ..] => {
            cmf & 0x0f == 8 && (u16::from(*cmf) << 8 | u16::from(*flags)).is_multiple_of(31)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    const TEXT: &[u8] = b"{\"choices\": [{\"message\": {\"content\": \"hi hi hi hi hi hi\"}}]}";

    /// `TEXT` as Python's `brotli.compress` (1.2.1) makes it.
    const BROTLI: [u8; 49] = [
        0x1b, 0x3b, 0x00, 0xf8, 0x1d, 0x07, 0x76, 0x0c, 0xf9, 0x03, 0xe5, 0x70, 0xd0, 0x7c, 0x0d,
        0xb5, 0x08, 0xc8, 0xd6, 0xde, 0x42, 0x4b, 0x4b, 0x9d, 0xae, 0x3e, 0x98, 0xc8, 0x89, 0x50,
        0x22, 0x6d, 0xe1, 0x59, 0xde, 0x04, 0x9c, 0x00, 0xc3, 0x35, 0xb8, 0xc5, 0xd0, 0xce, 0xe8,
        0x7a, 0x88, 0xa1, 0x6f,
    ];

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn zlib() -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(TEXT).unwrap();
        encoder.finish().unwrap()
    }

    fn deflate() -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(TEXT).unwrap();
        encoder.finish().unwrap()
    }

    /// Decodes in pieces of `step` bytes.
    fn decode_in_steps(label: &str, body: &[u8], step: usize) -> io::Result<Vec<u8>> {
        let mut headers = HeaderMap::new();
        if !label.is_empty() {
            headers.insert(CONTENT_ENCODING, label.parse().unwrap());
        }
        let mut decoder = ContentDecoder::new(&headers);
        let mut decoded = Vec::new();
        for chunk in body.chunks(step) {
            decoded.extend(decoder.feed(chunk)?);
        }
        decoded.extend(decoder.finish()?);
        Ok(decoded)
    }

    #[test]
    fn every_encoding_is_decoded_with_a_wrong_or_missing_label() {
        let zstd = zstd::encode_all(TEXT, 3).unwrap();
        let twice = [gzip(&TEXT[..20]), gzip(&TEXT[20..])].concat();
        let cases = [
            ("", TEXT.to_vec()),
            ("identity", TEXT.to_vec()),
            ("gzip", gzip(TEXT)),
            ("x-gzip", twice),
            ("GZIP", gzip(TEXT)),
            ("", gzip(TEXT)),
            ("br", gzip(TEXT)),
            ("gzip", TEXT.to_vec()),
            ("zstd", zstd.clone()),
            ("", zstd),
            ("br", BROTLI.to_vec()),
            ("br", TEXT.to_vec()),
            ("deflate", zlib()),
            ("gzip", zlib()),
            ("", zlib()),
            ("deflate", deflate()),
            ("unheard-of", TEXT.to_vec()),
        ];
        for (label, body) in cases {
            for step in [1, 3, 7, 1_000] {
                let decoded = decode_in_steps(label, &body, step).unwrap();
                assert_eq!(decoded, TEXT, "{label}, {step} bytes at a time");
            }
        }
        assert_eq!(decode_in_steps("gzip", b"", 1).unwrap(), b"");
        assert_eq!(decode_in_steps("gzip", b"{}", 1).unwrap(), b"{}");
    }

    #[test]
    fn gzip_with_trailing_bytes_or_without_checksum_is_salvaged() {
        let compressed = gzip(TEXT);
        let trailing = [&compressed[..], b"\r\n<!-- served -->"].concat();
        for raw in [
            &trailing[..],
            &compressed[..compressed.len() - 8],
            &compressed[..compressed.len() - 3],
        ] {
            assert!(decode_in_steps("gzip", raw, 1_000).is_err());
            assert_eq!(salvage_gzip(raw).as_deref(), Some(TEXT));
        }
        let mut wrong_checksum = compressed.clone();
        let checksum_start = wrong_checksum.len() - 8;
        wrong_checksum[checksum_start] ^= 1;
        assert_eq!(salvage_gzip(&wrong_checksum), None);
        let twice = Bytes::from(gzip(&gzip(TEXT)));
        assert_eq!(decode_again(twice), TEXT);
        assert_eq!(decode_again(Bytes::from_static(TEXT)), TEXT);
    }

    #[test]
    fn damaged_streams_and_decompression_bombs_are_errors() {
        let compressed = gzip(TEXT);
        let frame = zstd::encode_all(TEXT, 3).unwrap();
        for (name, whole) in [("gzip", &compressed), ("zstd", &frame)] {
            assert!(decode_in_steps(name, whole, 1_000).is_ok());
            let truncated = &whole[..whole.len() - 9];
            assert!(decode_in_steps(name, truncated, 1_000).is_err(), "{name}");
        }
        let mut broken = compressed.clone();
        broken[20] ^= 0x55;
        assert!(decode_in_steps("gzip", &broken, 1_000).is_err());
        let bomb = zstd::encode_all(&vec![b' '; 100 << 20][..], 3).unwrap();
        assert!(decode_in_steps("zstd", &bomb, bomb.len()).is_err());
    }
}
