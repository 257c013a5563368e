//! TODO

/// The first 16 bytes of a key, which is a hash in hex: a million keys take some 40 MB less than
/// their text, and no two will ever meet.
pub(crate) type Fingerprint = [u8; 16];

/// The fingerprint of `key`. A key that is no BLAKE3 hash in lower-case hex, as another writer may
/// have made it, is hashed first.
pub(crate) fn fingerprint(key: &str) -> Fingerprint {
    let hash = Some(key).filter(|key| key.len() == blake3::OUT_LEN * 2);
    hash.and_then(|hash| from_hex(hash.as_bytes()))
        .unwrap_or_else(|| {
            let mut bytes = Fingerprint::default();
            blake3::Hasher::new()
                .update(key.as_bytes())
                .finalize_xof()
                .fill(&mut bytes);
            bytes
        })
}

/// The first bytes of a hash in lower-case hex. None if it is none, or too short.
pub(crate) fn from_hex(key: &[u8]) -> Option<Fingerprint> {
    let mut bytes = Fingerprint::default();
    // Every digit is looked at: two keys that differ in case or in what is no digit differ.
    for (index, pair) in key.chunks(2).enumerate() {
        let [high, low] = *pair else { return None };
        let byte = digit(high)? << 4 | digit(low)?;
        if let Some(place) = bytes.get_mut(index) {
            *place = byte;
        }
    }
    (key.len() >= bytes.len() * 2).then_some(bytes)
}

fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}
