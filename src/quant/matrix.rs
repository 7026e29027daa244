use std::ops::Range;

use rayon::prelude::*;

use super::encode::{DoubleQuant, QuantOptions, encode};
use super::{Codebook, DoubleScales, Dtype, Format, Scales, Source};
use crate::error::{Error, Result};

const OP: &str = "quantized matrix";

/// Weights per parallel task of [`QuantizedMatrix::dequantize`].
const TASK: usize = 1 << 14;

/// A matrix of 4-bit weights, `rows` by `cols`, row-major:
///
/// ```text
/// w[i] = codebook[nibble(i)] * scale[i / block] (+ min[i / block])
/// ```
///
/// Blocks run over the flat index `i = row * cols + col` and may cross row ends; the last may be
/// short. Each byte holds two codes, the first in the high nibble.
#[derive(Clone, PartialEq, Debug)]
pub struct QuantizedMatrix {
    parts: Parts,
    /// Both codebook values for every byte: one lookup decodes two weights.
    pairs: Box<[[f32; 2]; 256]>,
}

/// The components of a [`QuantizedMatrix`].
#[derive(Clone, PartialEq, Debug)]
pub struct Parts {
    /// The format that the codes came from.
    pub format: Format,
    /// Rows (output features of a linear layer).
    pub rows: usize,
    /// Columns (input features of a linear layer).
    pub cols: usize,
    /// `ceil(rows * cols / 2)` bytes; the unused low nibble of an odd length can be anything.
    pub codes: Vec<u8>,
    /// The values that codes stand for.
    pub codebook: Codebook,
    /// Weights per scale: a power of two in 32..=4096.
    pub block: usize,
    /// `ceil(rows * cols / block)` scales.
    pub scales: Scales,
    /// The same number of minima, for formats that have them.
    pub mins: Option<Scales>,
    /// Type of the original weights.
    pub dtype: Dtype,
}

impl QuantizedMatrix {
    /// Checks `parts` and makes a matrix from them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a block that is not a power of two in 32..=4096, a codebook that is
    /// not finite, a `super_block` of 0, or `rows * cols` beyond `usize`; [`Error::Shape`] for a
    /// length that does not fit the shape; [`Error::NonFinite`] for a scale or minimum (the index
    /// is its block).
    pub(crate) fn from_parts(parts: Parts) -> Result<Self> {
        let n = element_count(OP, parts.rows, parts.cols)?;
        check_block(OP, parts.block)?;
        check_len("bytes of codes", n.div_ceil(2), parts.codes.len())?;
        if parts.codebook.0.iter().any(|v| !v.is_finite()) {
            return Err(Error::invalid(OP, "codebook", format!("{:?}", parts.codebook.0), "expected finite values"));
        }
        let blocks = n.div_ceil(parts.block);
        check_scales("scales", blocks, &parts.scales)?;
        if let Some(mins) = &parts.mins {
            check_scales("minima", blocks, mins)?;
        }
        let values = parts.codebook.0;
        let pairs = Box::new(std::array::from_fn(|byte| [values[byte >> 4], values[byte & 0xf]]));
        Ok(QuantizedMatrix { parts, pairs })
    }

    /// Quantizes `rows` by `cols` row-major weights, in parallel. Nibbles are computed with the
    /// scales before double quantization.
    ///
    /// # Errors
    /// [`Error::Shape`] if `source` doesn't have `rows * cols` values, [`Error::Invalid`] for a
    /// block that is not a power of two in 32..=4096 or a format that is only read,
    /// [`Error::NonFinite`] for the first NaN or infinite weight.
    pub fn quantize(source: Source<'_>, rows: usize, cols: usize, options: &QuantOptions) -> Result<Self> {
        const OP: &str = "quantize";
        let n = element_count(OP, rows, cols)?;
        if source.len() != n {
            return Err(Error::shape(OP, "weights", format!("{rows} x {cols} = {n}"), source.len()));
        }
        let QuantOptions { format, block, double } = *options;
        check_block(OP, block)?;
        if !Format::QUANTIZERS.contains(&format) {
            return Err(Error::invalid(OP, "format", format, "it is only read from files; expected nf4, fp4 or int4"));
        }
        let (codes, scales) = encode(source, format, block).map_err(|index| Error::NonFinite {
            op: OP,
            index,
            value: source.as_f32(index..index + 1, &mut Vec::new())[0],
        })?;
        let scales = match double {
            DoubleQuant::None => Scales::Plain(scales),
            DoubleQuant::Dynamic => Scales::Double(DoubleScales::dynamic(&scales)),
            DoubleQuant::Linear => Scales::Double(DoubleScales::linear(&scales)),
        };
        let (codebook, dtype) = (format.codebook(), source.dtype());
        Self::from_parts(Parts { format, rows, cols, codes, codebook, block, scales, mins: None, dtype })
    }

