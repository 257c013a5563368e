//! The exponential moving average of a tensor, updated in place.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;

use super::{VALUES_PER_TASK, simd};

/// Computes `average = decay average + (1 - decay) value` for contiguous f32 tensors on the CPU.
///
/// # Errors
/// Where a tensor is not contiguous f32 on the CPU, or the sizes differ.
pub(crate) fn ema_update(average: &Tensor, value: &Tensor, decay: f32) -> Result<()> {
    average.inplace_op2(value, &EmaUpdate { decay })
}

struct EmaUpdate {
    decay: f32,
}

impl InplaceOp2 for EmaUpdate {
    fn name(&self) -> &'static str {
        "ema_update"
    }

    fn cpu_fwd(
        &self,
        average: &mut CpuStorage,
        average_layout: &Layout,
        value: &CpuStorage,
        value_layout: &Layout,
    ) -> Result<()> {
        let offsets = (
            average_layout.contiguous_offsets(),
            value_layout.contiguous_offsets(),
        );
        let (
            CpuStorage::F32(averages),
            CpuStorage::F32(values),
            (Some((average_start, average_end)), Some((value_start, value_end))),
        ) = (average, value, offsets)
        else {
            candle_core::bail!("ema_update: average and value must be contiguous f32 tensors");
        };
        let averages = &mut averages[average_start..average_end];
        let values = &values[value_start..value_end];
        if averages.len() != values.len() {
            candle_core::bail!("ema_update: the sizes of average and value differ");
        }
        let decay = self.decay;
        averages
            .par_chunks_mut(VALUES_PER_TASK)
            .zip(values.par_chunks(VALUES_PER_TASK))
            .for_each(|(averages, values)| {
                simd!(|averages: &mut [f32], values: &[f32], decay: f32| {
                    for (average, value) in averages.iter_mut().zip(values) {
                        *average = decay * *average + (1.0 - decay) * value;
                    }
                });
            });
        Ok(())
    }
}
