//! Converts blocks of ggml's types to matrices. Values are bit-identical to those of ggml's own
//! dequantizers.

use half::f16;
use rayon::prelude::*;

use super::TensorType;
use super::k_quants::{self, half};
use crate::error::Result;
use crate::formats::checkpoint::BaseFormat;
use crate::formats::safetensors::{Floats, values};
use crate::quant::{DenseData, DenseMatrix, DoubleScales, Dtype, Format, Parts, Q8_BLOCK, QuantizedMatrix, Scales};
use crate::quant::{HostMatrix, MatrixKind, ScaleKind};

/// Weights per scale in all of ggml's 4-bit types.
const BLOCK: usize = 32;

/// Blocks per super-scale, in types that have super-scales.
const SUPER_BLOCK: usize = 8;

/// Converts `bytes` of this type to a matrix: 4-bit if the type is, otherwise in the format
/// `base`. `None` for an unsupported type.
pub(super) fn matrix(
    kind: TensorType,
    bytes: &[u8],
    rows: usize,
    cols: usize,
    base: &BaseFormat,
) -> Result<Option<HostMatrix>> {
    if let Some(format) = four_bit_format(kind) {
        return four_bit(kind, format, bytes, rows, cols).map(|matrix| Some(matrix.into()));
    }
    let floats = match kind {
        TensorType::F32 => Floats::F32(values(bytes)),
        TensorType::F16 => Floats::F16(values(bytes)),
        TensorType::Bf16 => Floats::Bf16(values(bytes)),
        TensorType::Q8_0 => {
            let matrix = DenseMatrix::new(rows, cols, q8_0(bytes))?;
            if *base == BaseFormat::AsIs {
                return Ok(Some(matrix.into()));
            }
            Floats::F32(matrix.to_f32().into())
        }
        _ => match k_quants::decoder(kind) {
            Some(decode) => {
                let mut out = vec![0.0; rows * cols];
                let blocks = bytes.par_chunks_exact(kind.block_bytes());
                out.par_chunks_exact_mut(kind.block()).zip(blocks).for_each(|(out, block)| decode(block, out));
                Floats::F32(out.into())
            }
            None => return Ok(None),
        },
    };
    base.matrix(floats, rows, cols).map(Some)
}

impl TensorType {
    /// Whether tensors of this type can be loaded.
    pub fn is_read(self) -> bool {
        matrix_kind(self, &BaseFormat::AsIs).is_some()
    }
}

/// Returns how [`matrix`] stores values of this type.
pub(super) fn matrix_kind(kind: TensorType, base: &BaseFormat) -> Option<MatrixKind> {
    if four_bit_format(kind).is_some() {
        let double = ScaleKind::Double { super_block: SUPER_BLOCK };
        let (scales, mins) = match kind {
            TensorType::Q4_1 => (ScaleKind::Plain, Some(ScaleKind::Plain)),
            TensorType::Q4K => (double, Some(double)),
            TensorType::Iq4Xs => (double, None),
            _ => (ScaleKind::Plain, None),
        };
        return Some(MatrixKind::Quantized { block: BLOCK, scales, mins });
    }
    let stored = match kind {
        TensorType::F16 | TensorType::Bf16 => MatrixKind::Half,
        TensorType::Q8_0 => MatrixKind::Q8_0,
        TensorType::F32 => MatrixKind::F32,
        _ => k_quants::decoder(kind).map(|_| MatrixKind::F32)?,
    };
    Some(base.kind(stored))
}

fn four_bit_format(kind: TensorType) -> Option<Format> {
    Some(match kind {
        TensorType::Q4_0 => Format::Q4_0,
        TensorType::Q4_1 => Format::Q4_1,
        TensorType::Q4K => Format::Q4K,
        TensorType::Iq4Nl => Format::Iq4Nl,
        TensorType::Iq4Xs => Format::Iq4Xs,
        TensorType::Mxfp4 => Format::Mxfp4,
        _ => return None,
    })
}

