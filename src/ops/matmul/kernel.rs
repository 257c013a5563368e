//! Kernels that pack their factors as f32: one for AVX2 and AVX-512, through the `pulp` crate, and a scalar one for
//! products in bf16 precision on other CPUs.

use std::cell::Cell;
use std::thread::LocalKey;

use pulp::{Simd, WithSimd};

use super::blocks::{FactorPart, Kernel, OutputStrip};

/// A kernel with tiles of R rows and two vectors (C columns). With `rounded`, packing rounds the
/// factors to bf16.
#[derive(Clone, Copy)]
pub(crate) struct VectorKernel<S, const R: usize, const C: usize> {
    pub simd: S,
    pub rounded: bool,
}

thread_local! {
    static BUFFERS: [Cell<Vec<f32>>; 2] = const { [Cell::new(Vec::new()), Cell::new(Vec::new())] };
}

impl<S: Simd, const R: usize, const C: usize> Kernel for VectorKernel<S, R, C> {
    const ROWS: usize = R;
    const COLS: usize = C;
    const STEP: usize = 1;
    const MAX_TERMS: usize = 600;
    type Element = f32;

    fn pack_rows(self, part: FactorPart, packed: &mut [f32]) {
        let rounded = self.rounded;
        self.simd.vectorize(Pack::<R> {
            part,
            packed,
            rounded,
        });
    }

    fn pack_cols(self, part: FactorPart, packed: &mut [f32]) {
        let rounded = self.rounded;
        self.simd.vectorize(Pack::<C> {
            part,
            packed,
            rounded,
        });
    }

    fn multiply(self, rows: &[f32], cols: &[f32], depth: usize, strip: OutputStrip) {
        assert_eq!(C, 2 * S::F32_LANES);
        self.simd.vectorize(Multiply::<R, C> {
            rows,
            cols,
            depth,
            strip,
        });
    }

    fn buffers() -> &'static LocalKey<[Cell<Vec<f32>>; 2]> {
        &BUFFERS
    }
}

struct Pack<'a, const L: usize> {
    part: FactorPart<'a>,
    packed: &'a mut [f32],
    rounded: bool,
}

impl<const L: usize> WithSimd for Pack<'_, L> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        pack::<L>(self.part, self.packed);
        if self.rounded {
            self.packed
                .iter_mut()
                .for_each(|value| *value = round(*value));
        }
    }
}

/// Packs panels of L lanes: `packed[(l / L * terms + t) * L + l % L]` is term t of lane l.
#[inline(always)]
pub(crate) fn pack<const L: usize>(part: FactorPart, packed: &mut [f32]) {
    let FactorPart {
        values,
        lane_stride,
        term_stride,
        lanes,
        terms,
    } = part;
    let panel_len = terms * L;
    let full_panels = lanes / L;
    if lane_stride == 1 {
        // Term by term through all panels, in memory order.
        for t in 0..terms {
            let term = values[t * term_stride..][..lanes].chunks_exact(L);
            for (panel, lanes) in packed.chunks_exact_mut(panel_len).zip(term) {
                panel[t * L..(t + 1) * L].copy_from_slice(lanes);
            }
        }
    } else if term_stride == 1 {
        for (index, packed) in packed
            .chunks_exact_mut(panel_len)
            .take(full_panels)
            .enumerate()
        {
            let lane = |l: usize| &values[(index * L + l) * lane_stride..][..terms];
            transpose::<L>(std::array::from_fn(lane), packed);
        }
    }
    let packed_panels = if lane_stride == 1 || term_stride == 1 {
        full_panels
    } else {
        0
    };
    let panels = packed.chunks_exact_mut(panel_len).enumerate();
    for (index, packed) in panels.skip(packed_panels) {
        packed.fill(0.0);
        let first = index * L;
        for (t, packed) in packed.chunks_exact_mut(L).enumerate() {
            for (l, packed) in packed.iter_mut().take(lanes - first).enumerate() {
                *packed = values[(first + l) * lane_stride + t * term_stride];
            }
        }
    }
}

