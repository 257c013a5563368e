//! The LM head and its loss in one operation, chunked over the supervised positions.
//!
//! The logits (N x V) are the largest tensor of a step and are never stored: a chunk of rows is
//! computed, turned into its loss and gradient in place, multiplied back, and overwritten by the
//! next. Both gradients are ready when the forward pass ends.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Threads, matmul};
use super::{lock, values, with_values};

/// Rows of logits that exist at a time.
const CHUNK: usize = 256;

/// The summed loss (a scalar) of `hidden_ND` (N x D) under the head `weight_VD` (V x D), and what
/// `row` says of each position, in order.
///
/// `row` gets a position's index and its logits (V), turns these into their gradient in place, and
/// returns the loss and anything else about the position.
#[expect(non_snake_case, reason = "tensors carry their shape in their name")]
pub fn head_loss<F, R>(hidden_ND: &Tensor, weight_VD: &Tensor, row: F) -> Result<(Tensor, Vec<R>)>
where
    F: Fn(usize, &mut [f32]) -> (f32, R) + Send + Sync + 'static,
    R: Send + 'static,
{
    let reports = Arc::new(Mutex::new(Vec::new()));
    let op = HeadLoss {
        row,
        reports: Arc::clone(&reports),
        gradients: Mutex::default(),
    };
    let loss = hidden_ND.apply_op2(weight_VD, op)?;
    let reports = std::mem::take(&mut *lock(&reports));
    Ok((loss, reports))
}

/// Calls `row` with each row of logits (V) of `hidden_ND` (N x D) under `weight_VD` (V x D), a
/// chunk at a time, and collects what it returns in order.
#[expect(non_snake_case, reason = "tensors carry their shape in their name")]
pub fn map_logits<R: Send>(
    hidden_ND: &Tensor,
    weight_VD: &Tensor,
    row: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> Result<Vec<R>> {
    let (positions, width) = hidden_ND.dims2()?;
    let vocabulary = weight_VD.dim(0)?;
    let mut results = Vec::with_capacity(positions);
    with_values(hidden_ND, |hidden| {
        with_values(weight_VD, |weight| {
            let mut logits = vec![0.0; CHUNK.min(positions) * vocabulary];
            for (chunk, hidden) in hidden.chunks(CHUNK * width).enumerate() {
                let rows = hidden.len() / width;
                let logits = &mut logits[..rows * vocabulary];
                product(logits, hidden, weight, width, vocabulary);
                let lines = logits.par_chunks_mut(vocabulary).enumerate();
                results.par_extend(lines.map(|(line, logits)| row(chunk * CHUNK + line, logits)));
            }
        })
    })??;
    Ok(results)
}

struct HeadLoss<F, R> {
    row: F,
    reports: Arc<Mutex<Vec<R>>>,
    /// With respect to `hidden` and `weight`.
    gradients: Mutex<(Vec<f32>, Vec<f32>)>,
}

impl<F, R> CustomOp2 for HeadLoss<F, R>
where
    F: Fn(usize, &mut [f32]) -> (f32, R) + Send + Sync,
    R: Send,
{
    fn name(&self) -> &'static str {
        "head-loss"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (positions, width) = hidden_layout.shape().dims2()?;
        let (vocabulary, _) = weight_layout.shape().dims2()?;
        let hidden = values(hidden, hidden_layout)?;
        let weight = values(weight, weight_layout)?;
        let mut dhidden = vec![0.0; hidden.len()];
        let mut dweight = vec![0.0; weight.len()];
        let mut logits = vec![0.0; CHUNK.min(positions) * vocabulary];
        let mut total = 0.0f64;
        let mut reports = Vec::with_capacity(positions);
        let chunks = hidden
            .chunks(CHUNK * width)
            .zip(dhidden.chunks_mut(CHUNK * width));
        for (chunk, (hidden, dhidden)) in chunks.enumerate() {
            let rows = hidden.len() / width;
            let logits = &mut logits[..rows * vocabulary];
            product(logits, hidden, weight, width, vocabulary);
            let rows_done: Vec<(f32, R)> = logits
                .par_chunks_mut(vocabulary)
                .enumerate()
                .map(|(line, logits)| (self.row)(chunk * CHUNK + line, logits))
                .collect();
            for (loss, report) in rows_done {
                total += f64::from(loss);
                reports.push(report);
            }
            let dlogits = Mat::new(logits, rows, vocabulary);
            let weight = Mat::new(weight, vocabulary, width);
            let hidden = Mat::new(hidden, rows, width);
            let dhidden = MatMut::strided(dhidden, width);
            matmul(dhidden, dlogits, weight, false, Threads::All);
            let dweight = MatMut::strided(&mut dweight, width);
            matmul(dweight, dlogits.t(), hidden, true, Threads::All);
        }
        *lock(&self.gradients) = (dhidden, dweight);
        *lock(&self.reports) = reports;
        Ok((CpuStorage::F32(vec![total as f32]), ().into()))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _loss: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dhidden, mut dweight) = std::mem::take(&mut *lock(&self.gradients));
        let grad = grad.to_scalar::<f32>()?;
        if grad != 1.0 {
            for values in [&mut dhidden, &mut dweight] {
                values.par_iter_mut().for_each(|value| *value *= grad);
            }
        }
        Ok((
            Some(Tensor::from_vec(dhidden, hidden.shape(), hidden.device())?),
            Some(Tensor::from_vec(dweight, weight.shape(), hidden.device())?),
        ))
    }
}

/// `logits = hidden weight^T`.
fn product(logits: &mut [f32], hidden: &[f32], weight: &[f32], width: usize, vocabulary: usize) {
    matmul(
        MatMut::strided(logits, vocabulary),
        Mat::new(hidden, hidden.len() / width, width),
        Mat::new(weight, vocabulary, width).t(),
        false,
        Threads::All,
    );
}
