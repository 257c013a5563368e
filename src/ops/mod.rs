//! The arithmetic of training on the CPU: fused operations with hand-written backward passes.
//!
//! An operation is one small file of plain functions over slices: the forward pass, the backward
//! pass, and the formula of both. It keeps what its gradient needs and no more. The tape that calls
//! them in order is `model::tape`; the same operations in candle's terms, for other devices and as
//! the oracle of the tests, are in `model::composed`.
//!
//! Sums run in an order that does not depend on the number of threads, so the results do not
//! either.
//!
//! The only `unsafe` code of the crate lives in this room.
//!
//! Shape suffixes: T tokens (all segments of a batch, end to end), D model, H heads, G key/value
//! heads, C channels of a head, F feed-forward, N supervised positions, V vocabulary.

pub mod adamw;
pub mod arena;
pub mod attention;
pub(crate) mod ema;
pub(crate) mod embedding;
pub(crate) mod gelu;
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
pub(crate) mod swiglu;

use std::ops::{Deref, Range};
use std::sync::Mutex;

use candle_core::{CpuStorage, Result, Storage, Tensor};
use rayon::prelude::*;

/// Rows that one task of a row-wise operation works on: enough to pay for the task, few enough to
/// share the work out. Fixed, so that sums over rows do not depend on the number of threads.
const ROWS_PER_TASK: usize = 64;

/// CpuValues that one task of an element-wise operation works on.
const VALUES_PER_TASK: usize = 1 << 14;

/// Where a gradient goes: added to what is there, or in its place.
pub struct Gradient<'a> {
    pub values: &'a mut [f32],
    pub add: bool,
}

/// Adds up the parts of a gradient that tasks made, in order.
fn sum_partials(partials: &[Vec<f32>], gradient: Gradient) {
    if !gradient.add {
        gradient.values.fill(0.0);
    }
    for partial in partials {
        for (sum, part) in gradient.values.iter_mut().zip(partial) {
            *sum += part;
        }
    }
}

/// The gradient of a bias: the sum over rows (of `width` values) of `dy`.
pub fn sum_rows(dy: &[f32], width: usize, to: Gradient) {
    let partials: Vec<Vec<f32>> = dy
        .par_chunks(width * ROWS_PER_TASK)
        .map(|dy| {
            let mut sum = vec![0.0; width];
            for dy in dy.chunks(width) {
                sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
            }
            sum
        })
        .collect();
    sum_partials(&partials, to);
}

/// Runs a loop compiled for the widest vector instructions that this CPU has. The variables that it uses
/// are its parameters, with their types.
///
/// `pulp` would take a closure as well, but one that the compiler does not inline is compiled without these
/// instructions, and only the time tells. What is here cannot be left out of line.
macro_rules! simd {
    (|$($variable:ident: $type:ty),*| $body:block) => {
        $crate::ops::simd!(|$($variable: $type),*| -> () $body)
    };
    (|$($variable:ident: $type:ty),*| -> $output:ty $body:block) => {{
        struct Work<T>(T);
        impl pulp::WithSimd for Work<($($type,)*)> {
            type Output = $output;
            #[inline(always)]
            fn with_simd<S: pulp::Simd>(self, _: S) -> $output {
                let ($($variable,)*) = self.0;
                $body
            }
        }
        pulp::Arch::new().dispatch(Work(($($variable,)*)))
    }};
}
use simd;

/// The values of a contiguous f32 tensor on the CPU, for as long as they are read.
pub struct CpuValues<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> CpuValues<'a> {
    /// # Errors
    /// Where the tensor is no contiguous f32 tensor on the CPU.
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) =
            (&*storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("fused operations take contiguous f32 tensors on the CPU");
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
            // `of` has looked.
            _ => &[],
        }
    }
}

/// State kept between the passes survives a panic in another thread unharmed: it is written whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The rows of one segment, of `width` values each.
fn segment_rows<'a>(values: &'a [f32], segment: &Range<usize>, width: usize) -> &'a [f32] {
    &values[segment.start * width..segment.end * width]
}

/// `values` cut into the rows of each segment.
fn split_segments<'a>(
    mut values: &'a mut [f32],
    segments: &[Range<usize>],
    width: usize,
) -> Vec<&'a mut [f32]> {
    segments
        .iter()
        .map(|segment| {
            let (rows, rest) = std::mem::take(&mut values).split_at_mut(segment.len() * width);
            values = rest;
            rows
        })
        .collect()
}
