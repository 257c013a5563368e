//! The arithmetic of training on the CPU: fused operations with hand-written backward passes.
//!
//! An operation is a small file of plain functions over slices: the forward pass, the backward pass,
//! and the formula of both. `model::tape` calls them in order. `model::candle_graph` implements the
//! same operations with candle, for other devices and as the reference of the tests.
//!
//! | file | content |
//! |---|---|
//! | `linear`, `lora`, `matmul` | linear layers, adapters, and the matrix products behind them |
//! | `attention/`, `rope` | grouped-query attention, within a sequence or over another one; rotary position embedding |
//! | `rms_norm`, `layer_norm`, `activation`, `embedding` | the other layers of a model |
//! | `head_loss` | the LM head and the loss, chunked over positions |
//! | `adamw`, `ema` | updates of the weights |
//! | `math` | scalar functions and reductions |
//! | `arena`, `mapped_file`, `process` | memory, mapped files, limits and settings of the process |
//!
//! Invariants: sums run in an order that does not depend on the number of threads. An operation
//! saves no more than its backward pass needs. All `unsafe` code of the crate is in this room.
//!
//! Tensor names end in their shape: B batch, T tokens (all segments of a batch, end to end), D model
//! width, H heads, G key/value heads, C head width, F feed-forward width, N supervised positions, V
//! vocabulary, K top-k, L layers, S tokens of one sequence; I and O are the inputs and outputs of a
//! linear layer, R the rank of its adapter. A lower-case letter is a part of its dimension: `logits_nV`
//! are n of N rows. The prefix `d` marks the gradient of the loss with respect to a tensor: `dy_TO` for
//! `y_TO`. Element-wise code on parts of flattened tensors has names without a shape.

pub mod activation;
pub mod adamw;
pub mod arena;
pub mod attention;
pub(crate) mod ema;
pub(crate) mod embedding;
pub(crate) mod head_loss;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod lora;
pub(crate) mod mapped_file;
pub(crate) mod math;
pub mod matmul;
pub mod process;
pub(crate) mod rms_norm;
pub mod rope;

use std::ops::{Deref, Range};
use std::sync::Mutex;

use candle_core::{CpuStorage, Result, Storage, Tensor};
use rayon::prelude::*;

/// Rows per task of a row-wise operation: enough to pay for the task, few enough to balance the
/// load. Fixed, so that sums over rows do not depend on the number of threads.
const ROWS_PER_TASK: usize = 64;

/// Values per task of an element-wise operation.
pub(crate) const VALUES_PER_TASK: usize = 1 << 14;

/// A gradient that an operation writes.
pub struct GradientMut<'a> {
    pub values: &'a mut [f32],
    /// Add to the values instead of overwriting them.
    pub add: bool,
}

/// One task of [`norm_backward`]: t of T rows.
#[allow(non_snake_case, reason = "tensor names end in their shape")]
struct NormTask<'a> {
    x_tD: &'a [f32],
    dy_tD: &'a [f32],
    /// The values that the forward pass stored for these rows.
    statistics: &'a [f32],
    dx_tD: &'a mut [f32],
    /// Add to `dx_tD` instead of overwriting it.
    add: bool,
    /// The task's part of the gradient of the weight. It is zero when the task starts.
    dweight_D: &'a mut [f32],
}

/// Runs the backward pass of a normalisation over rows of the width of `weight_D`. `kernel` computes one task.
/// `statistics` are the values that the forward pass stored, with their number per row.
#[allow(non_snake_case, reason = "tensor names end in their shape")]
fn norm_backward(
    x_TD: &[f32],
    dy_TD: &[f32],
    (statistics, statistics_per_row): (&[f32], usize),
    dx_TD: GradientMut,
    dweight_D: Option<GradientMut>,
    weight_D: &[f32],
    kernel: impl Fn(NormTask) + Sync,
) {
    let width = weight_D.len();
    let task_len = width * ROWS_PER_TASK;
    let add = dx_TD.add;
    let partials: Vec<Vec<f32>> = dx_TD
        .values
        .par_chunks_mut(task_len)
        .zip(x_TD.par_chunks(task_len))
        .zip(dy_TD.par_chunks(task_len))
        .zip(statistics.par_chunks(statistics_per_row * ROWS_PER_TASK))
        .map(|(((dx_tD, x_tD), dy_tD), statistics)| {
            let mut partial_D = vec![0.0; width];
            kernel(NormTask {
                x_tD,
                dy_tD,
                statistics,
                dx_tD,
                add,
                dweight_D: &mut partial_D,
            });
            partial_D
        })
        .collect();
    if let Some(dweight_D) = dweight_D {
        sum_partials(&partials, dweight_D);
    }
}

