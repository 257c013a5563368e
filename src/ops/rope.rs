//! Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Hugging
//! Face: channel i is rotated with channel i + C/2.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use std::ops::Range;

use rayon::prelude::*;

use super::simd;

/// cos and sin of the angle of each of S positions and c = C/2 frequencies.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos_Sc: Vec<f32>,
    sin_Sc: Vec<f32>,
    /// c = C/2
    half: usize,
}

/// Direction of a rotation. The backward pass is the inverse rotation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rotation {
    Forward,
    Backward,
}

impl RopeTable {
    /// Computes the table from `inverse_frequencies_c`, in radians per position. Angles are computed in f32,
    /// because the models were trained that way.
    pub fn new(inverse_frequencies_c: &[f32], positions: usize) -> Self {
        let angles_Sc: Vec<f32> = (0..positions)
            .flat_map(|position| {
                inverse_frequencies_c
                    .iter()
                    .map(move |frequency| position as f32 * frequency)
            })
            .collect();
        Self {
            cos_Sc: angles_Sc.iter().map(|angle| angle.cos()).collect(),
            sin_Sc: angles_Sc.iter().map(|angle| angle.sin()).collect(),
            half: inverse_frequencies_c.len(),
        }
    }

    /// Returns cos and sin of the angles at `position` (C/2 each).
    pub(crate) fn cos_sin(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos_Sc[range.clone()], &self.sin_Sc[range])
    }

    /// Rotates rows of `width` channels (a multiple of C) in place. Positions start at 0 in each of
    /// the `segments`.
    pub(crate) fn rotate_segments(
        &self,
        rows: &mut [f32],
        width: usize,
        segments: &[Range<usize>],
        rotation: Rotation,
    ) {
        super::split_segments(rows, segments, width)
            .into_par_iter()
            .for_each(|rows| self.rotate_rows(rows, width, 0, rotation));
    }

    /// Rotates rows of `width` channels in place, at positions `first`, `first + 1`, ...
    pub(crate) fn rotate_rows(
        &self,
        rows: &mut [f32],
        width: usize,
        first: usize,
        rotation: Rotation,
    ) {
        let sign = if rotation == Rotation::Forward {
            1.0
        } else {
            -1.0
        };
        rows.par_chunks_mut(width)
            .enumerate()
            .with_min_len(super::ROWS_PER_TASK)
            .for_each(|(row, heads)| {
                let (cos, sin) = self.cos_sin(first + row);
                simd!(|heads: &mut [f32], cos: &[f32], sin: &[f32], sign: f32| {
                    let half = cos.len();
                    for head in heads.chunks_exact_mut(2 * half) {
                        let (a, b) = head.split_at_mut(half);
                        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                            let x = *a;
                            let y = *b;
                            let sin = sin * sign;
                            *a = x * cos - y * sin;
                            *b = y * cos + x * sin;
                        }
                    }
                });
            });
    }
}
