use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::matrix::element_count;
use crate::error::{Error, Result};

const OP: &str = "dense matrix";

/// Weights per scale of [`DenseData::Q8_0`].
pub(crate) const Q8_BLOCK: usize = 32;

/// A matrix of 8-, 16- or 32-bit weights, `rows` by `cols`, row-major: the unquantized matrices of
/// a 4-bit model (embeddings, norms, heads), or the base of a plain LoRA layer.
#[derive(Clone, PartialEq, Debug)]
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    data: DenseData,
}

/// The weights of a [`DenseMatrix`].
#[derive(Clone, PartialEq, Debug)]
pub enum DenseData {
    /// 32-bit values.
    F32(Vec<f32>),
    /// 16-bit IEEE values.
    F16(Vec<f16>),
    /// 16-bit brain floats.
    Bf16(Vec<bf16>),
    /// ggml's Q8_0: `w = code * scale` in blocks of 32 within a row (`cols` is a multiple of 32).
    Q8_0 {
        /// One code per weight.
        codes: Vec<i8>,
        /// One scale per block.
        scales: Vec<f16>,
    },
}

impl DenseMatrix {
    /// Checks the lengths in `data` against the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] for a length that does not fit, [`Error::Invalid`] if Q8_0 columns are not
    /// a multiple of 32 or `rows * cols` exceeds `usize`.
    pub fn new(rows: usize, cols: usize, data: DenseData) -> Result<Self> {
        let n = element_count(OP, rows, cols)?;
        let got = match &data {
            DenseData::F32(values) => values.len(),
            DenseData::F16(values) => values.len(),
            DenseData::Bf16(values) => values.len(),
            DenseData::Q8_0 { codes, scales } => {
                check_q8_cols(OP, cols)?;
                if scales.len() != n / Q8_BLOCK {
                    return Err(Error::shape(OP, "scales", n / Q8_BLOCK, scales.len()));
                }
                codes.len()
            }
        };
        if got != n {
            return Err(Error::shape(OP, "weights", format!("{rows} x {cols} = {n}"), got));
        }
        Ok(DenseMatrix { rows, cols, data })
    }

    /// Quantizes `rows` by `cols` row-major weights to Q8_0 by ggml's rule: `d = absmax / 127`,
    /// code = `w * (1 / d)` rounded half away from zero, and `d` stored as f16.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not `rows * cols` weights, [`Error::Invalid`] if `cols` is
    /// not a multiple of 32 or a scale is beyond f16 (a weight above 8.3 million),
    /// [`Error::NonFinite`] for the first NaN or infinite weight.
    pub fn quantize_q8_0(weights: &[f32], rows: usize, cols: usize) -> Result<Self> {
        const OP: &str = "quantize to Q8_0";
        let n = element_count(OP, rows, cols)?;
        check_q8_cols(OP, cols)?;
        if weights.len() != n {
            return Err(Error::shape(OP, "weights", format!("{rows} x {cols} = {n}"), weights.len()));
        }
        if let Some(index) = weights.iter().position(|w| !w.is_finite()) {
            return Err(Error::NonFinite { op: OP, index, value: weights[index] });
        }
        let mut codes = vec![0; n];
        let mut scales = vec![f16::ZERO; n / Q8_BLOCK];
        codes
            .par_chunks_mut(Q8_BLOCK)
            .zip(weights.par_chunks(Q8_BLOCK))
            .zip(&mut scales)
            .for_each(|((codes, weights), scale)| *scale = encode_q8_0(weights, codes));
        if let Some(block) = scales.iter().position(|scale| scale.is_infinite()) {
            return Err(Error::invalid(
                OP,
                "scale",
                format!("beyond f16 in the block at flat index {}", block * Q8_BLOCK),
                "expected weights of magnitude below 8.3e6",
            ));
        }
        Self::new(rows, cols, DenseData::Q8_0 { codes, scales })
    }

    /// Rows (output features of a linear layer).
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (input features of a linear layer).
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The weights as stored.
    pub(crate) fn data(&self) -> &DenseData {
        &self.data
    }

    /// The weight at flat index `i = row * cols + col`.
    ///
    /// # Panics
    /// If `i` is out of range.
    #[cfg(test)]
    pub(crate) fn get(&self, i: usize) -> f32 {
        match &self.data {
            DenseData::F32(values) => values[i],
            DenseData::F16(values) => values[i].to_f32(),
            DenseData::Bf16(values) => values[i].to_f32(),
            DenseData::Q8_0 { codes, scales } => f32::from(codes[i]) * scales[i / Q8_BLOCK].to_f32(),
        }
    }

