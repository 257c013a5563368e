//! TODO

use serde::Deserialize;
use serde::Serialize;

/// The bytes of a token that is no valid UTF-8; stored as `position:rank:hex`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawToken {
    /// Position in the answer, from 0.
    pub position: u32,
    /// Index in `top[position]`, or -1 for the emitted token.
    pub rank: i32,
    pub hex: String,
}

impl RawToken {
    /// None where `hex` is none.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let digits = self.hex.as_bytes();
        if !digits.len().is_multiple_of(2) {
            return None;
        }
        digits
            .chunks_exact(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect()
    }
}
