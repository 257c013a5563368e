//! TODO

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

    /// How many values it spans.
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
    pub fn strided(values: &'a mut [f32], row_stride: usize) -> Self {
        Self { values, row_stride }
    }

    /// A matrix of `cols` columns without gaps.
    pub fn new(values: &'a mut [f32], cols: usize) -> Self {
        Self::strided(values, cols)
    }
}

/// Whether a product spreads over the threads of the pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    One,
    All,
}

/// How many values a (rows x cols) matrix with these strides spans.
pub(crate) fn span(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    (rows - 1) * row_stride + (cols - 1) * col_stride + 1
}
