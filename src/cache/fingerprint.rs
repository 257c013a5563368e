//! Cache keys in 16 bytes each.

use crate::cache::hex;

/// First 16 bytes of a key, which is a hash in hex. A million fingerprints take at least 48 MB less memory than
/// the keys as text. With 128 bits, collisions are negligible.
pub(crate) type Fingerprint = [u8; 16];

/// Returns the fingerprint of `key`. A key that is not a BLAKE3 hash in lower-case hex (another program may
/// have written it) is hashed first.
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

/// Returns the first 16 bytes of a hash in lower-case hex; `None` if `key` is anything else, or too short.
pub(crate) fn from_hex(key: &[u8]) -> Option<Fingerprint> {
    // Upper-case digits are refused, so that two keys that differ in case have different fingerprints.
    if key.iter().any(u8::is_ascii_uppercase) {
        return None;
    }
    let mut bytes = Fingerprint::default();
    // Every digit is checked, also beyond the first 16 bytes: only a valid hash stands for itself.
    for (index, byte) in hex::decode(key).enumerate() {
        let byte = byte?;
        if let Some(slot) = bytes.get_mut(index) {
            *slot = byte;
        }
    }
    (key.len() >= bytes.len() * 2).then_some(bytes)
}
