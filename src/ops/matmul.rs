//! Matrix products over slices: the bounds are checked here, the arithmetic is the `gemm` crate's.

use gemm::Parallelism;

/// A strided view of an f32 matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix (rows x cols) whose rows lie `row_stride` values apart.
    pub fn strided(values: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self {
            values,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// A row-major matrix without gaps: as many rows of `cols` values as there are.
    pub fn new(values: &'a [f32], cols: usize) -> Self {
        Self::strided(values, values.len() / cols.max(1), cols, cols)
    }

    /// The transpose, without a copy.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// The output of a product: row-major, rows `row_stride` values apart.
pub struct MatMut<'a> {
    values: &'a mut [f32],
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    pub fn strided(values: &'a mut [f32], row_stride: usize) -> Self {
        Self { values, row_stride }
    }

    /// A matrix of `cols` columns without gaps.
    pub fn new(values: &'a mut [f32], cols: usize) -> Self {
        Self::strided(values, cols)
    }
}

/// What the products of a pass are computed in; sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    #[default]
    F32,
}

/// Whether a product spreads over the threads of the pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    One,
    All,
}

/// How many values a (rows x cols) matrix with these strides spans.
fn span(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    (rows - 1) * row_stride + (cols - 1) * col_stride + 1
}

/// `out = a b`, or `out += a b` where `accumulate`.
///
/// # Panics
/// Where the inner sizes differ or a view reaches past its slice.
pub fn matmul(
    out: MatMut,
    a: Mat,
    b: Mat,
    accumulate: bool,
    threads: Threads,
    precision: Precision,
) {
    let Precision::F32 = precision;
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "inner sizes of a matrix product differ");
    assert!(span(m, k, a.row_stride, a.col_stride) <= a.values.len());
    assert!(span(k, n, b.row_stride, b.col_stride) <= b.values.len());
    assert!(out.row_stride >= n && span(m, n, out.row_stride, 1) <= out.values.len());
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: the three spans were checked against their slices above, `out` is borrowed mutably
    // so it overlaps neither input, and every stride fits an isize because the slices exist.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.values.as_mut_ptr(),
            1,
            out.row_stride as isize,
            accumulate,
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

    #[test]
    fn products_agree_with_the_definition_for_every_transposition() {
        let (m, k, n) = (5, 7, 3);
        let a: Vec<f32> = (0..m * k).map(|i| (i % 11) as f32 - 5.0).collect();
        let b: Vec<f32> = (0..k * n).map(|i| (i % 7) as f32 - 3.0).collect();
        let expected = |row: usize, col: usize| -> f32 {
            (0..k).map(|i| a[row * k + i] * b[i * n + col]).sum()
        };
        let a_t: Vec<f32> = (0..k * m).map(|i| a[(i % m) * k + i / m]).collect();
        let b_t: Vec<f32> = (0..n * k).map(|i| b[(i % k) * n + i / k]).collect();
        for (a, b) in [
            (Mat::new(&a, k), Mat::new(&b, n)),
            (Mat::new(&a_t, m).t(), Mat::new(&b, n)),
            (Mat::new(&a, k), Mat::new(&b_t, k).t()),
        ] {
            let mut out = vec![1.0; m * n];
            matmul(
                MatMut::strided(&mut out, n),
                a,
                b,
                true,
                Threads::One,
                Precision::F32,
            );
            for row in 0..m {
                for col in 0..n {
                    assert_eq!(out[row * n + col], expected(row, col) + 1.0);
                }
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
