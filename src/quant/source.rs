use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::Dtype;

/// Borrowed weights to quantize, in any of the types that model files use.
///
/// Values are converted to `f32` first, which is exact for all three.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// 32-bit values.
    F32(&'a [f32]),
    /// 16-bit IEEE values.
    F16(&'a [f16]),
    /// 16-bit brain floats.
    Bf16(&'a [bf16]),
    /// Values of a type as little-endian bytes, which need not be aligned.
    Bytes(Dtype, &'a [u8]),
}

impl Source<'_> {
    /// The type of the values.
    pub(crate) fn dtype(&self) -> Dtype {
        match self {
            Source::F32(_) => Dtype::F32,
            Source::F16(_) => Dtype::F16,
            Source::Bf16(_) => Dtype::Bf16,
            Source::Bytes(dtype, _) => *dtype,
        }
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        match self {
            Source::F32(values) => values.len(),
            Source::F16(values) => values.len(),
            Source::Bf16(values) => values.len(),
            Source::Bytes(dtype, bytes) => bytes.len() / dtype.bytes(),
        }
    }

    /// Returns the values of `range` as f32, borrowed if possible, else converted into `buffer`.
    pub(super) fn as_f32<'b>(&'b self, range: Range<usize>, buffer: &'b mut Vec<f32>) -> &'b [f32] {
        buffer.resize(range.len(), 0.0);
        match self {
            Source::F32(values) => return &values[range],
            Source::F16(values) => values[range].convert_to_f32_slice(buffer),
            Source::Bf16(values) => values[range].convert_to_f32_slice(buffer),
            Source::Bytes(dtype, bytes) => {
                let size = dtype.bytes();
                let values = bytes[range.start * size..range.end * size].chunks_exact(size);
                for (out, value) in buffer.iter_mut().zip(values) {
                    *out = match *value {
                        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                        [a, b] if *dtype == Dtype::Bf16 => bf16::from_le_bytes([a, b]).to_f32(),
                        [a, b] => f16::from_le_bytes([a, b]).to_f32(),
                        _ => unreachable!("values of {size} bytes"),
                    };
                }
            }
        }
        buffer
    }
}

impl<'a> From<&'a [f32]> for Source<'a> {
    fn from(values: &'a [f32]) -> Self {
        Source::F32(values)
    }
}

impl<'a> From<&'a [f16]> for Source<'a> {
    fn from(values: &'a [f16]) -> Self {
        Source::F16(values)
    }
}

impl<'a> From<&'a [bf16]> for Source<'a> {
    fn from(values: &'a [bf16]) -> Self {
        Source::Bf16(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_convert_exactly() {
        let values = [1.0, -0.333_251_95, 6.1e-5, f32::INFINITY].map(f16::from_f32);
        let source = Source::from(&values[..]);
        let mut buffer = Vec::new();
        assert_eq!(source.as_f32(1..4, &mut buffer), [1, 2, 3].map(|i| values[i].to_f32()));
        assert_eq!((source.len(), source.dtype()), (4, Dtype::F16));
    }

    #[test]
    fn unaligned_bytes_are_the_same_values() {
        let values = [1.5_f32, -2.0, 3.25, 0.125];
        let bytes = |size: usize, one: fn(f32) -> Vec<u8>| {
            let mut bytes = vec![0; 1];
            bytes.extend(values.iter().flat_map(|&value| one(value)));
            assert_eq!(bytes.len(), 1 + 4 * size);
            bytes
        };
        for (dtype, bytes) in [
            (Dtype::F32, bytes(4, |v| v.to_le_bytes().into())),
            (Dtype::F16, bytes(2, |v| f16::from_f32(v).to_le_bytes().into())),
            (Dtype::Bf16, bytes(2, |v| bf16::from_f32(v).to_le_bytes().into())),
        ] {
            let source = Source::Bytes(dtype, &bytes[1..]);
            assert_eq!((source.len(), source.dtype()), (4, dtype));
            assert_eq!(source.as_f32(1..4, &mut Vec::new()), &values[1..]);
        }
    }
}