    /// The format that the codes came from.
    pub fn format(&self) -> Format {
        self.parts.format
    }

    /// Rows (output features of a linear layer).
    pub fn rows(&self) -> usize {
        self.parts.rows
    }

    /// Columns (input features of a linear layer).
    pub fn cols(&self) -> usize {
        self.parts.cols
    }

    /// Number of weights, `rows * cols`.
    pub fn len(&self) -> usize {
        self.parts.rows * self.parts.cols
    }

    /// Whether there are no weights.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The packed codes, `ceil(len / 2)` bytes, the first of two in the high nibble.
    pub fn codes(&self) -> &[u8] {
        &self.parts.codes
    }

    /// The values that codes stand for.
    pub fn codebook(&self) -> &Codebook {
        &self.parts.codebook
    }

    /// Weights per scale: a power of two in 32..=4096.
    pub(crate) fn block(&self) -> usize {
        self.parts.block
    }

    /// One scale per block.
    pub fn scales(&self) -> &Scales {
        &self.parts.scales
    }

    /// One minimum per block, for formats that have them.
    pub(crate) fn mins(&self) -> Option<&Scales> {
        self.parts.mins.as_ref()
    }

    /// Type of the original weights.
    pub fn dtype(&self) -> Dtype {
        self.parts.dtype
    }

    /// The parts that the matrix consists of.
    #[cfg(test)]
    pub(crate) fn into_parts(self) -> Parts {
        self.parts
    }

    /// The code (0..=15) of the weight at flat index `i`.
    ///
    /// # Panics
    /// If `i` is out of range.
    pub(crate) fn code(&self, i: usize) -> u8 {
        assert!(i < self.len(), "index {i} of {} weights", self.len());
        let byte = self.codes()[i / 2];
        if i.is_multiple_of(2) { byte >> 4 } else { byte & 0xf }
    }

    /// The weight at flat index `i`.
    ///
    /// # Panics
    /// If `i` is out of range.
    #[cfg(test)]
    pub(crate) fn get(&self, i: usize) -> f32 {
        let b = i / self.block();
        let w = self.codebook().0[usize::from(self.code(i))] * self.scales().get(b);
        self.mins().map_or(w, |mins| w + mins.get(b))
    }

    /// Returns all weights, row-major. Runs in parallel.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        out.par_chunks_mut(TASK).enumerate().for_each(|(task, out)| self.dequantize_flat(task * TASK, out));
        out
    }

    /// Writes the weights of `rows`, row-major, to `out`, which has `rows.len() * cols` values.
    /// Runs on the calling thread.
    ///
    /// # Panics
    /// If `rows` is out of range or `out` has another length.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(rows.end <= self.rows(), "rows {rows:?} of {}", self.rows());
        assert_eq!(out.len(), rows.len() * self.cols(), "rows {rows:?} of {} columns", self.cols());
        self.dequantize_flat(rows.start * self.cols(), out);
    }

    /// Writes the weights from flat index `start` on, as many as `out` holds. Runs on the calling
    /// thread.
    ///
    /// # Panics
    /// If they are not all in range.
    pub(crate) fn dequantize_flat(&self, mut start: usize, mut out: &mut [f32]) {
        while !out.is_empty() {
            let b = start / self.block();
            let len = out.len().min((b + 1) * self.block() - start);
            let (head, tail) = out.split_at_mut(len);
            let scale = self.scales().get(b);
            match self.mins().map(|mins| mins.get(b)) {
                None => self.decode_block(start, head, |v| v * scale),
                Some(min) => self.decode_block(start, head, |v| v * scale + min),
            }
            start += len;
            out = tail;
        }
    }

    /// Bytes of codes, scales, minima and tables in host memory.
    pub fn bytes(&self) -> usize {
        let scales: usize = self.all_scales().map(Scales::bytes).sum();
        self.codes().len() + scales + size_of::<Codebook>() + size_of_val(&*self.pairs)
    }

    /// Bits per weight for codes and stored scales, without the 16- and 256-entry tables, which
    /// are constants of the format: 4.127 for a large matrix of double-quantized NF4.
    pub fn bits_per_weight(&self) -> f64 {
        let scales: usize = self.all_scales().map(Scales::stored_bytes).sum();
        8.0 * (self.codes().len() + scales) as f64 / self.len().max(1) as f64
    }

    fn all_scales(&self) -> impl Iterator<Item = &Scales> {
        std::iter::once(self.scales()).chain(self.mins())
    }

    /// Like [`dequantize_flat`](Self::dequantize_flat) within a block; `value` scales a codebook
    /// entry.
    #[inline]
    fn decode_block(&self, start: usize, out: &mut [f32], value: impl Fn(f32) -> f32) {
        let table = &*self.pairs;
        let mut bytes = &self.codes()[start / 2..(start + out.len()).div_ceil(2)];
        let (first, rest) = out.split_at_mut(start % 2);
        if let ([first], [byte, tail @ ..]) = (first, bytes) {
            *first = value(table[usize::from(*byte)][1]);
            bytes = tail;
        }
        let (pairs, last) = rest.as_chunks_mut::<2>();
        for (out, &byte) in pairs.iter_mut().zip(bytes) {
            let [first, second] = table[usize::from(byte)];
            *out = [value(first), value(second)];
        }
        if let ([last], [.., byte]) = (last, bytes) {
            *last = value(table[usize::from(*byte)][0]);
        }
    }
}

