//! Decides how many rows go into a batch. Pure.

use super::journal::line_bytes;
use crate::config;
use crate::plan::Plan;

/// Bytes of a result line that do not depend on the number of tokens.
const OUTPUT_OVERHEAD: f64 = 1_000.0;

/// Pairs of the number of top logprobs and the measured bytes per token in a results file.
const OUTPUT_BYTES: [(f64, f64); 3] = [(0.0, 88.0), (5.0, 442.0), (20.0, 1_505.0)];

/// Size of a row or part in the unit of each limit.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RowSize {
    /// Bytes of its line in the request file.
    pub bytes: u64,
    /// Estimated bytes of its line in the results file.
    pub output_bytes: f64,
    /// Estimated prompt tokens plus `max_tokens`.
    pub tokens: u64,
    /// Upper bound of its cost in US dollars.
    pub usd: f64,
}

/// Maximum size of a part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PartLimits {
    pub rows: usize,
    pub bytes: u64,
    pub output_bytes: f64,
    pub tokens: Option<u64>,
    pub usd: f64,
}

/// Limit that the next row would exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PartFull {
    /// Maximum number of rows, request bytes or output bytes of a part.
    Part,
    /// Remainder of the limit of enqueued tokens.
    Tokens,
    /// Remaining budget.
    Budget,
    /// Maximum file size, which the row exceeds even as the only row of a part.
    RowTooLarge,
}

impl PartLimits {
    /// Creates the limits of one part. `tokens` and `usd` are the remainders of limits that all parts share.
    pub(crate) fn new(limits: &config::BatchConfig, tokens: Option<u64>, usd: f64) -> PartLimits {
        PartLimits {
            rows: limits.max_requests,
            bytes: max_file_bytes(limits),
            output_bytes: limits.max_output_gigabytes * 1e9,
            tokens,
            usd,
        }
    }

    /// Returns the number of leading rows that fit, their total size, and the limit that the next row would exceed.
    pub(crate) fn fit(
        &self,
        rows: impl Iterator<Item = RowSize>,
    ) -> (usize, RowSize, Option<PartFull>) {
        let mut count = 0;
        let mut sum = RowSize::default();
        for row in rows {
            let new_sum = RowSize {
                bytes: sum.bytes + row.bytes,
                output_bytes: sum.output_bytes + row.output_bytes,
                tokens: sum.tokens + row.tokens,
                usd: sum.usd + row.usd,
            };
            let full = if row.bytes > self.bytes {
                // The rows before the oversized row form a part.
                Some(if count == 0 {
                    PartFull::RowTooLarge
                } else {
                    PartFull::Part
                })
            } else if count == self.rows
                || new_sum.bytes > self.bytes
                // The output size is an estimate: it never excludes a single row.
                || (count > 0 && new_sum.output_bytes > self.output_bytes)
            {
                Some(PartFull::Part)
            } else if self.tokens.is_some_and(|tokens| new_sum.tokens > tokens) {
                Some(PartFull::Tokens)
            } else if new_sum.usd > self.usd {
                Some(PartFull::Budget)
            } else {
                None
            };
            if full.is_some() {
                return (count, sum, full);
            }
            count += 1;
            sum = new_sum;
        }
        (count, sum, None)
    }
}

/// Returns the maximum size of a request file in bytes.
pub(crate) fn max_file_bytes(limits: &config::BatchConfig) -> u64 {
    (limits.max_megabytes * 1e6) as u64
}

/// Returns the size of a row whose cost is at most `usd`.
pub(crate) fn size(plan: &Plan, upstream: usize, row: usize, usd: f64) -> RowSize {
    let template = &plan.templates[upstream];
    let logprobs = if template.wants_logprobs() {
        template.endpoint.sampling.top_logprobs
    } else {
        0
    };
    let planned = &plan.rows[row];
    RowSize {
        bytes: line_bytes(planned.key.len(), planned.bytes as usize),
        output_bytes: output_bytes(template.endpoint.sampling.max_tokens, logprobs),
        tokens: plan.cost(upstream, row).tokens(),
        usd,
    }
}

/// Estimates the bytes of a result line by linear interpolation between the measurements.
fn output_bytes(max_tokens: u32, top_logprobs: u32) -> f64 {
    let k = f64::from(top_logprobs);
    let [first, middle, last] = OUTPUT_BYTES;
    let (lower, upper) = if k <= middle.0 {
        (first, middle)
    } else {
        (middle, last)
    };
    let per_token = lower.1 + (k - lower.0) / (upper.0 - lower.0) * (upper.1 - lower.1);
    f64::from(max_tokens) * per_token + OUTPUT_OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn output_bytes_match_the_measurements() {
        let per_token = |k| (output_bytes(100, k) - OUTPUT_OVERHEAD) / 100.0;
        for (k, bytes) in OUTPUT_BYTES {
            assert!((per_token(k as u32) - bytes).abs() < 1e-9);
        }
        assert!((per_token(10) - (442.0 + 1_063.0 / 3.0)).abs() < 1e-9);
    }

    proptest! {
        /// Every row is in exactly one part or larger than the maximum file. Parts respect all limits.
        #[test]
        fn rows_are_split_within_all_limits(
            rows in proptest::collection::vec((1u64..300, 1u64..500, 1u64..50), 0..200),
            max_rows in 1usize..20,
            bytes in 50u64..1_000,
            output_bytes in 100u64..2_000,
            tokens in proptest::option::of(50u64..400),
        ) {
            let rows: Vec<RowSize> = rows
                .into_iter()
                .map(|(bytes, output_bytes, tokens)| RowSize {
                    bytes,
                    output_bytes: output_bytes as f64,
                    tokens,
                    usd: tokens as f64,
                })
                .collect();
            let limits = PartLimits {
                rows: max_rows,
                bytes,
                output_bytes: output_bytes as f64,
                tokens,
                usd: 300.0,
            };
            let mut next = 0;
            let mut oversized = 0;
            while next < rows.len() {
                let (count, sum, full) = limits.fit(rows[next..].iter().copied());
                let part = &rows[next..next + count];
                prop_assert!(count <= max_rows && sum.bytes <= bytes);
                prop_assert!(count <= 1 || sum.output_bytes <= output_bytes as f64);
                prop_assert!(tokens.is_none_or(|tokens| sum.tokens <= tokens));
                prop_assert!(sum.usd <= 300.0);
                prop_assert_eq!(sum.bytes, part.iter().map(|row| row.bytes).sum::<u64>());
                next += count;
                match full {
                    None => prop_assert_eq!(next, rows.len()),
                    Some(PartFull::RowTooLarge) => {
                        prop_assert!(count == 0 && rows[next].bytes > bytes);
                        oversized += 1;
                        next += 1;
                    }
                    Some(_) => prop_assert!(count > 0, "{full:?}"),
                }
            }
            prop_assert_eq!(oversized, rows.iter().filter(|row| row.bytes > bytes).count());
        }
    }
}
