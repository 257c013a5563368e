//! Which keys have been answered, in 16 bytes each.

use crate::cache::fingerprint::Fingerprint;
use crate::cache::fingerprint::fingerprint;
use std::collections::HashSet;

use foldhash::fast::FixedState;

use super::line::{self, LineError};

/// Keys, which are hashes already: the default hasher guards against keys that somebody chose.
pub(crate) type KeySet = HashSet<Fingerprint, FixedState>;

/// What tells a record from any other: its key, and the checksum of its line. Two records of one key
/// were both paid for.
pub(crate) type RecordIdentity = (Fingerprint, u32);

/// The identity of the record in a line that is whole.
pub(crate) fn identity(line: &[u8]) -> Result<RecordIdentity, LineError> {
    let crc = line::verify(line)?;
    Ok((fingerprint(&line::head(line)?.key), crc))
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