/// Transposes lanes to terms: `packed[t * L + l]` is term t of lane l.
#[inline(always)]
fn transpose<const L: usize>(lanes: [&[f32]; L], packed: &mut [f32]) {
    let terms = packed.len() / L;
    let mut transposed_terms = 0;
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") {
        transposed_terms = terms / RUN * RUN;
        for start in (0..transposed_terms).step_by(RUN) {
            // SAFETY: the feature was detected.
            unsafe { transpose_run(&lanes, start, &mut packed[start * L..(start + RUN) * L]) };
        }
    }
    let packed_terms = packed.chunks_exact_mut(L).enumerate();
    for (t, packed) in packed_terms.skip(transposed_terms) {
        for (packed, lane) in packed.iter_mut().zip(lanes) {
            *packed = lane[t];
        }
    }
}

/// Number of terms transposed at a time: the number of values in an AVX vector.
const RUN: usize = 8;

/// Transposes terms `start .. start + 8`, 8 lanes at a time, by three rounds of swaps between two
/// vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
#[inline]
fn transpose_run<const L: usize>(lanes: &[&[f32]; L], start: usize, packed: &mut [f32]) {
    use std::arch::x86_64::{
        _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps,
        _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    for first in (0..L).step_by(RUN) {
        let count = RUN.min(L - first);
        let mut rows = [_mm256_setzero_ps(); RUN];
        for (row, lane) in rows.iter_mut().zip(&lanes[first..]) {
            let run = &lane[start..start + RUN];
            // SAFETY: `run` has 8 values.
            *row = unsafe { _mm256_loadu_ps(run.as_ptr()) };
        }
        let mut pairs = rows;
        for i in [0, 2, 4, 6] {
            pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        let mut quads = pairs;
        for i in [0, 4] {
            quads[i] = _mm256_shuffle_ps::<0x44>(pairs[i], pairs[i + 2]);
            quads[i + 1] = _mm256_shuffle_ps::<0xee>(pairs[i], pairs[i + 2]);
            quads[i + 2] = _mm256_shuffle_ps::<0x44>(pairs[i + 1], pairs[i + 3]);
            quads[i + 3] = _mm256_shuffle_ps::<0xee>(pairs[i + 1], pairs[i + 3]);
        }
        for t in 0..4 {
            let term = _mm256_permute2f128_ps::<0x20>(quads[t], quads[t + 4]);
            let fourth_next_term = _mm256_permute2f128_ps::<0x31>(quads[t], quads[t + 4]);
            for (t, vector) in [(t, term), (t + 4, fourth_next_term)] {
                let mut values = [0.0; RUN];
                // SAFETY: `values` has 8 values.
                unsafe { _mm256_storeu_ps(values.as_mut_ptr(), vector) };
                packed[t * L + first..][..count].copy_from_slice(&values[..count]);
            }
        }
    }
}

/// Rounds to the nearest bf16, ties to even.
#[inline(always)]
fn round(value: f32) -> f32 {
    f32::from_bits(bf16_bits(value))
}

/// Returns the bits of the nearest bf16 in the high half, zeros in the low half.
#[inline(always)]
pub(crate) fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // A NaN must stay NaN: the carry of the rounding could turn it into a number.
    let bits = if value.is_nan() {
        bits | 1 << 22
    } else {
        rounded
    };
    bits & 0xffff_0000
}

struct Multiply<'a, const R: usize, const C: usize> {
    rows: &'a [f32],
    cols: &'a [f32],
    depth: usize,
    strip: OutputStrip<'a>,
}

