//! Decodes the text of one answer from the bytes of its tokens.

/// Releases text once later tokens cannot change it. Holds back incomplete characters, and text that may be
/// the beginning of a stop string.
///
/// Offsets count bytes of the answer. The released parts, joined, are the lossy UTF-8 decoding of all bytes
/// before the stop string. They do not depend on how the bytes were split into tokens. The stop string that is complete
/// first ends the answer; of several that end at the same byte, the longest one counts.
#[derive(Debug)]
pub(crate) struct TextStream {
    bytes: Vec<u8>,
    released: usize,
    stop: Vec<String>,
    /// Offset of the first stop string that was found.
    stop_offset: Option<usize>,
}

impl TextStream {
    /// Creates a stream that ends at any of the strings `stop`. Empty strings are ignored.
    pub(crate) fn new(stop: &[String]) -> Self {
        Self {
            bytes: Vec::new(),
            released: 0,
            stop: stop
                .iter()
                .filter(|stop| !stop.is_empty())
                .cloned()
                .collect(),
            stop_offset: None,
        }
    }

    /// Appends the bytes of a token. Returns true if they complete a stop string.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        let old_len = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.stop_offset = self
            .stop
            .iter()
            .filter_map(|stop| {
                // A match must end in the new bytes.
                let start = old_len.saturating_sub(stop.len() - 1);
                let offset = start + find(&self.bytes[start..], stop.as_bytes())?;
                Some((offset + stop.len(), offset))
            })
            .min()
            .map(|(_, offset)| offset);
        self.stop_offset.is_some()
    }

    /// Number of bytes received.
    pub(crate) fn received(&self) -> usize {
        self.bytes.len()
    }

    /// Number of bytes whose text was released.
    pub(crate) fn released(&self) -> usize {
        self.released
    }

    /// Returns the offset of the stop string, or None if none was found.
    pub(crate) fn stop_offset(&self) -> Option<usize> {
        self.stop_offset
    }

    /// Releases the text that later tokens cannot change.
    pub(crate) fn release(&mut self) -> String {
        let held_back = incomplete_character(&self.bytes[self.released..]).max(self.partial_stop());
        self.release_until(self.bytes.len() - held_back)
    }

    /// Releases all remaining text before the stop string, at the end of the answer.
    pub(crate) fn finish(&mut self) -> String {
        self.release_until(self.stop_offset.unwrap_or(self.bytes.len()))
    }

    fn release_until(&mut self, end: usize) -> String {
        let text = String::from_utf8_lossy(&self.bytes[self.released..end]).into_owned();
        self.released = end;
        text
    }

    /// Length of the longest suffix that is the beginning of a stop string, in bytes.
    fn partial_stop(&self) -> usize {
        let pending = &self.bytes[self.released..];
        let longest_match = |stop: &&String| {
            (1..stop.len().min(pending.len() + 1))
                .rev()
                .find(|&length| pending.ends_with(&stop.as_bytes()[..length]))
        };
        self.stop
            .iter()
            .filter_map(|stop| longest_match(&stop))
            .max()
            .unwrap_or(0)
    }
}

/// Returns the length of the incomplete character at the end of `bytes`, which more bytes can complete.
pub(crate) fn incomplete_character(bytes: &[u8]) -> usize {
    let Some(chunk) = bytes.utf8_chunks().last() else {
        return 0;
    };
    match std::str::from_utf8(chunk.invalid()) {
        // Without an error length, the bytes are the beginning of a character.
        Err(error) if error.error_len().is_none() => chunk.invalid().len(),
        _ => 0,
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the text released after each token, and at the end.
    fn released(stop: &[&str], tokens: &[&[u8]]) -> Vec<String> {
        let stop: Vec<String> = stop.iter().map(ToString::to_string).collect();
        let mut stream = TextStream::new(&stop);
        let mut pieces = Vec::new();
        for token in tokens {
            if stream.push(token) {
                break;
            }
            pieces.push(stream.release());
        }
        pieces.push(stream.finish());
        pieces
    }

    #[test]
    fn incomplete_character_is_held_back() {
        let euro = "€".as_bytes();
        assert_eq!(
            released(&[], &[b"a", &euro[..1], &euro[1..2], &euro[2..], b"b"]),
            ["a", "", "", "€", "b", ""]
        );
    }

    #[test]
    fn invalid_utf8_becomes_replacement_characters() {
        assert_eq!(released(&[], &[b"a\xff", b"b"]), ["a\u{fffd}", "b", ""]);
        assert_eq!(released(&[], &[b"a\xe2", b"\x82"]), ["a", "", "\u{fffd}"]);
        assert_eq!(released(&[], &[b"a\xe2", b"b"]), ["a", "\u{fffd}b", ""]);
    }

    #[test]
    fn stop_string_is_cut_across_tokens() {
        assert_eq!(released(&["END"], &[b"go END on"]), ["go "]);
        assert_eq!(
            released(&["END"], &[b"go E", b"N", b"D on"]),
            ["go ", "", ""]
        );
        assert_eq!(
            released(&["END"], &[b"go E", b"N", b"o"]),
            ["go ", "", "ENo", ""]
        );
        assert_eq!(released(&["END"], &[b"go EN"]), ["go ", "EN"]);
        assert_eq!(
            released(&["ENEND"], &[b"EN", b"ENE", b"ND"]),
            ["", "EN", ""]
        );
    }

    #[test]
    fn first_complete_stop_string_ends_text() {
        for tokens in [&[&b"abcd"[..]][..], &[b"ab", b"cd"], &[b"abc", b"d"]] {
            assert_eq!(released(&["c", "bcd", ""], tokens).concat(), "ab");
        }
        assert_eq!(released(&["c", "bc"], &[b"ab", b"cd"]), ["a", ""]);
        assert_eq!(released(&["c", "abx"], &[b"ab", b"c"]), ["", "ab"]);
    }

    #[test]
    fn multibyte_stop_string_is_found_across_tokens() {
        let text = "é€".as_bytes();
        assert_eq!(released(&["€"], &[&text[..3], &text[3..]]), ["é", ""]);
    }

    #[test]
    fn every_split_into_tokens_gives_lossy_text() {
        let mut rng = fastrand::Rng::with_seed(3);
        let alphabet = [b'a', b'E', b'N', 0xe2, 0x82, 0xac, 0xff, 0xc3];
        for _ in 0..2000 {
            let bytes: Vec<u8> = (0..rng.usize(0..12))
                .map(|_| alphabet[rng.usize(0..alphabet.len())])
                .collect();
            let mut tokens: Vec<&[u8]> = Vec::new();
            let mut remaining = &bytes[..];
            while !remaining.is_empty() {
                let (token, rest) = remaining.split_at(rng.usize(1..=remaining.len()));
                tokens.push(token);
                remaining = rest;
            }
            let text = String::from_utf8_lossy(&bytes);
            let expected = text.split_once("EN").map_or(&*text, |(before, _)| before);
            assert_eq!(released(&["EN"], &tokens).concat(), expected);
        }
    }
}
