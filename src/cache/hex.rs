//! Hexadecimal digits.

/// Decodes pairs of digits of either case; an item is `None` where the pair is incomplete or not hexadecimal.
pub(crate) fn decode(digits: &[u8]) -> impl Iterator<Item = Option<u8>> {
    digits.chunks(2).map(|pair| match *pair {
        [high, low] => Some(value(high)? << 4 | value(low)?),
        _ => None,
    })
}

/// Encodes bytes as lower-case digits.
pub(crate) fn encode(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn value(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}
