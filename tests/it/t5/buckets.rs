//! Buckets of relative positions.

use distill::ops::attention::RelativeBuckets;
use serde_json::Value;

use super::read_golden;

#[test]
fn buckets_equal_those_of_transformers() {
    let golden = read_golden("buckets.json");
    let first = golden["first"].as_i64().unwrap();
    let tables = golden["tables"].as_array().unwrap();
    assert_eq!(tables.len(), 10);
    for table in tables {
        let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
        let buckets = RelativeBuckets {
            count: number(&table["num_buckets"]),
            max_distance: number(&table["max_distance"]),
            is_bidirectional: table["bidirectional"].as_bool().unwrap(),
        };
        for (index, expected) in table["buckets"].as_array().unwrap().iter().enumerate() {
            let relative = isize::try_from(first).unwrap() + index as isize;
            assert_eq!(
                buckets.bucket(relative),
                number(expected),
                "{buckets:?} at {relative}"
            );
        }
    }
}

/// Far beyond the largest distance, where rounding could reach past the last bucket.
#[test]
fn far_keys_share_the_last_bucket() {
    for is_bidirectional in [true, false] {
        let buckets = RelativeBuckets {
            count: 32,
            max_distance: 128,
            is_bidirectional,
        };
        let last = if is_bidirectional { 15 } else { 31 };
        for relative in [-128, -129, -5000, -1_000_000] {
            assert_eq!(buckets.bucket(relative), last);
        }
    }
}
