//! Matrix products over slices.
//!
//! [`blocks`] cuts a product into blocks that fit the caches and copies ("packs") them into the
//! order in which a kernel reads them (Goto and van de Geijn, ACM TOMS 34(3), 2008); [`kernel`]
//! multiplies f32 with the widest vectors of the CPU, [`bf16`] with its bf16 instructions, `amx` with
//! its matrix unit. Which is found out at run time. How a product is cut does not depend on the number of threads.

pub(crate) mod amx;
pub(crate) mod bf16;
pub(crate) mod blocks;
pub(crate) mod kernel;
#[cfg(target_arch = "x86_64")]
pub(crate) mod matrix;

use crate::ops::matmul::matrix::Mat;
use crate::ops::matmul::matrix::MatMut;
use crate::ops::matmul::matrix::Threads;
use crate::ops::matmul::matrix::span;
use blocks::Product;
use gemm::Parallelism;

/// What the factors of a product are rounded to; they are stored, and sums are taken, in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    #[default]
    F32,
    /// 8 bits of mantissa: faster where the CPU has AMX (Intel) or AVX512-BF16 (AMD), as fast elsewhere.
    Bf16,
}

impl Precision {
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// The fastest of this CPU.
    pub fn fastest() -> Self {
        #[cfg(target_arch = "x86_64")]
        if amx::Amx::detect().is_some() || bf16::Avx512Bf16::detect_if_fast().is_some() {
            return Self::Bf16;
        }
        Self::F32
    }
}

/// Products with fewer rows are left to the `gemm` crate: packing a weight to multiply it with
/// them costs more than it saves.
const FEW_ROWS: usize = 16;

/// `out = a b`, or `out += a b` where `add`.
///
/// # Panics
/// Where the inner sizes differ or a view reaches past its slice.
pub fn matmul(out: MatMut, a: Mat, b: Mat, add: bool, threads: Threads, precision: Precision) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "inner sizes of a matrix product differ");
    assert!(a.span() <= a.values.len() && b.span() <= b.values.len());
    assert!(out.row_stride >= n && span(m, n, out.row_stride, 1) <= out.values.len());
    if m == 0 || n == 0 {
        return;
    }
    let product = Product {
        out,
        a,
        b,
        add,
        threads,
    };
    let rounded = precision == Precision::Bf16;
    #[cfg(target_arch = "x86_64")]
    {
        if rounded && let Some(kernel) = amx::Amx::detect() {
            return product.run(kernel);
        }
        if rounded && let Some(kernel) = bf16::Avx512Bf16::detect_if_fast() {
            return product.run(kernel);
        }
        if rounded || m >= FEW_ROWS {
            match pulp::Arch::new() {
                pulp::Arch::V4(simd) => {
                    return product.run(kernel::VectorKernel::<_, 14, 32> { simd, rounded });
                }
                pulp::Arch::V3(simd) => {
                    return product.run(kernel::VectorKernel::<_, 6, 16> { simd, rounded });
                }
                _ => {}
            }
        }
    }
    if rounded {
        return product.run(kernel::ScalarKernel);
    }
    matmul_by_gemm(product);
}

