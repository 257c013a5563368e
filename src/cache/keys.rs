//! Which keys have been answered, in 16 bytes each.

use std::collections::HashSet;

use foldhash::fast::FixedState;

use super::line::{self, Fault};

/// The first 16 bytes of a key, which is a hash in hex: a million keys take some 40 MB less than
/// their text, and no two will ever meet.
pub type Fingerprint = [u8; 16];

/// Keys, which are hashes already: the default hasher guards against keys that somebody chose.
pub type Keys = HashSet<Fingerprint, FixedState>;

/// What tells a record from any other: its key, and the checksum of its line. Two records of one key
/// were both paid for.
pub type Identity = (Fingerprint, u32);

/// The identity of the record in a line that is whole.
pub fn identity(line: &[u8]) -> Result<Identity, Fault> {
    let crc = line::verify(line)?;
    Ok((fingerprint(&line::head(line)?.key), crc))
}

/// The fingerprint of `key`. A key that is no BLAKE3 hash in lower-case hex, as another writer may
/// have made it, is hashed first.
pub fn fingerprint(key: &str) -> Fingerprint {
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
pub fn from_hex(key: &[u8]) -> Option<Fingerprint> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_stands_for_itself_and_other_keys_are_hashed() {
        let hash = blake3::hash(b"a prompt");
        let hex = hash.to_hex().to_string();
        assert_eq!(fingerprint(&hex), hash.as_bytes()[..16]);
        let odd = [hex.to_uppercase(), hex[1..].to_owned(), String::new()];
        for key in &odd {
            assert_eq!(
                fingerprint(key),
                blake3::hash(key.as_bytes()).as_bytes()[..16]
            );
        }
    }
}