fn four_bit(kind: TensorType, format: Format, bytes: &[u8], rows: usize, cols: usize) -> Result<QuantizedMatrix> {
    let code_bytes = kind.block() / 2;
    let header = kind.block_bytes() - code_bytes;
    // Low nibbles are the first half of this many weights, high nibbles the second half.
    let group = if kind == TensorType::Q4K { 2 * BLOCK } else { BLOCK };
    let mut codes = vec![0; rows * cols / 2];
    codes.par_chunks_exact_mut(code_bytes).zip(bytes.par_chunks_exact(kind.block_bytes())).for_each(|(out, block)| {
        let groups = block[header..].chunks_exact(group / 2);
        out.chunks_exact_mut(group / 2).zip(groups).for_each(|(out, group)| join_neighbours(group, out));
    });

    let of_blocks = |value: fn(&[u8]) -> f32| bytes.chunks_exact(kind.block_bytes()).map(value).collect::<Vec<f32>>();
    let double = |code: fn(&[u8], usize) -> u8, table: fn(usize) -> f32, super_scale: fn(&[u8]) -> f32| {
        let blocks = bytes.chunks_exact(kind.block_bytes());
        Scales::Double(DoubleScales {
            codes: blocks.flat_map(|block| (0..SUPER_BLOCK).map(move |i| code(block, i))).collect(),
            table: Box::new(std::array::from_fn(table)),
            supers: of_blocks(super_scale),
            super_block: SUPER_BLOCK,
            // The only number that preserves the sign of a zero.
            offset: -0.0,
        })
    };
    let (scales, mins) = match kind {
        TensorType::Q4_1 => {
            (Scales::Plain(of_blocks(|block| half(block, 0))), Some(Scales::Plain(of_blocks(|block| half(block, 2)))))
        }
        TensorType::Q4K => (
            double(|block, i| k_quants::scale_and_min(&block[4..], i).0, |code| code as f32, |block| half(block, 0)),
            Some(double(
                |block, i| k_quants::scale_and_min(&block[4..], i).1,
                |code| code as f32,
                |block| -half(block, 2),
            )),
        ),
        TensorType::Iq4Xs => {
            let code = |block: &[u8], i: usize| {
                let low = block[4 + i / 2] >> (4 * (i % 2)) & 0xf;
                let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * i) & 3;
                low | (high as u8) << 4
            };
            (double(code, |code| code as f32 - 32.0, |block| half(block, 0)), None)
        }
        TensorType::Mxfp4 => (Scales::Plain(of_blocks(|block| half_power(block[0]))), None),
        _ => (Scales::Plain(of_blocks(|block| half(block, 0))), None),
    };
    let (codebook, dtype) = (format.codebook(), Dtype::F32);
    QuantizedMatrix::from_parts(Parts { format, rows, cols, codes, codebook, block: BLOCK, scales, mins, dtype })
}

/// Reorders the codes of a group, whose low nibbles come before its high ones: into the order of
/// the weights, the first of two in the high nibble.
fn join_neighbours(group: &[u8], out: &mut [u8]) {
    let (low, high) = out.split_at_mut(group.len() / 2);
    for ((low, high), &[first, second]) in low.iter_mut().zip(high).zip(group.as_chunks::<2>().0) {
        *low = first << 4 | second & 0xf;
        *high = first & 0xf0 | second >> 4;
    }
}

/// 2^(exponent - 128): half the value of the exponent in an MXFP4 block.
fn half_power(exponent: u8) -> f32 {
    let exponent = u32::from(exponent);
    // Below 2^-126 the numbers are subnormal.
    f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 })
}

