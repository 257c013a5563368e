//! The kernel for AVX512-BF16: instructions that multiply pairs of bf16 and add the products in f32. They
//! treat factors with a magnitude below 1.2e-38 as zero, unlike the kernels of `kernel`.

use super::blocks::FactorPart;
use super::kernel::{bf16_bits, pack};

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Avx512Bf16;

/// Packs panels of L lanes in pairs of terms. For even t, `packed[(l / L * pairs + t / 2) * L + l % L]`
/// holds term t of lane l in its low half and term t + 1 in its high half.
#[inline(always)]
fn pack_pairs<const L: usize>(part: FactorPart, packed: &mut [u32]) {
    /// Terms packed at a time.
    const RUN: usize = 32;
    let mut ordered = [[0.0; L]; RUN];
    let panel_len = part.terms.div_ceil(2) * L;
    for (index, packed) in packed.chunks_exact_mut(panel_len).enumerate() {
        for (run, packed) in packed.chunks_mut(RUN / 2 * L).enumerate() {
            let start = run * RUN;
            let lane = index * L;
            let run = FactorPart {
                values: &part.values[lane * part.lane_stride + start * part.term_stride..],
                lanes: L.min(part.lanes - lane),
                terms: RUN.min(part.terms - start),
                ..part
            };
            pack::<L>(run, ordered[..run.terms].as_flattened_mut());
            if !run.terms.is_multiple_of(2) {
                ordered[run.terms].fill(0.0);
            }
            let pairs = ordered.chunks_exact(2).map(|pair| (&pair[0], &pair[1]));
            for (packed, (first, second)) in packed.chunks_exact_mut(L).zip(pairs) {
                for ((packed, first), second) in packed.iter_mut().zip(first).zip(second) {
                    *packed = bf16_bits(*first) >> 16 | bf16_bits(*second);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __cpuid, __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_si512,
        _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
    };
    use std::cell::Cell;
    use std::thread::LocalKey;

    use super::super::blocks::{FactorPart, Kernel, OutputStrip};
    use super::pack_pairs;

    /// Rows and columns of a tile: 28 vectors of sums, which leave 4 of the 32 registers for the factors.
    const ROWS: usize = 14;
    const COLS: usize = 32;
    /// Number of f32 sums in a vector, and of bf16 pairs.
    const LANES: usize = 16;

    /// A kernel with tiles of 14 x 32 values. A value of this type proves that the CPU has the instructions.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Bf16(());

    impl Avx512Bf16 {
        /// Detects CPUs whose vectors multiply bf16 faster than f32. Intel's do not: on Sapphire Rapids,
        /// vector bf16 has two thirds of the speed of f32.
        pub(crate) fn detect_if_fast() -> Option<Self> {
            Self::detect().filter(|_| !is_intel())
        }

        /// Detects the instructions.
        pub(crate) fn detect() -> Option<Self> {
            let is_usable = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bf16");
            is_usable.then_some(Self(()))
        }
    }

    fn is_intel() -> bool {
        let vendor = __cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        name.as_flattened() == b"GenuineIntel"
    }

    thread_local! {
        static BUFFERS: [Cell<Vec<u32>>; 2] =
            const { [Cell::new(Vec::new()), Cell::new(Vec::new())] };
    }

    impl Kernel for Avx512Bf16 {
        const ROWS: usize = ROWS;
        const COLS: usize = COLS;
        const STEP: usize = 2;
        const MAX_TERMS: usize = 640;
        type Element = u32;

        fn pack_rows(self, part: FactorPart, packed: &mut [u32]) {
            // SAFETY: `detect` found the features.
            unsafe { pack_vectorised::<ROWS>(part, packed) }
        }

        fn pack_cols(self, part: FactorPart, packed: &mut [u32]) {
            // SAFETY: `detect` found the features.
            unsafe { pack_vectorised::<COLS>(part, packed) }
        }

        fn multiply(self, rows: &[u32], cols: &[u32], depth: usize, strip: OutputStrip) {
            // SAFETY: `detect` found the features.
            unsafe { multiply(rows, cols, depth, strip) }
        }

        fn buffers() -> &'static LocalKey<[Cell<Vec<u32>>; 2]> {
            &BUFFERS
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    fn pack_vectorised<const L: usize>(part: FactorPart, packed: &mut [u32]) {
        pack_pairs::<L>(part, packed);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    fn multiply(rows: &[u32], cols: &[u32], depth: usize, strip: OutputStrip) {
        for (j, cols) in cols.chunks_exact(depth * COLS).enumerate() {
            let width = COLS.min(strip.cols - j * COLS);
            let masks = [mask(width), mask(width.saturating_sub(LANES))];
            for (i, rows) in rows.chunks_exact(depth * ROWS).enumerate() {
                let height = ROWS.min(strip.rows - i * ROWS);
                let sums = tile(rows, cols);
                let lines = strip.values[i * ROWS * strip.stride..].chunks_mut(strip.stride);
                for (line, sums) in lines.take(height).zip(sums) {
                    let line = &mut line[strip.first + j * COLS..][..width];
                    for ((half, sum), mask) in line.chunks_mut(LANES).zip(sums).zip(masks) {
                        let pointer = half.as_mut_ptr();
                        // SAFETY: the mask selects as many values as `half` has.
                        unsafe {
                            let previous = if strip.add {
                                _mm512_maskz_loadu_ps(mask, pointer)
                            } else {
                                _mm512_setzero_ps()
                            };
                            _mm512_mask_storeu_ps(pointer, mask, _mm512_add_ps(previous, sum));
                        }
                    }
                }
            }
        }
    }

    /// Returns a mask of the first `width` values of a vector.
    fn mask(width: usize) -> u16 {
        ((1u32 << width.min(LANES)) - 1) as u16
    }

    /// Computes the sums of a tile: 14 rows and 32 columns.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn tile(rows: &[u32], cols: &[u32]) -> [[__m512; 2]; ROWS] {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for (row, col) in rows.chunks_exact(ROWS).zip(cols.chunks_exact(COLS)) {
            // SAFETY: `col` has 32 elements, two vectors.
            let (left, right) = unsafe {
                let pointer = col.as_ptr().cast::<__m512i>();
                (
                    _mm512_loadu_si512(pointer),
                    _mm512_loadu_si512(pointer.add(1)),
                )
            };
            let (left, right) = (as_bf16(left), as_bf16(right));
            for (sums, row) in sums.iter_mut().zip(row) {
                let row = as_bf16(_mm512_set1_epi32(row.cast_signed()));
                sums[0] = _mm512_dpbf16_ps(sums[0], row, left);
                sums[1] = _mm512_dpbf16_ps(sums[1], row, right);
            }
        }
        sums
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn as_bf16(bits: __m512i) -> __m512bh {
        // SAFETY: both types have 512 bits and no invalid bit patterns.
        unsafe { std::mem::transmute(bits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_pairs_hold_two_terms_of_a_lane() {
        let (lanes, terms) = (11, 37);
        let values: Vec<f32> = (0..lanes * terms).map(|i| i as f32).collect();
        for (lane_stride, term_stride) in [(terms, 1), (1, lanes)] {
            let part = FactorPart {
                values: &values,
                lane_stride,
                term_stride,
                lanes,
                terms,
            };
            let pairs = terms.div_ceil(2);
            let mut packed = vec![7; pairs * 12];
            pack_pairs::<4>(part, &mut packed);
            for (index, pair) in packed.iter().enumerate() {
                let panel = index / (pairs * 4);
                let index = index % (pairs * 4);
                let l = panel * 4 + index % 4;
                let t = index / 4 * 2;
                let value = |t: usize| {
                    if l < lanes && t < terms {
                        half::bf16::from_f32(values[l * lane_stride + t * term_stride]).to_bits()
                    } else {
                        0
                    }
                };
                assert_eq!(
                    [*pair as u16, (*pair >> 16) as u16],
                    [value(t), value(t + 1)]
                );
            }
        }
    }
}
