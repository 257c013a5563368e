//! Sets of cache keys, and the pair of key and checksum that identifies a record.

use std::collections::HashSet;

use foldhash::fast::FixedState;

use super::fingerprint::{Fingerprint, fingerprint};
use super::line::{self, LineError};

/// Set of key fingerprints. A fingerprint is part of a hash, so a fast hasher is enough.
pub(crate) type KeySet = HashSet<Fingerprint, FixedState>;

/// Fingerprint of a record's key, and the checksum of its line. Both are needed to identify a record, since two
/// different answers to one request have the same key.
pub(crate) type KeyAndChecksum = (Fingerprint, u32);

/// Returns fingerprint and checksum of the record in a complete line.
pub(crate) fn identity(line: &[u8]) -> Result<KeyAndChecksum, LineError> {
    let crc = line::verify(line)?;
    Ok((fingerprint(&line::head(line)?.key), crc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprint_of_a_hash_is_its_prefix_and_other_keys_are_hashed() {
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
