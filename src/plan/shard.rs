//! `--shard I/N`: splits the requests of a config into disjoint parts, one per machine. Pure.

use std::fmt;
use std::str::FromStr;

use crate::cache::fingerprint::Fingerprint;

/// The I-th of N disjoint parts, counted from 1. Every request is in exactly one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestShard {
    index: u64,
    count: u64,
}

impl RequestShard {
    /// Returns the number of shards, N.
    pub(crate) fn count(self) -> u64 {
        self.count
    }

    /// Returns true if the request with this key is in the shard.
    ///
    /// The key is a hash of the request, so the part depends neither on the machine nor on the order of the
    /// prompts, and identical requests are in the same part.
    pub fn contains(&self, key: &Fingerprint) -> bool {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&key[..8]);
        u64::from_le_bytes(bytes) % self.count == self.index - 1
    }
}

impl FromStr for RequestShard {
    type Err = String;

    fn from_str(text: &str) -> Result<RequestShard, String> {
        let parts = text.split_once('/');
        let numbers =
            parts.and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        match numbers {
            Some((index, count)) if (1..=count).contains(&index) => {
                Ok(RequestShard { index, count })
            }
            _ => Err(
                "expected I/N with I from 1 to N; for example, 2/4 is the second of four parts"
                    .into(),
            ),
        }
    }
}

impl fmt::Display for RequestShard {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.index, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_disjoint_and_cover_all_keys() {
        let mut sizes = [0; 7];
        for number in 0..7000u32 {
            let key = crate::cache::fingerprint::fingerprint(
                blake3::hash(&number.to_le_bytes()).to_hex().as_str(),
            );
            let parts = (1..=7).filter(|index| {
                RequestShard {
                    index: *index,
                    count: 7,
                }
                .contains(&key)
            });
            let parts: Vec<u64> = parts.collect();
            assert_eq!(parts.len(), 1, "key {number}");
            sizes[parts[0] as usize - 1] += 1;
        }
        assert!(
            sizes.iter().all(|size| (880..1120).contains(size)),
            "{sizes:?}"
        );
        // A fixed value: the assignment of keys to shards must not change between versions.
        let key =
            crate::cache::fingerprint::fingerprint(blake3::hash(b"a request").to_hex().as_str());
        assert!(RequestShard { index: 1, count: 3 }.contains(&key));
    }

    #[test]
    fn shard_parses_i_of_n_and_rejects_other_text() {
        let shard: RequestShard = "2/4".parse().unwrap();
        assert_eq!(
            (shard.index, shard.count, shard.to_string()),
            (2, 4, "2/4".to_owned())
        );
        for wrong in [
            "", "2", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/2/3", "1 / 2",
        ] {
            assert!(
                wrong.parse::<RequestShard>().unwrap_err().contains("I/N"),
                "{wrong}"
            );
        }
    }
}
