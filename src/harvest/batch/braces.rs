//! Braces of JSON outside of its strings. Pure.

/// Follows a text byte by byte.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Braces {
    /// Braces that are open.
    pub depth: usize,
    in_text: bool,
    is_escaped: bool,
}

impl Braces {
    /// Returns true if the byte is a brace that counts.
    pub(crate) fn push(&mut self, byte: u8) -> bool {
        match byte {
            _ if self.is_escaped => self.is_escaped = false,
            b'\\' if self.in_text => self.is_escaped = true,
            b'"' => self.in_text = !self.in_text,
            b'{' if !self.in_text => {
                self.depth += 1;
                return true;
            }
            b'}' if !self.in_text && self.depth > 0 => {
                self.depth -= 1;
                return true;
            }
            _ => {}
        }
        false
    }

    /// Ends a line. Some servers do not escape line breaks in strings, so a string may continue.
    pub(crate) fn end_line(&mut self) {
        self.is_escaped = false;
    }
}

/// Length of the object that a text begins with; None where it does not end.
pub(crate) fn object_end(text: &[u8]) -> Option<usize> {
    let mut braces = Braces::default();
    text.iter()
        .position(|byte| braces.push(*byte) && braces.depth == 0)
        .map(|at| at + 1)
}

/// Returns true if every brace and string of a text is closed in it.
pub(crate) fn is_closed(text: &[u8]) -> bool {
    let mut braces = Braces::default();
    for byte in text {
        braces.push(*byte);
    }
    braces.depth == 0 && !braces.in_text
}
