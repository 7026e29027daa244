//! Matrices in host memory, 4-bit or dense. Both are decoded the same way.

use std::ops::Range;

use super::{DenseMatrix, QuantizedMatrix};

/// A matrix in host memory: 4-bit, or dense in its own precision.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "200 bytes do not matter beside megabytes of weights")]
pub enum HostMatrix {
    /// The canonical 4-bit matrix.
    Quantized(QuantizedMatrix),
    /// f32, f16, bf16 or Q8_0.
    Dense(DenseMatrix),
}

impl From<QuantizedMatrix> for HostMatrix {
    fn from(matrix: QuantizedMatrix) -> Self {
        HostMatrix::Quantized(matrix)
    }
}

impl From<DenseMatrix> for HostMatrix {
    fn from(matrix: DenseMatrix) -> Self {
        HostMatrix::Dense(matrix)
    }
}

impl HostMatrix {
    /// N, number of rows.
    pub fn rows(&self) -> usize {
        match self {
            HostMatrix::Quantized(matrix) => matrix.rows(),
            HostMatrix::Dense(matrix) => matrix.rows(),
        }
    }

    /// K, number of columns.
    pub fn cols(&self) -> usize {
        match self {
            HostMatrix::Quantized(matrix) => matrix.cols(),
            HostMatrix::Dense(matrix) => matrix.cols(),
        }
    }

    /// Bytes in host memory.
    pub fn bytes(&self) -> usize {
        match self {
            HostMatrix::Quantized(matrix) => matrix.bytes(),
            HostMatrix::Dense(matrix) => matrix.bytes(),
        }
    }

    /// Decodes whole rows into `out`, row-major f32.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            HostMatrix::Quantized(matrix) => matrix.dequantize_rows(rows, out),
            HostMatrix::Dense(matrix) => matrix.dequantize_rows(rows, out),
        }
    }

    /// Decodes columns `cols` of `rows` into the start of `out`, with a row stride of
    /// `cols.len()`.
    pub(crate) fn dequantize_tile(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_mut(cols.len())) {
            let start = row * self.cols() + cols.start;
            match self {
                HostMatrix::Quantized(matrix) => matrix.dequantize_flat(start, out),
                HostMatrix::Dense(matrix) => matrix.dequantize_flat(start, out),
            }
        }
    }
}
