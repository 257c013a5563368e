//! Strided views of matrices, which products read and write.

/// A strided view of an f32 matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix (rows x cols) whose rows begin `row_stride` values apart.
    pub fn strided(values: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self {
            values,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// A contiguous row-major matrix of `cols` columns. The number of rows follows from the length
    /// of `values`.
    pub fn new(values: &'a [f32], cols: usize) -> Self {
        Self::strided(values, values.len() / cols.max(1), cols, cols)
    }

    /// Number of values from the first element to the last, including the gaps between rows.
    pub(crate) fn span(&self) -> usize {
        span(self.rows, self.cols, self.row_stride, self.col_stride)
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
    pub(crate) values: &'a mut [f32],
    pub(crate) row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A matrix whose rows begin `row_stride` values apart.
    pub fn strided(values: &'a mut [f32], row_stride: usize) -> Self {
        Self { values, row_stride }
    }

    /// A contiguous matrix of `cols` columns.
    pub fn new(values: &'a mut [f32], cols: usize) -> Self {
        Self::strided(values, cols)
    }
}

/// Number of threads that a product uses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread only.
    One,
    /// All threads of the rayon pool.
    All,
}

/// Number of values that a (rows x cols) matrix with these strides spans, including the gaps between rows.
pub(crate) fn span(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    (rows - 1) * row_stride + (cols - 1) * col_stride + 1
}