impl<const R: usize, const C: usize> WithSimd for Multiply<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            rows,
            cols,
            depth,
            strip,
        } = self;
        for (j, cols) in cols.chunks_exact(depth * C).enumerate() {
            let width = C.min(strip.cols - j * C);
            for (i, rows) in rows.chunks_exact(depth * R).enumerate() {
                let height = R.min(strip.rows - i * R);
                for row in strip.rows(i * R, height) {
                    prefetch(&row[strip.first + j * C..][..width]);
                }
                let tile = tile::<S, R>(simd, rows, S::as_simd_f32s(cols).0);
                let lines = strip.values[i * R * strip.stride..].chunks_mut(strip.stride);
                for (line, sums) in lines.take(height).zip(&tile) {
                    let line = &mut line[strip.first + j * C..][..width];
                    if width == C {
                        let (line, _) = S::as_mut_simd_f32s(line);
                        for (value, sum) in line.iter_mut().zip(sums) {
                            let previous = if strip.add {
                                *value
                            } else {
                                simd.splat_f32s(0.0)
                            };
                            *value = simd.add_f32s(previous, *sum);
                        }
                    } else {
                        let mut padded = [0.0; C];
                        S::as_mut_simd_f32s(&mut padded).0.copy_from_slice(sums);
                        for (value, sum) in line.iter_mut().zip(padded) {
                            *value = if strip.add { *value + sum } else { sum };
                        }
                    }
                }
            }
        }
    }
}

/// Prefetches a row of the output while the sums of its tile are computed.
#[inline(always)]
fn prefetch(row: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for value in [row.first(), row.last()].into_iter().flatten() {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address is that of a valid value.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
}

/// Computes the sums of a tile: R rows and two vectors of columns.
#[inline(always)]
fn tile<S: Simd, const R: usize>(simd: S, rows: &[f32], cols: &[S::f32s]) -> [[S::f32s; 2]; R] {
    let mut sums = [[simd.splat_f32s(0.0); 2]; R];
    for (row, col) in rows.chunks_exact(R).zip(cols.chunks_exact(2)) {
        let (left, right) = (col[0], col[1]);
        for (sums, row) in sums.iter_mut().zip(row) {
            let row = simd.splat_f32s(*row);
            sums[0] = simd.mul_add_f32s(row, left, sums[0]);
            sums[1] = simd.mul_add_f32s(row, right, sums[1]);
        }
    }
    sums
}

/// A kernel with tiles of 4 x 4 and factors rounded to bf16, for any CPU.
#[derive(Clone, Copy)]
pub(crate) struct ScalarKernel;

/// Rows and columns of a tile of [`ScalarKernel`].
const SCALAR_SIDE: usize = 4;

impl Kernel for ScalarKernel {
    const ROWS: usize = SCALAR_SIDE;
    const COLS: usize = SCALAR_SIDE;
    const STEP: usize = 1;
    const MAX_TERMS: usize = 256;
    type Element = f32;

    fn pack_rows(self, part: FactorPart, packed: &mut [f32]) {
        pack::<SCALAR_SIDE>(part, packed);
        packed.iter_mut().for_each(|value| *value = round(*value));
    }

    fn pack_cols(self, part: FactorPart, packed: &mut [f32]) {
        self.pack_rows(part, packed);
    }

    fn multiply(self, rows: &[f32], cols: &[f32], depth: usize, strip: OutputStrip) {
        for (j, cols) in cols.chunks_exact(depth * SCALAR_SIDE).enumerate() {
            let width = SCALAR_SIDE.min(strip.cols - j * SCALAR_SIDE);
            for (i, rows) in rows.chunks_exact(depth * SCALAR_SIDE).enumerate() {
                let height = SCALAR_SIDE.min(strip.rows - i * SCALAR_SIDE);
                let mut sums = [[0.0f32; SCALAR_SIDE]; SCALAR_SIDE];
                let col_terms = cols.chunks_exact(SCALAR_SIDE);
                for (row, col) in rows.chunks_exact(SCALAR_SIDE).zip(col_terms) {
                    for (sums, row) in sums.iter_mut().zip(row) {
                        for (sum, col) in sums.iter_mut().zip(col) {
                            *sum += row * col;
                        }
                    }
                }
                let first_row = i * SCALAR_SIDE;
                let lines = strip.values[first_row * strip.stride..].chunks_mut(strip.stride);
                for (line, sums) in lines.take(height).zip(sums) {
                    let line = &mut line[strip.first + j * SCALAR_SIDE..][..width];
                    for (value, sum) in line.iter_mut().zip(sums) {
                        *value = if strip.add { *value + sum } else { sum };
                    }
                }
            }
        }
    }

    fn buffers() -> &'static LocalKey<[Cell<Vec<f32>>; 2]> {
        &BUFFERS
    }
}
