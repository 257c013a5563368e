//! Linear layers: `y = x W^T + b`, without a transposed copy of the weight in either direction. The
//! gradient of b is [`sum_rows`](super::sum_rows) of the gradient of y.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::matmul::{Precision, matmul};
use super::{GradientMut, ROWS_PER_TASK};
use crate::ops::matmul::matrix::{Mat, MatMut, Threads};

/// A linear layer of `inputs` (I) and `outputs` (O) features.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear {
    pub inputs: usize,
    pub outputs: usize,
    pub precision: Precision,
}

impl Linear {
    /// Computes `y_TO` from `x_TI`, `weight_OI` (as Hugging Face stores it) and `bias_O`. With `add`,
    /// the result is added to `y_TO` (a residual connection).
    pub(crate) fn forward(
        self,
        x_TI: &[f32],
        weight_OI: &[f32],
        bias_O: Option<&[f32]>,
        y_TO: &mut [f32],
        add: bool,
    ) {
        matmul(
            MatMut::new(y_TO, self.outputs),
            Mat::new(x_TI, self.inputs),
            Mat::new(weight_OI, self.inputs).t(),
            add,
            Threads::All,
            self.precision,
        );
        if let Some(bias_O) = bias_O {
            y_TO.par_chunks_mut(self.outputs)
                .with_min_len(ROWS_PER_TASK)
                .for_each(|y_O| {
                    y_O.iter_mut().zip(bias_O).for_each(|(y, b)| *y += b);
                });
        }
    }

    /// dx = dy W.
    pub(crate) fn backward_input(self, dy_TO: &[f32], weight_OI: &[f32], dx_TI: GradientMut) {
        matmul(
            MatMut::new(dx_TI.values, self.inputs),
            Mat::new(dy_TO, self.outputs),
            Mat::new(weight_OI, self.inputs),
            dx_TI.add,
            Threads::All,
            self.precision,
        );
    }

    /// dW = dy^T x.
    pub(crate) fn backward_weight(self, dy_TO: &[f32], x_TI: &[f32], dweight_OI: GradientMut) {
        matmul(
            MatMut::new(dweight_OI.values, self.inputs),
            Mat::new(dy_TO, self.outputs).t(),
            Mat::new(x_TI, self.inputs),
            dweight_OI.add,
            Threads::All,
            self.precision,
        );
    }
}
