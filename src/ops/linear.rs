//! `y = x W^T + b`, without a transposed copy of the weight in either direction. The gradient of b is
//! [`sum_rows`](super::sum_rows) of that of y.

use rayon::prelude::*;

use super::matmul::{Precision, matmul};
use super::{Gradient, ROWS_PER_TASK};
use crate::ops::matmul::matrix::{Mat, MatMut, Threads};

/// A linear layer of `inputs` (I) and `outputs` (O) channels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear {
    pub inputs: usize,
    pub outputs: usize,
    pub precision: Precision,
}

impl Linear {
    /// `x` (T x I), `weight` (O x I, as Hugging Face stores it) and `bias` (O) give `y` (T x O).
    /// What is in `y` stays as a summand where `add` (a residual connection).
    pub(crate) fn forward(
        self,
        x: &[f32],
        weight: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
        add: bool,
    ) {
        matmul(
            MatMut::new(y, self.outputs),
            Mat::new(x, self.inputs),
            Mat::new(weight, self.inputs).t(),
            add,
            Threads::All,
            self.precision,
        );
        if let Some(bias) = bias {
            y.par_chunks_mut(self.outputs)
                .with_min_len(ROWS_PER_TASK)
                .for_each(|y| {
                    y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                });
        }
    }

    /// dx = dy W.
    pub(crate) fn backward_input(self, dy: &[f32], weight: &[f32], dx: Gradient) {
        matmul(
            MatMut::new(dx.values, self.inputs),
            Mat::new(dy, self.outputs),
            Mat::new(weight, self.inputs),
            dx.add,
            Threads::All,
            self.precision,
        );
    }

    /// dW = dy^T x.
    pub(crate) fn backward_weight(self, dy: &[f32], x: &[f32], dweight: Gradient) {
        matmul(
            MatMut::new(dweight.values, self.inputs),
            Mat::new(dy, self.outputs).t(),
            Mat::new(x, self.inputs),
            dweight.add,
            Threads::All,
            self.precision,
        );
    }
}
