//! Tokens whose bytes are not valid UTF-8.

use serde::{Deserialize, Serialize};

use crate::cache::hex;

/// The bytes of a token that are not valid UTF-8; stored as `position:rank:hex`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawToken {
    /// Position in the answer, counted from 0.
    pub position: u32,
    /// Index in `top[position]`, or -1 for the emitted token.
    pub rank: i32,
    pub hex: String,
}

impl RawToken {
    /// Decodes the token; `None` if `hex` is not valid.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        hex::decode(self.hex.as_bytes()).collect()
    }
}
