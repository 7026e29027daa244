//! Products of f32 matrices in host memory, by a GEMM crate.

use std::marker::PhantomData;
use std::ops::Range;

use gemm::Parallelism;

/// A matrix operand: element (i, j) at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub col_stride: usize,
}

/// Some columns of a matrix result [rows, cols], borrowed exclusively. Other columns of the same
/// rows may be borrowed elsewhere.
pub(crate) struct Columns<'a> {
    data: *mut f32,
    row_stride: usize,
    rows: usize,
    cols: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it represents exclusive borrows of its pieces of rows, and these may be sent.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// All columns of a row-major matrix.
    ///
    /// # Panics
    /// If `data` doesn't hold `rows` rows of `cols`: a bug in the caller.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a result of {rows} x {cols}");
        Columns { data: data.as_mut_ptr(), row_stride: cols, rows, cols, borrow: PhantomData }
    }

    /// Splits into disjoint groups of `width` columns; the last one is narrower if `width` doesn't
    /// divide the number of columns.
    pub fn split(self, width: usize) -> Vec<Columns<'a>> {
        let group = |first: usize| Columns {
            // SAFETY: `first` is one of the columns, so this is within the first row.
            data: unsafe { self.data.add(first) },
            cols: width.min(self.cols - first),
            ..self
        };
        if self.rows == 0 { Vec::new() } else { (0..self.cols).step_by(width.max(1)).map(group).collect() }
    }

    /// The same columns of fewer rows.
    ///
    /// # Panics
    /// If these rows don't exist: a bug in the caller.
    pub fn rows(&mut self, rows: Range<usize>) -> Columns<'_> {
        assert!(rows.start < rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // SAFETY: `rows.start` is one of the rows, so this is within the borrowed matrix.
        Columns { data: unsafe { self.data.add(rows.start * self.row_stride) }, rows: rows.len(), ..*self }
    }

    /// These columns of one row.
    ///
    /// # Panics
    /// If the row doesn't exist.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the piece is within the borrowed matrix, and no other `Columns` holds it.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride), self.cols) }
    }

    /// Sets the columns to `scale * left * right`, or adds that if `add`. left is [rows, inner],
    /// right [inner, cols].
    ///
    /// # Panics
    /// If an operand is too short for its shape: a bug in the caller.
    pub fn product(
        &mut self,
        left: View<'_>,
        right: View<'_>,
        inner: usize,
        scale: f32,
        add: bool,
        parallelism: Parallelism,
    ) {
        let (rows, cols) = (self.rows, self.cols);
        if rows == 0 || cols == 0 {
            return;
        }
        let enough = |view: &View<'_>, rows: usize, cols: usize| {
            inner == 0 || view.data.len() > (rows - 1) * view.row_stride + (cols - 1) * view.col_stride
        };
        assert!(enough(&left, rows, inner), "left operand of {rows} x {inner}");
        assert!(enough(&right, inner, cols), "right operand of {inner} x {cols}");
        // SAFETY: the assertions bound every element of the operands that the strides reach; the
        // result's pieces of rows are borrowed exclusively.
        unsafe {
            gemm::gemm(
                rows,
                cols,
                inner,
                self.data,
                1,
                self.row_stride as isize,
                add,
                left.data.as_ptr(),
                left.col_stride as isize,
                left.row_stride as isize,
                right.data.as_ptr(),
                right.col_stride as isize,
                right.row_stride as isize,
                1.0,
                scale,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

/// Chooses the threads for a product with this many multiplications. Small products finish before
/// other threads could join.
pub(crate) fn parallelism(multiplications: usize) -> Parallelism {
    if multiplications > 1 << 18 { Parallelism::Rayon(0) } else { Parallelism::None }
}

/// Splits columns into groups of equal width: at most `most` wide, and at least one group per
/// thread if there are enough columns. Returns the width and the columns of each group.
pub(crate) fn panels(cols: usize, most: usize) -> (usize, impl Fn(usize) -> Range<usize>) {
    let count = cols.div_ceil(most).next_multiple_of(rayon::current_num_threads());
    let width = cols.div_ceil(count).next_multiple_of(8);
    (width, move |index| index * width..(index * width + width).min(cols))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_written_apart_and_added_to() {
        let mut result = vec![1.0; 3 * 5];
        let left: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let right: Vec<f32> = (0..10).map(|i| i as f32 * 0.5).collect();
        let left = View { data: &left, row_stride: 2, col_stride: 1 };
        for (index, mut columns) in Columns::new(&mut result, 3, 5).split(2).into_iter().enumerate() {
            let right = View { data: &right[2 * index..], row_stride: 5, col_stride: 1 };
            columns.product(left, right, 2, 2.0, index == 1, Parallelism::None);
            columns.row(0)[0] += 100.0;
        }
        let dot =
            |i: usize, j: usize| 2.0 * ((2 * i) as f32 * j as f32 * 0.5 + (2 * i + 1) as f32 * (5 + j) as f32 * 0.5);
        for i in 0..3 {
            for j in 0..5 {
                let before = if j / 2 == 1 { 1.0 } else { 0.0 };
                let mark = if i == 0 && j % 2 == 0 { 100.0 } else { 0.0 };
                assert_eq!(result[i * 5 + j], before + dot(i, j) + mark, "({i}, {j})");
            }
        }
    }

    #[test]
    fn panels_cover_every_column_once() {
        for cols in [1, 7, 8, 9, 100, 511, 4096, 14336] {
            let (width, range) = panels(cols, 512);
            let covered: Vec<usize> = (0..cols.div_ceil(width)).flat_map(range).collect();
            assert_eq!(covered, (0..cols).collect::<Vec<_>>());
        }
    }
}