/// A product in f32 by the `gemm` crate.
fn matmul_by_gemm(product: Product) {
    let Product {
        out,
        a,
        b,
        add,
        threads,
    } = product;
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: `matmul` checked the three spans against their slices, `out` is borrowed mutably
    // so it overlaps neither input, and every stride fits an isize because the slices exist.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.values.as_mut_ptr(),
            1,
            out.row_stride as isize,
            add,
            a.values.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that are exact in bf16, and whose products and sums are exact in f32.
    fn random(count: usize, random: &mut fastrand::Rng) -> Vec<f32> {
        (0..count).map(|_| random.i32(-8..=8) as f32).collect()
    }

    /// `values` (rows x cols) with its columns laid end to end.
    fn column_major(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        let at = |i: usize| values[i % rows * cols + i / rows];
        (0..rows * cols).map(at).collect()
    }

    #[test]
    fn products_agree_with_the_definition_for_every_size_and_transposition() {
        let mut rng = fastrand::Rng::with_seed(1);
        let sizes = [
            (5, 7, 3),
            (16, 1, 1),
            (33, 700, 50),
            (200, 64, 17),
            (97, 13, 3100),
            (40, 0, 9),
        ];
        for (m, k, n) in sizes {
            let (a, b) = (random(m * k, &mut rng), random(k * n, &mut rng));
            let (a_t, b_t) = (column_major(&a, m, k), column_major(&b, k, n));
            let mut expected = vec![0.0; m * n];
            for row in 0..m {
                for i in 0..k {
                    for col in 0..n {
                        expected[row * n + col] += a[row * k + i] * b[i * n + col];
                    }
                }
            }
            let (a, b) = (Mat::strided(&a, m, k, k), Mat::strided(&b, k, n, n));
            let a_t = Mat::strided(&a_t, k, m, m).t();
            let b_t = Mat::strided(&b_t, n, k, k).t();
            // Rows have a gap of two values, which must stay.
            let stride = n + 2;
            for (a, b) in [(a, b), (a_t, b), (a, b_t), (a_t, b_t)] {
                for precision in [Precision::F32, Precision::Bf16] {
                    for threads in [Threads::One, Threads::All] {
                        let mut out = vec![1.0; m * stride];
                        for add in [true, false, true] {
                            let to = MatMut::strided(&mut out, stride);
                            matmul(to, a, b, add, threads, precision);
                        }
                        for (at, value) in out.iter().enumerate() {
                            let (row, col) = (at / stride, at % stride);
                            let right = if col < n {
                                2.0 * expected[row * n + col]
                            } else {
                                1.0
                            };
                            assert_eq!(*value, right, "{m} x {k} x {n}: {row}, {col}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_rounds_factors_to_the_nearest_and_keeps_nan() {
        let value = 1.0 + 1.0 / 512.0;
        let (a, b) = ([value; 32], [1.0, f32::NAN]);
        for (precision, expected) in [(Precision::F32, value), (Precision::Bf16, 1.0)] {
            let mut out = [0.0; 64];
            let (a, b) = (Mat::new(&a, 1), Mat::new(&b, 2));
            matmul(
                MatMut::new(&mut out, 2),
                a,
                b,
                false,
                Threads::One,
                precision,
            );
            assert!(
                out.chunks(2)
                    .all(|row| row[0] == expected && row[1].is_nan())
            );
        }
        let up = f32::from_bits(0x3f80_8001);
        assert_eq!(kernel::bf16_bits(up), 0x3f81_0000);
        assert_eq!(kernel::bf16_bits(f32::INFINITY), f32::INFINITY.to_bits());
    }

    #[test]
    fn every_kind_of_tile_that_this_cpu_has_agrees() {
        let mut rng = fastrand::Rng::with_seed(2);
        for (m, k, n) in [(19, 400, 23), (70, 1100, 97), (64, 64, 64)] {
            let (a, b) = (random(m * k, &mut rng), random(k * n, &mut rng));
            let of = |run: fn(Product)| {
                let mut out = vec![0.5; m * n];
                run(Product {
                    out: MatMut::new(&mut out, n),
                    a: Mat::new(&a, k),
                    b: Mat::new(&b, n),
                    add: true,
                    threads: Threads::All,
                });
                out
            };
            let plain = of(|product| product.run(kernel::ScalarKernel));
            assert_eq!(plain, of(matmul_by_gemm));
            #[cfg(target_arch = "x86_64")]
            {
                if amx::Amx::detect().is_some() {
                    let run = |product: Product| product.run(amx::Amx::detect().unwrap());
                    assert_eq!(plain, of(run));
                }
                if bf16::Avx512Bf16::detect().is_some() {
                    let run = |product: Product| product.run(bf16::Avx512Bf16::detect().unwrap());
                    assert_eq!(plain, of(run));
                }
                let wide = |product: Product| match pulp::Arch::new() {
                    pulp::Arch::V4(simd) => {
                        product.run(kernel::VectorKernel::<_, 14, 32> {
                            simd,
                            rounded: true,
                        });
                    }
                    pulp::Arch::V3(simd) => {
                        product.run(kernel::VectorKernel::<_, 6, 16> {
                            simd,
                            rounded: true,
                        });
                    }
                    _ => product.run(kernel::ScalarKernel),
                };
                assert_eq!(plain, of(wide));
            }
        }
    }

    #[test]
    #[should_panic]
    fn a_view_past_its_slice_is_refused() {
        let short = [0.0; 5];
        let mut out = [0.0; 4];
        matmul(
            MatMut::strided(&mut out, 2),
            Mat::strided(&short, 2, 3, 3),
            Mat::strided(&short, 3, 2, 2),
            false,
            Threads::One,
            Precision::F32,
        );
    }
}
