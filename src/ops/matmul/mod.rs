//! Matrix products over slices.
//!
//! A product is cut into blocks that fit the caches. Each block is copied ("packed") into the order in
//! which a kernel reads it (Goto and van de Geijn, ACM TOMS 34(3), 2008). The kernel is chosen at run
//! time.
//!
//! | file | content |
//! |---|---|
//! | `matrix` | strided views of the factors and the output |
//! | `blocks` | the blocking, and the trait of a kernel |
//! | `kernel` | kernels for AVX2 and AVX-512 (factors in f32, or rounded to bf16), and a scalar one (rounded) |
//! | `bf16` | the kernel for AVX512-BF16 |
//! | `amx` | the kernel for Intel's matrix unit |
//!
//! Invariant: the blocking does not depend on the number of threads.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod bf16;
pub(crate) mod blocks;
pub(crate) mod kernel;
pub(crate) mod matrix;

use crate::ops::matmul::matrix::{Mat, MatMut, Threads, span};
use blocks::Product;
use gemm::Parallelism;

/// Number type to which [`matmul`] rounds the factors of a product. Storage and sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    #[default]
    F32,
    /// 8 significant bits, 7 of them stored. Faster than f32 on CPUs with AMX (Intel) or AVX512-BF16 (AMD), as fast on
    /// other CPUs with AVX2, and slower on the rest.
    Bf16,
}

impl Precision {
    /// Name in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Returns the fastest precision of this CPU.
    pub(crate) fn fastest() -> Self {
        #[cfg(target_arch = "x86_64")]
        if amx::Amx::detect().is_some() || bf16::Avx512Bf16::detect_if_fast().is_some() {
            return Self::Bf16;
        }
        Self::F32
    }
}

/// Minimum number of rows of an f32 product for the kernels of this folder. Products with fewer rows use the `gemm`
/// crate, because packing the right factor would cost more than it saves. So do all f32 products on CPUs without AVX2.
const MIN_ROWS: usize = 16;

/// Computes `out = a b`, or `out += a b` with `add`.
///
/// # Panics
/// If the inner sizes differ, a view extends past its slice, or the row stride of `out` is less than its number of
/// columns.
pub fn matmul(out: MatMut, a: Mat, b: Mat, add: bool, threads: Threads, precision: Precision) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "the inner sizes of a matrix product differ");
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
        if rounded || m >= MIN_ROWS {
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

/// Computes a product in f32 with the `gemm` crate.
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
    // so it overlaps neither input. A stride between two values of a view is less than the length of
    // its slice, so it fits an isize; any other stride leads to no value.
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
            // Factors of the previous output and of the product.
            1.0f32,
            1.0f32,
            // No complex conjugates.
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

    /// Random values that are exact in bf16, with products and sums that are exact in f32.
    fn random(count: usize, random: &mut fastrand::Rng) -> Vec<f32> {
        (0..count).map(|_| random.i32(-8..=8) as f32).collect()
    }

    /// Copies row-major `values` (rows x cols) to column-major order.
    fn column_major(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        let value = |i: usize| values[i % rows * cols + i / rows];
        (0..rows * cols).map(value).collect()
    }

    #[test]
    fn matmul_agrees_with_definition_for_all_sizes_and_transpositions() {
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
            let (a_by_column, b_by_column) = (column_major(&a, m, k), column_major(&b, k, n));
            let mut expected = vec![0.0; m * n];
            for row in 0..m {
                for i in 0..k {
                    for col in 0..n {
                        expected[row * n + col] += a[row * k + i] * b[i * n + col];
                    }
                }
            }
            let (a, b) = (Mat::strided(&a, m, k, k), Mat::strided(&b, k, n, n));
            // The same matrices, stored by column.
            let a_by_column = Mat::strided(&a_by_column, k, m, m).t();
            let b_by_column = Mat::strided(&b_by_column, n, k, k).t();
            // Rows are followed by a gap of two values, which must not change.
            let stride = n + 2;
            for (a, b) in [
                (a, b),
                (a_by_column, b),
                (a, b_by_column),
                (a_by_column, b_by_column),
            ] {
                for precision in [Precision::F32, Precision::Bf16] {
                    for threads in [Threads::One, Threads::All] {
                        let mut out = vec![1.0; m * stride];
                        for add in [true, false, true] {
                            let out = MatMut::strided(&mut out, stride);
                            matmul(out, a, b, add, threads, precision);
                        }
                        for (index, value) in out.iter().enumerate() {
                            let row = index / stride;
                            let col = index % stride;
                            let expected_value = if col < n {
                                2.0 * expected[row * n + col]
                            } else {
                                1.0
                            };
                            assert_eq!(*value, expected_value, "{m} x {k} x {n}: {row}, {col}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_rounds_factors_to_nearest_and_keeps_nan() {
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
    fn kernels_of_this_cpu_agree() {
        let mut rng = fastrand::Rng::with_seed(2);
        for (m, k, n) in [(19, 400, 23), (70, 1100, 97), (64, 64, 64)] {
            let (a, b) = (random(m * k, &mut rng), random(k * n, &mut rng));
            let product_by = |run: fn(Product)| {
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
            let expected = product_by(|product| product.run(kernel::ScalarKernel));
            assert_eq!(expected, product_by(matmul_by_gemm));
            #[cfg(target_arch = "x86_64")]
            {
                if amx::Amx::detect().is_some() {
                    let run = |product: Product| product.run(amx::Amx::detect().unwrap());
                    assert_eq!(expected, product_by(run));
                }
                if bf16::Avx512Bf16::detect().is_some() {
                    let run = |product: Product| product.run(bf16::Avx512Bf16::detect().unwrap());
                    assert_eq!(expected, product_by(run));
                }
                let vector_rounded = |product: Product| match pulp::Arch::new() {
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
                assert_eq!(expected, product_by(vector_rounded));
            }
        }
    }

    #[test]
    #[should_panic]
    fn matmul_panics_on_view_past_slice() {
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