fn q8_0(bytes: &[u8]) -> DenseData {
    let blocks = || bytes.chunks_exact(2 + Q8_BLOCK);
    let mut codes = Vec::with_capacity(blocks().len() * Q8_BLOCK);
    blocks().for_each(|block| codes.extend_from_slice(bytemuck::cast_slice(&block[2..])));
    let scales = blocks().map(|block| f16::from_le_bytes([block[0], block[1]])).collect();
    DenseData::Q8_0 { codes, scales }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::formats::safetensors::SafetensorsFile;
    use crate::kernels::DeviceMatrix;
    use crate::kernels::matrix::dequantize::dequantize;
    use crate::quant::MatrixSpec;
    use crate::quant::QuantOptions;
    use crate::testing;
    use crate::testing::tolerances::GGUF_BLOCKS;

    const KINDS: [(TensorType, Option<Format>); 14] = [
        (TensorType::Bf16, None),
        (TensorType::Iq4Nl, Some(Format::Iq4Nl)),
        (TensorType::Iq4Xs, Some(Format::Iq4Xs)),
        (TensorType::Mxfp4, Some(Format::Mxfp4)),
        (TensorType::Q2K, None),
        (TensorType::Q3K, None),
        (TensorType::Q4_0, Some(Format::Q4_0)),
        (TensorType::Q4_1, Some(Format::Q4_1)),
        (TensorType::Q4K, Some(Format::Q4K)),
        (TensorType::Q5_0, None),
        (TensorType::Q5_1, None),
        (TensorType::Q5K, None),
        (TensorType::Q6K, None),
        (TensorType::Q8_0, None),
    ];

    /// Blocks and their values from gguf-py.
    fn vectors(kind: TensorType) -> (Vec<u8>, Vec<f32>) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/block_vectors.safetensors");
        let file = SafetensorsFile::open(path).unwrap();
        let values = file.tensor(&format!("{kind}.deq")).unwrap().f32s().unwrap().into_owned();
        (file.tensor(&format!("{kind}.bytes")).unwrap().bytes.to_vec(), values)
    }

    fn decoded(matrix: &HostMatrix) -> Vec<f32> {
        let mut out = vec![0.0; matrix.rows() * matrix.cols()];
        matrix.dequantize_rows(0..matrix.rows(), &mut out);
        out
    }

    #[test]
    fn values_are_those_of_the_reference_to_the_bit() {
        for (kind, format) in KINDS {
            let (bytes, wanted) = vectors(kind);
            let matrix = matrix(kind, &bytes, 4, 256, &BaseFormat::AsIs).unwrap().unwrap();
            for (i, (got, wanted)) in decoded(&matrix).iter().zip(&wanted).enumerate() {
                assert_eq!(got.to_bits(), wanted.to_bits(), "{kind} [{i}]: {got:e} {wanted:e}");
            }
            let got = if let HostMatrix::Quantized(matrix) = &matrix { Some(matrix.format()) } else { None };
            assert_eq!(got, format, "{kind}");
        }
    }

    #[test]
    fn what_is_read_is_said() {
        for kind in (0..64).filter_map(TensorType::from_id) {
            let bytes = vec![0; kind.bytes(256).unwrap()];
            let matrix = matrix(kind, &bytes, 1, 256, &BaseFormat::AsIs).unwrap();
            assert_eq!(matrix_kind(kind, &BaseFormat::AsIs).is_some(), matrix.is_some(), "{kind}");
        }
    }

    #[test]
    fn how_a_type_is_stored_is_known_without_its_bytes() {
        for (kind, _) in KINDS {
            let bytes = vectors(kind).0;
            for base in [BaseFormat::AsIs, BaseFormat::Quantize(QuantOptions::nf4().double_quant())] {
                let matrix = matrix(kind, &bytes, 4, 256, &base).unwrap().unwrap();
                assert_eq!(matrix_kind(kind, &base), Some(MatrixSpec::of(&matrix).kind), "{kind}");
            }
        }
        assert_eq!(matrix_kind(TensorType::Iq2S, &BaseFormat::AsIs), None);
    }

    #[test]
    fn super_blocks_stay_compact() {
        let bits = |kind| match matrix(kind, &vectors(kind).0, 4, 256, &BaseFormat::AsIs).unwrap().unwrap() {
            // Without the two offsets, which count once per matrix.
            HostMatrix::Quantized(matrix) => matrix.bits_per_weight() - 8.0 * 4.0 / 1024.0,
            HostMatrix::Dense(_) => panic!("dense"),
        };
        assert_eq!(bits(TensorType::Iq4Xs), 4.0 + 8.0 / 32.0 + 32.0 / 256.0);
        assert_eq!(bits(TensorType::Q4K) - 8.0 * 4.0 / 1024.0, 4.0 + 2.0 * (8.0 / 32.0 + 32.0 / 256.0));
    }

    #[test]
    fn every_device_decodes_them_alike() {
        for (kind, _) in KINDS {
            let host = matrix(kind, &vectors(kind).0, 4, 256, &BaseFormat::AsIs).unwrap().unwrap();
            let wanted = decoded(&host);
            let largest = wanted.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            for device in testing::devices() {
                let w = DeviceMatrix::new(&device, host.clone()).unwrap();
                assert!(*w.to_host().unwrap() == host, "{kind} on {}", testing::name(&device));
                for (got, wanted) in dequantize(&w, None).unwrap().iter().zip(&wanted) {
                    // On other devices, a product and a sum may be fused, and subnormals may be
                    // zero.
                    let off = (got - wanted).abs();
                    let context = testing::name(&device);
                    assert!(
                        off <= GGUF_BLOCKS.f32.relative as f32 * f32::EPSILON * largest,
                        "{kind} on {context}: {got:e} {wanted:e}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_not_4_bit_is_quantized_when_asked() {
        let base = BaseFormat::Quantize(QuantOptions::nf4());
        for (kind, format) in KINDS {
            let (bytes, values) = vectors(kind);
            let got = matrix(kind, &bytes, 4, 256, &base).unwrap().unwrap();
            let HostMatrix::Quantized(got) = got else { panic!("{kind} is dense") };
            assert_eq!(got.format(), format.unwrap_or(Format::Nf4), "{kind}");
            if format.is_none() {
                let wanted = QuantizedMatrix::quantize(values[..].into(), 4, 256, &QuantOptions::nf4()).unwrap();
                assert_eq!(got.codes(), wanted.codes(), "{kind}");
            }
        }
    }

    #[test]
    fn scales_that_are_not_finite_are_errors_and_other_types_are_none() {
        let mut bytes = vectors(TensorType::Q4_1).0;
        bytes[2..4].copy_from_slice(&f16::NAN.to_le_bytes());
        assert_eq!(
            matrix(TensorType::Q4_1, &bytes, 4, 256, &BaseFormat::AsIs).unwrap_err().to_string(),
            "quantized matrix: the value at flat index 0 is NaN; only finite values can be quantized"
        );
        assert!(matrix(TensorType::Iq2S, &[0; 82], 1, 256, &BaseFormat::AsIs).unwrap().is_none());
    }

    #[test]
    fn exponents_of_mxfp4() {
        for exponent in 0..=255 {
            assert_eq!(f64::from(half_power(exponent)), 2_f64.powi(i32::from(exponent) - 128), "{exponent}");
        }
    }
}
