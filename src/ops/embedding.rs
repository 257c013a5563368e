//! Table lookup by row index: token embeddings, position embeddings, and the selection of the
//! supervised positions.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::GradientMut;

/// Number of values of a gradient that one task sets to zero.
const ZEROS_PER_TASK: usize = 1 << 16;

/// Copies rows `ids_T` of `table_VD` to `y_TD`. `width` is D.
///
/// # Panics
/// Where an id is outside the table.
pub(crate) fn forward(table_VD: &[f32], ids_T: &[u32], width: usize, y_TD: &mut [f32]) {
    for (y_D, &id) in y_TD.chunks_mut(width).zip(ids_T) {
        y_D.copy_from_slice(row(table_VD, id, width));
    }
}

/// Adds rows `ids_T` of `table_VD` to `y_TD`. `width` is D.
///
/// # Panics
/// Where an id is outside the table.
pub(crate) fn add(table_VD: &[f32], ids_T: &[u32], width: usize, y_TD: &mut [f32]) {
    for (y_D, &id) in y_TD.chunks_mut(width).zip(ids_T) {
        for (y, x) in y_D.iter_mut().zip(row(table_VD, id, width)) {
            *y += x;
        }
    }
}

/// Computes the gradient of the table: row i is the sum of the rows of `dy_TD` whose id is i.
///
/// # Panics
/// Where an id is outside the table.
pub(crate) fn backward(dy_TD: &[f32], ids_T: &[u32], width: usize, dtable_VD: GradientMut) {
    if !dtable_VD.add {
        dtable_VD
            .values
            .par_chunks_mut(ZEROS_PER_TASK)
            .for_each(|values| values.fill(0.0));
    }
    for (dy_D, &id) in dy_TD.chunks(width).zip(ids_T) {
        let start = id as usize * width;
        let dtable_D = &mut dtable_VD.values[start..start + width];
        for (sum, dy) in dtable_D.iter_mut().zip(dy_D) {
            *sum += dy;
        }
    }
}

fn row(table_VD: &[f32], id: u32, width: usize) -> &[f32] {
    let start = id as usize * width;
    &table_VD[start..start + width]
}
