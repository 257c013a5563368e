//! Fused CPU operations with hand-written backward passes, as candle custom operations.
//!
//! candle's own fused operations (`rms_norm`, `softmax_last_dim`, `rope`, `sdpa`) have no backward
//! pass and cut the graph without a word; composed ones store every intermediate. Here each
//! operation keeps what its gradient needs and no more, and its file shows the formula.
//!
//! The only `unsafe` code of the crate lives in this room.
//!
//! Shape suffixes: T tokens (all segments of a batch, end to end), D model, H heads, G key/value
//! heads, C channels of a head, F feed-forward, N supervised positions, V vocabulary.

pub mod adamw;
pub mod attention;
pub mod gemm;
pub mod head_loss;
pub mod linear;
pub mod map;
pub mod math;
pub mod process;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

use std::sync::Mutex;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};

/// Rows that one task of a row-wise operation works on: enough to pay for the task, few enough to
/// share the work out. Fixed, so that sums over rows do not depend on the number of threads.
const ROWS_PER_TASK: usize = 64;

/// The values of a contiguous f32 argument.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| {
        candle_core::Error::Msg(
            "a fused operation was given a tensor that is not contiguous".into(),
        )
    })?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Calls `f` with the values of a contiguous f32 tensor on the CPU.
pub fn with_values<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(values(storage, layout)?)),
        _ => candle_core::bail!("this operation runs on the CPU only"),
    }
}

/// State kept between the passes survives a panic in another thread unharmed: it is written whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