/// Sums the partial gradients of all tasks, in order.
fn sum_partials(partials: &[Vec<f32>], gradient: GradientMut) {
    if !gradient.add {
        gradient.values.fill(0.0);
    }
    for partial in partials {
        for (sum, part) in gradient.values.iter_mut().zip(partial) {
            *sum += part;
        }
    }
}

/// Computes the gradient of a bias: the sum over the rows of `dy_TO`, of `width` (O) values each.
#[allow(non_snake_case, reason = "tensor names end in their shape")]
pub(crate) fn sum_rows(dy_TO: &[f32], width: usize, dbias_O: GradientMut) {
    let partials: Vec<Vec<f32>> = dy_TO
        .par_chunks(width * ROWS_PER_TASK)
        .map(|dy_tO| {
            let mut sum_O = vec![0.0; width];
            for dy_O in dy_tO.chunks(width) {
                sum_O.iter_mut().zip(dy_O).for_each(|(sum, dy)| *sum += dy);
            }
            sum_O
        })
        .collect();
    sum_partials(&partials, dbias_O);
}

/// Runs a block compiled for the widest vector instructions of this CPU. The parameters are the
/// local variables that the block uses, with their types.
///
/// `pulp` also takes closures, but a closure that the compiler does not inline is silently compiled
/// without these instructions. `#[inline(always)]` on the body prevents that.
///
/// A type parameter of the surrounding function is named first: `simd!(<F: Function> |...| {...})`.
macro_rules! simd {
    (<$function:ident: $bound:path> |$($variable:ident: $type:ty),*| $body:block) => {{
        struct SimdLoop<T, $function>(T, std::marker::PhantomData<$function>);
        impl<$function: $bound> pulp::WithSimd for SimdLoop<($($type,)*), $function> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: pulp::Simd>(self, _: S) {
                let ($($variable,)*) = self.0;
                $body
            }
        }
        let marker = std::marker::PhantomData::<$function>;
        pulp::Arch::new().dispatch(SimdLoop(($($variable,)*), marker))
    }};
    (|$($variable:ident: $type:ty),*| $body:block) => {
        $crate::ops::simd!(|$($variable: $type),*| -> () $body)
    };
    (|$($variable:ident: $type:ty),*| -> $output:ty $body:block) => {{
        struct SimdLoop<T>(T);
        impl pulp::WithSimd for SimdLoop<($($type,)*)> {
            type Output = $output;
            #[inline(always)]
            fn with_simd<S: pulp::Simd>(self, _: S) -> $output {
                let ($($variable,)*) = self.0;
                $body
            }
        }
        pulp::Arch::new().dispatch(SimdLoop(($($variable,)*)))
    }};
}
use simd;

/// Multiplies the values by `factor`.
pub(crate) fn scale(values: &mut [f32], factor: f32) {
    values
        .par_iter_mut()
        .with_min_len(VALUES_PER_TASK)
        .for_each(|value| *value *= factor);
}

/// Read access to the values of a contiguous f32 tensor on the CPU.
pub(crate) struct CpuValues<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> CpuValues<'a> {
    /// Borrows the values of `tensor`.
    ///
    /// # Errors
    /// Where the tensor is not a contiguous f32 tensor on the CPU.
    pub(crate) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) =
            (&*storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("fused operations need contiguous f32 tensors on the CPU");
        };
        let range = start..end;
        let storage = Box::new(storage);
        Ok(Self { storage, range })
    }
}

impl Deref for CpuValues<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            // `new` accepts f32 storage only.
            _ => &[],
        }
    }
}

/// Locks a mutex, even if a thread panicked while it held the lock: the guarded state is valid at every point.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Returns the rows of one segment, of `width` values each.
pub(crate) fn segment_rows<'a>(
    values: &'a [f32],
    segment: &Range<usize>,
    width: usize,
) -> &'a [f32] {
    &values[segment.start * width..segment.end * width]
}

/// Splits `values` into the rows of each segment, of `width` values each.
pub(crate) fn split_segments<'a>(
    mut values: &'a mut [f32],
    segments: &[Range<usize>],
    width: usize,
) -> Vec<&'a mut [f32]> {
    segments
        .iter()
        .map(|segment| {
            let (rows, later_rows) =
                std::mem::take(&mut values).split_at_mut(segment.len() * width);
            values = later_rows;
            rows
        })
        .collect()
}