/// Returns `rows * cols`, if it fits.
pub(super) fn element_count(op: &'static str, rows: usize, cols: usize) -> Result<usize> {
    rows.checked_mul(cols).ok_or_else(|| {
        Error::invalid(op, "shape", format!("{rows} x {cols}"), "the number of weights does not fit in memory")
    })
}

fn check_block(op: &'static str, block: usize) -> Result<()> {
    if block.is_power_of_two() && (32..=4096).contains(&block) {
        return Ok(());
    }
    Err(Error::invalid(op, "block", block, "expected a power of two in 32..=4096"))
}

fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::shape(OP, what, expected, got))
}

fn check_scales(what: &'static str, blocks: usize, scales: &Scales) -> Result<()> {
    check_len(what, blocks, scales.len())?;
    if let Scales::Double(double) = scales {
        if double.super_block == 0 {
            return Err(Error::invalid(OP, "super_block", 0, "expected at least 1"));
        }
        check_len("super-scales", blocks.div_ceil(double.super_block), double.supers.len())?;
    }
    match (0..blocks).map(|b| (b, scales.get(b))).find(|(_, scale)| !scale.is_finite()) {
        Some((index, value)) => Err(Error::NonFinite { op: OP, index, value }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 3 x 43 matrix in blocks of 32 that cross rows, with minima.
    fn parts() -> Parts {
        let (rows, cols) = (3, 43);
        Parts {
            format: Format::Nf4,
            rows,
            cols,
            codes: (0..65_u8).map(|i| i.wrapping_mul(37)).collect(),
            codebook: Codebook::NF4,
            block: 32,
            scales: Scales::Plain(vec![0.5, 2.0, 3.0, 0.25, 1.0]),
            mins: Some(Scales::Plain(vec![0.0, -1.0, 0.125, 7.0, -0.5])),
            dtype: Dtype::F32,
        }
    }

    fn error(change: impl FnOnce(&mut Parts)) -> String {
        let mut parts = parts();
        change(&mut parts);
        QuantizedMatrix::from_parts(parts).unwrap_err().to_string()
    }

    #[test]
    fn every_reader_follows_the_formula() {
        let parts = parts();
        let matrix = QuantizedMatrix::from_parts(parts.clone()).unwrap();
        let (Scales::Plain(scales), Some(Scales::Plain(mins))) = (&parts.scales, &parts.mins) else {
            panic!("not plain")
        };
        let expected: Vec<f32> = (0..3 * 43)
            .map(|i| {
                let nibble = (parts.codes[i / 2] >> (4 * (1 - i % 2))) & 0xf;
                parts.codebook.0[usize::from(nibble)] * scales[i / 32] + mins[i / 32]
            })
            .collect();
        assert_eq!(matrix.dequantize(), expected);
        assert!((0..3 * 43).all(|i| matrix.get(i) == expected[i]));
        for (first, end) in [(0, 0), (0, 1), (1, 2), (1, 3), (2, 3), (3, 3)] {
            let mut out = vec![f32::NAN; (end - first) * 43];
            matrix.dequantize_rows(first..end, &mut out);
            assert_eq!(out, expected[first * 43..end * 43], "{first}..{end}");
        }
        assert_eq!(matrix.into_parts(), parts);
    }

    #[test]
    fn parts_that_do_not_fit_are_errors() {
        assert!(error(|p| p.codes.truncate(64)).contains("bytes of codes: expected 65, got 64"));
        assert!(error(|p| p.codes.push(0)).contains("bytes of codes: expected 65, got 66"));
        assert!(error(|p| p.scales = Scales::Plain(vec![1.0; 4])).contains("scales: expected 5, got 4"));
        assert!(error(|p| p.mins = Some(Scales::Plain(vec![1.0; 6]))).contains("minima: expected 5, got 6"));
        for block in [0, 16, 33, 8192] {
            assert!(error(|p| p.block = block).contains(&format!("block is {block};")));
        }
        assert_eq!(
            error(|p| p.rows = usize::MAX),
            "quantized matrix: shape is 18446744073709551615 x 43; the number of weights does not fit in memory"
        );
        assert_eq!(
            error(|p| p.codebook.0[3] = f32::NAN),
            "quantized matrix: codebook is [-1.0, -0.6961928, -0.52507305, NaN, -0.28444138, -0.18477343, \
             -0.091050036, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]; \
             expected finite values"
        );
        let double = |change: fn(&mut DoubleScales)| {
            error(|p| {
                let mut double = DoubleScales::dynamic(&[1.0, 2.0, 3.0, 4.0, 5.0]);
                change(&mut double);
                p.scales = Scales::Double(double);
            })
        };
        assert!(double(|d| d.super_block = 0).contains("super_block is 0"));
        assert!(double(|d| d.super_block = 4).contains("super-scales: expected 2, got 1"));
        assert!(double(|d| d.codes.truncate(3)).contains("scales: expected 5, got 3"));
        assert!(double(|d| d.supers[0] = f32::INFINITY).contains("flat index 0"));
    }

    #[test]
    fn a_scale_that_is_not_finite_is_named() {
        let mut parts = parts();
        parts.mins = Some(Scales::Plain(vec![0.0, 0.0, f32::NAN, 0.0, f32::NAN]));
        let error = QuantizedMatrix::from_parts(parts).unwrap_err();
        assert!(matches!(error, Error::NonFinite { index: 2, .. }), "{error}");
    }

    #[test]
    fn bad_sources_are_errors() {
        let quantize = |values: &[f32], options| QuantizedMatrix::quantize(values.into(), 2, 50, &options);
        let error = quantize(&[0.0; 99], QuantOptions::nf4()).unwrap_err();
        assert_eq!(error.to_string(), "quantize: weights: expected 2 x 50 = 100, got 99");
        let error = quantize(&[0.0; 100], QuantOptions::nf4().block(0)).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "block", .. }), "{error}");
        let error = quantize(&[0.0; 100], QuantOptions { format: Format::Q4K, ..QuantOptions::nf4() }).unwrap_err();
        assert!(error.to_string().contains("format is q4_k; it is only read"), "{error}");
        let mut values = [0.5; 100];
        values[70] = f32::NEG_INFINITY;
        let error = quantize(&values, QuantOptions::int4()).unwrap_err();
        assert!(matches!(error, Error::NonFinite { index: 70, value: f32::NEG_INFINITY, .. }), "{error}");
        assert_eq!(
            QuantizedMatrix::quantize((&[][..] as &[f32]).into(), usize::MAX, 2, &QuantOptions::nf4())
                .unwrap_err()
                .to_string(),
            "quantize: shape is 18446744073709551615 x 2; the number of weights does not fit in memory"
        );
    }

    #[test]
    fn an_empty_matrix_is_no_trouble() {
        for options in [QuantOptions::nf4(), QuantOptions::fp4().double_quant(), QuantOptions::int4().double_quant()] {
            let matrix = QuantizedMatrix::quantize(Source::F32(&[]), 0, 5, &options).unwrap();
            assert!(matrix.is_empty() && matrix.dequantize().is_empty());
        }
    }

    #[test]
    fn double_quantized_nf4_takes_4_127_bits() {
        let values: Vec<f32> = (0..1024 * 1024).map(|i| (i as f32).sin()).collect();
        let matrix = |options| QuantizedMatrix::quantize(values[..].into(), 1024, 1024, &options).unwrap();
        assert_eq!(matrix(QuantOptions::nf4()).bits_per_weight(), 4.5);
        let double = matrix(QuantOptions::nf4().double_quant());
        assert_eq!(format!("{:.3}", double.bits_per_weight()), "4.127");
        assert_eq!(double.bytes(), 524_288 + (16_384 + 1024 + 4 * 64 + 4) + 64 + 2048);
    }
}
