//! The learned bias of attention scores by relative position (T5).

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::Result;
use candle_core::Tensor;

use crate::ops::CpuValues;
use crate::ops::attention::{Mask, RelativeBias, RelativeBuckets};

/// The table of a relative position bias. Several layers may share it.
#[derive(Clone)]
pub struct PositionBias {
    /// One row of H values per bucket (E x H).
    pub table_EH: Tensor,
    pub buckets: RelativeBuckets,
}

impl PositionBias {
    /// Computes the bias of sequences of at most `positions` positions.
    ///
    /// # Errors
    /// Where the table is not on the CPU.
    pub(super) fn values(&self, mask: Mask, positions: usize) -> Result<RelativeBias> {
        let table_EH = CpuValues::new(&self.table_EH)?;
        Ok(RelativeBias::new(&table_EH, self.buckets, mask, positions))
    }
}