    /// Returns all weights as f32, row-major. Runs in parallel.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        let row_len = self.cols.max(1);
        out.par_chunks_mut(row_len).enumerate().for_each(|(row, out)| self.dequantize_rows(row..row + 1, out));
        out
    }

    /// Writes the weights of `rows` as f32, row-major, to `out`, which has `rows.len() * cols`
    /// values. Runs on the calling thread.
    ///
    /// # Panics
    /// If `rows` is out of range or `out` has another length.
    pub(crate) fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.cols, "rows {rows:?} of {} columns", self.cols);
        self.dequantize_flat(rows.start * self.cols, out);
    }

    /// Writes the weights from flat index `start` on as f32, as many as `out` holds. Runs on the
    /// calling thread.
    ///
    /// # Panics
    /// If there are fewer weights.
    pub(crate) fn dequantize_flat(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match &self.data {
            DenseData::F32(values) => out.copy_from_slice(&values[range]),
            DenseData::F16(values) => values[range].convert_to_f32_slice(out),
            DenseData::Bf16(values) => values[range].convert_to_f32_slice(out),
            DenseData::Q8_0 { codes, scales } => {
                for (i, (out, &code)) in (start..).zip(out.iter_mut().zip(&codes[range])) {
                    *out = f32::from(code) * scales[i / Q8_BLOCK].to_f32();
                }
            }
        }
    }

    /// Bytes of the weights in host memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.data {
            DenseData::F32(values) => size_of_val(&values[..]),
            DenseData::F16(values) => size_of_val(&values[..]),
            DenseData::Bf16(values) => size_of_val(&values[..]),
            DenseData::Q8_0 { codes, scales } => codes.len() + size_of_val(&scales[..]),
        }
    }
}

/// Encodes one block of finite weights and returns its scale.
pub(crate) fn encode_q8_0(weights: &[f32], codes: &mut [i8]) -> f16 {
    let d = weights.iter().fold(0.0_f32, |max, w| max.max(w.abs())) / 127.0;
    let reciprocal = if d == 0.0 { 0.0 } else { 1.0 / d };
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = (w * reciprocal).round() as i8;
    }
    f16::from_f32(d)
}

fn check_q8_cols(op: &'static str, cols: usize) -> Result<()> {
    if cols.is_multiple_of(Q8_BLOCK) {
        return Ok(());
    }
    Err(Error::invalid(op, "number of columns", cols, format!("Q8_0 needs a multiple of {Q8_BLOCK}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin() * 3.0).collect()
    }

    #[test]
    fn every_type_reads_back_alike() {
        let values = ramp(3 * 64);
        let halves = values.iter().map(|&v| f16::from_f32(v)).collect();
        let brains = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let q8 = DenseMatrix::quantize_q8_0(&values, 3, 64).unwrap();
        let of = |data| DenseMatrix::new(3, 64, data).unwrap();
        let matrices = [
            (of(DenseData::F32(values.clone())), 4 * 192, 0.0),
            (of(DenseData::F16(halves)), 2 * 192, 3.0 / 2048.0),
            (of(DenseData::Bf16(brains)), 2 * 192, 3.0 / 256.0),
            (q8, 192 + 2 * 6, 3.0 / 254.0 + 3.0 / 2048.0),
        ];
        for (matrix, bytes, bound) in matrices {
            assert_eq!((matrix.rows(), matrix.cols(), matrix.bytes()), (3, 64, bytes));
            let all = matrix.to_f32();
            for (i, (got, expected)) in all.iter().zip(&values).enumerate() {
                assert!((got - expected).abs() <= bound, "{i}: {got} {expected}");
                assert_eq!(matrix.get(i), *got);
            }
            let mut rows = [0.0; 128];
            matrix.dequantize_rows(1..3, &mut rows);
            assert_eq!(rows, all[64..]);
        }
    }

    #[test]
    fn q8_0_follows_ggml() {
        let mut values = [0.0; 64];
        values[..4].copy_from_slice(&[127.0, -127.0, 0.5, -0.5]);
        let matrix = DenseMatrix::quantize_q8_0(&values, 1, 64).unwrap();
        let DenseData::Q8_0 { codes, scales } = matrix.data() else { panic!("not Q8_0") };
        assert_eq!((&codes[..4], &scales[..]), (&[127, -127, 1, -1][..], &[f16::ONE, f16::ZERO][..]));
    }

    #[test]
    fn lengths_that_do_not_fit_are_errors() {
        let error = |rows, cols, data| DenseMatrix::new(rows, cols, data).unwrap_err().to_string();
        assert_eq!(error(2, 3, DenseData::F32(vec![0.0; 5])), "dense matrix: weights: expected 2 x 3 = 6, got 5");
        assert_eq!(
            error(usize::MAX, 2, DenseData::F16(vec![])),
            "dense matrix: shape is 18446744073709551615 x 2; the number of weights does not fit in memory"
        );
        let q8 = |codes, scales| DenseData::Q8_0 { codes: vec![0; codes], scales: vec![f16::ONE; scales] };
        assert!(error(1, 33, q8(33, 2)).contains("multiple of 32"));
        assert!(error(2, 32, q8(64, 1)).contains("scales: expected 2, got 1"));
        assert!(error(2, 32, q8(63, 2)).contains("weights: expected 2 x 32 = 64, got 63"));
    }

    #[test]
    fn weights_that_q8_0_cannot_hold_are_errors() {
        let error = |values: &[f32], cols| DenseMatrix::quantize_q8_0(values, 1, cols).unwrap_err();
        assert!(matches!(error(&[0.0; 31], 31), Error::Invalid { .. }));
        assert!(matches!(error(&[0.0; 31], 32), Error::Shape { .. }));
        let mut values = [1.0; 64];
        values[40] = f32::NAN;
        assert!(matches!(error(&values, 64), Error::NonFinite { index: 40, .. }));
        values[40] = 1e7;
        assert!(error(&values, 64).to_string().contains("flat index 32"));
    }
}
