//! Table lookup by row index: token embeddings, position embeddings, and the selection of the
//! supervised positions.

use rayon::prelude::*;

use super::GradientMut;

/// Copies rows `ids` (T) of `table` (V x D) to `y` (T x D).
///
/// # Panics
/// Where an id is outside the table.
pub(crate) fn forward(table: &[f32], ids: &[u32], width: usize, y: &mut [f32]) {
    for (y, &id) in y.chunks_mut(width).zip(ids) {
        y.copy_from_slice(row(table, id, width));
    }
}

/// Adds rows `ids` (T) of `table` to `y` (T x D).
///
/// # Panics
/// Where an id is outside the table.
pub(crate) fn add(table: &[f32], ids: &[u32], width: usize, y: &mut [f32]) {
    for (y, &id) in y.chunks_mut(width).zip(ids) {
        for (y, x) in y.iter_mut().zip(row(table, id, width)) {
            *y += x;
        }
    }
}

/// Computes the gradient of the table: `dtable[id]` is the sum of the rows of dy that read row `id`.
pub(crate) fn backward(dy: &[f32], ids: &[u32], width: usize, dtable: GradientMut) {
    if !dtable.add {
        dtable
            .values
            .par_chunks_mut(1 << 16)
            .for_each(|part| part.fill(0.0));
    }
    for (dy, &id) in dy.chunks(width).zip(ids) {
        let start = id as usize * width;
        for (sum, d) in dtable.values[start..start + width].iter_mut().zip(dy) {
            *sum += d;
        }
    }
}

fn row(table: &[f32], id: u32, width: usize) -> &[f32] {
    let start = id as usize * width;
    &table[start..start + width]
}
