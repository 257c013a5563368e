//! Tracks the braces of JSON outside of its strings. Pure.

/// State of a scan over a text, byte by byte.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Braces {
    /// Number of open braces.
    pub depth: usize,
    is_in_string: bool,
    is_escaped: bool,
}

impl Braces {
    /// Scans a byte. Returns true if it opens or closes an object. A closing brace without an opening one is ignored.
    pub(crate) fn push(&mut self, byte: u8) -> bool {
        match byte {
            _ if self.is_escaped => self.is_escaped = false,
            b'\\' if self.is_in_string => self.is_escaped = true,
            b'"' => self.is_in_string = !self.is_in_string,
            b'{' if !self.is_in_string => {
                self.depth += 1;
                return true;
            }
            b'}' if !self.is_in_string && self.depth > 0 => {
                self.depth -= 1;
                return true;
            }
            _ => {}
        }
        false
    }

    /// Ends a line. A string may continue on the next line, because some servers do not escape line breaks.
    pub(crate) fn end_line(&mut self) {
        self.is_escaped = false;
    }
}

/// Returns the length of the object at the start of the text; None if the object has no end.
pub(crate) fn object_end(text: &[u8]) -> Option<usize> {
    let mut braces = Braces::default();
    text.iter()
        .position(|byte| braces.push(*byte) && braces.depth == 0)
        .map(|last| last + 1)
}

/// Returns true if the text closes all its braces and strings.
pub(crate) fn is_closed(text: &[u8]) -> bool {
    let mut braces = Braces::default();
    for byte in text {
        braces.push(*byte);
    }
    braces.depth == 0 && !braces.is_in_string
}
