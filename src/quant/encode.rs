//! Block quantizers: weights to codes and scales.

use rayon::prelude::*;

use super::{Codebook, Format, Source};

/// Options for quantizing a matrix. The default is plain NF4 in blocks of 64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QuantOptions {
    /// The codebook and its rounding rule.
    pub format: Format,
    /// Weights per scale: a power of two in 32..=4096.
    pub block: usize,
    /// Whether the scales are quantized too, and by which scheme.
    pub double: DoubleQuant,
}

/// Storage of a matrix's scales.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DoubleQuant {
    /// f32 scales.
    None,
    /// bitsandbytes' 8-bit scheme, as [`DoubleScales`](super::DoubleScales).
    Dynamic,
    /// A linear 8-bit scheme, as [`DoubleScales`](super::DoubleScales).
    Linear,
}

impl Default for QuantOptions {
    fn default() -> Self {
        QuantOptions { format: Format::Nf4, block: 64, double: DoubleQuant::None }
    }
}

impl QuantOptions {
    /// Plain NF4 in blocks of 64.
    pub fn nf4() -> Self {
        Self::default()
    }

    /// Plain FP4 in blocks of 64.
    pub fn fp4() -> Self {
        QuantOptions { format: Format::Fp4, ..Self::default() }
    }

    /// Plain INT4 in blocks of 64.
    pub fn int4() -> Self {
        QuantOptions { format: Format::Int4, ..Self::default() }
    }

    /// Adds the double quantization that is usual for the format: dynamic for NF4 and FP4, linear
    /// for INT4.
    pub fn double_quant(self) -> Self {
        let double = match self.format {
            Format::Int4 => DoubleQuant::Linear,
            _ => DoubleQuant::Dynamic,
        };
        QuantOptions { double, ..self }
    }

    /// Sets the number of weights per scale.
    pub fn block(self, block: usize) -> Self {
        QuantOptions { block, ..self }
    }
}

/// Values encoded at once. Divides every block length.
const LANES: usize = 32;

/// Values per parallel task; a multiple of every block length.
const TASK: usize = 1 << 14;

/// Returns codes (two per byte, the first in the high nibble) and one scale per `block` values of
/// `source`. The unused nibble of an odd length holds the code of zero.
///
/// # Errors
/// The flat index of the first value that is not finite.
pub(super) fn encode(source: Source<'_>, format: Format, block: usize) -> Result<(Vec<u8>, Vec<f32>), usize> {
    let n = source.len();
    let encoder = Encoder::new(format);
    let mut codes = vec![0; n.div_ceil(2)];
    let mut scales = vec![0.0; n.div_ceil(block)];
    let first_bad = codes
        .par_chunks_mut(TASK / 2)
        .zip(scales.par_chunks_mut(TASK / block))
        .enumerate()
        .map_init(Vec::new, |buffer, (task, (codes, scales))| {
            let start = task * TASK;
            let values = source.as_f32(start..n.min(start + TASK), buffer);
            let bad = encoder.encode_blocks(values, block, codes, scales).err()?;
            Some(start + bad)
        })
        .flatten_iter()
        .min();
    match first_bad {
        Some(index) => Err(index),
        None => Ok((codes, scales)),
    }
}

/// Rounding rule of a format.
enum Encoder {
    /// The nearest codebook value to `w / absmax`; if two are equally near, the lower one.
    Nearest {
        /// Midpoints between neighbours in the sorted codebook.
        midpoints: [f32; 15],
        /// The code of each sorted codebook value.
        codes: [u8; 16],
    },
    /// `w / (absmax / 7)`, rounded half away from zero.
    Int4,
}

impl Encoder {
    fn new(format: Format) -> Self {
        match format {
            Format::Int4 => Encoder::Int4,
            _ => Self::nearest(&format.codebook()),
        }
    }

    fn nearest(Codebook(values): &Codebook) -> Self {
        let mut codes: [u8; 16] = std::array::from_fn(|code| code as u8);
        // Stable: FP4's two zeros stay in the order 0, 8, as in bitsandbytes.
        codes.sort_by(|&a, &b| values[usize::from(a)].total_cmp(&values[usize::from(b)]));
        let sorted = codes.map(|code| values[usize::from(code)]);
        let midpoints = std::array::from_fn(|i| (sorted[i] + sorted[i + 1]) / 2.0);
        Encoder::Nearest { midpoints, codes }
    }

    /// Encodes consecutive blocks. The error is the index in `values` of the first value that is
    /// not finite.
    fn encode_blocks(&self, values: &[f32], block: usize, codes: &mut [u8], scales: &mut [f32]) -> Result<(), usize> {
        let blocks = values.chunks(block).zip(codes.chunks_mut(block / 2)).zip(scales);
        for (b, ((values, codes), scale)) in blocks.enumerate() {
            let absmax = absmax(values);
            if !absmax.is_finite() {
                let bad = values.iter().position(|v| !v.is_finite());
                return Err(b * block + bad.unwrap_or(0));
            }
            *scale = self.encode_block(values, absmax, codes);
        }
        Ok(())
    }

    /// Encodes one block and returns its scale.
    fn encode_block(&self, values: &[f32], absmax: f32, codes: &mut [u8]) -> f32 {
        let scale = match self {
            Encoder::Nearest { .. } => absmax,
            Encoder::Int4 => absmax / 7.0,
        };
        // 1 / 0 would be infinite and turn the values of an all-zero block into NaN.
        let reciprocal = 1.0 / absmax.max(f32::MIN_POSITIVE);
        for (values, codes) in values.chunks(LANES).zip(codes.chunks_mut(LANES / 2)) {
            let mut lanes = [0.0; LANES];
            lanes[..values.len()].copy_from_slice(values);
            let nibbles = match self {
                Encoder::Nearest { midpoints, codes } => {
                    ranks(&lanes.map(|v| v * reciprocal), midpoints).map(|rank| codes[rank as usize])
                }
                Encoder::Int4 => lanes.map(|v| int4(v / scale)),
            };
            for (byte, pair) in codes.iter_mut().zip(nibbles.chunks_exact(2)) {
                *byte = pair[0] << 4 | pair[1];
            }
        }
        scale
    }
}

/// Returns the largest magnitude; infinite or NaN if any value is.
fn absmax(values: &[f32]) -> f32 {
    // Without the sign, floats have the order of their bits, with infinities and NaNs above all
    // others.
    let bits = values.iter().map(|v| v.abs().to_bits()).fold(0, u32::max);
    f32::from_bits(bits)
}

/// Returns the number of midpoints that each value exceeds. Needs no clamp to [-1, 1], because all
/// midpoints lie inside.
fn ranks(values: &[f32; LANES], midpoints: &[f32; 15]) -> [u32; LANES] {
    let mut ranks = [0; LANES];
    // Eight at a time: the sums stay in registers.
    for (ranks, values) in ranks.as_chunks_mut::<8>().0.iter_mut().zip(values.as_chunks::<8>().0) {
        for &midpoint in midpoints {
            for (rank, &value) in ranks.iter_mut().zip(values) {
                *rank += u32::from(value > midpoint);
            }
        }
    }
    ranks
}

/// Clamps `x` to [-7, 7], rounds half away from zero, and returns a two's-complement nibble; NaN
/// gives 0.
fn int4(x: f32) -> u8 {
    let magnitude: u8 = (0..7_u8).map(|k| u8::from(x.abs() >= f32::from(k) + 0.5)).sum();
    if x < 0.0 { magnitude.wrapping_neg() & 0xf } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the code of each value, in one block whose largest magnitude is 1 (INT4: 7).
    fn codes(format: Format, values: &[f32]) -> Vec<u8> {
        let (bytes, _) = encode(values.into(), format, 64).unwrap();
        bytes.iter().flat_map(|byte| [byte >> 4, byte & 0xf]).take(values.len()).collect()
    }

    #[test]
    fn nf4_midpoints_are_those_of_bitsandbytes() {
        let Encoder::Nearest { midpoints, codes } = Encoder::new(Format::Nf4) else { panic!("not a lookup") };
        assert_eq!(codes, std::array::from_fn(|code| code as u8));
        let expected = [
            -0.848_096_4,
            -0.610_632_9,
            -0.459_995_27,
            -0.339_679_42,
            -0.234_607_4,
            -0.137_911_74,
            -0.045_525_018,
            0.039_790_15,
            0.120_255_25,
            0.203_521_25,
            0.292_013_76,
            0.389_312_54,
            0.501_663_45,
            0.642_786_9,
            0.861_478_45,
        ];
        assert_eq!(midpoints, expected);
    }

    #[test]
    fn a_tie_takes_the_lower_value() {
        let Encoder::Nearest { midpoints, .. } = Encoder::new(Format::Nf4) else { panic!("not a lookup") };
        let ties: Vec<f32> = midpoints.into_iter().chain([1.0]).collect();
        assert_eq!(codes(Format::Nf4, &ties), (0..16).collect::<Vec<u8>>());
        let above: Vec<f32> = midpoints.into_iter().map(f32::next_up).chain([1.0]).collect();
        assert_eq!(codes(Format::Nf4, &above), (1..16).chain([15]).collect::<Vec<u8>>());
    }

    #[test]
    fn fp4_rounds_in_value_order() {
        let values = [-1.0, -0.5, -0.001, 0.0, 0.001, 0.005, 0.17, 0.4, 0.9];
        assert_eq!(codes(Format::Fp4, &values), [11, 13, 0, 0, 8, 1, 6, 4, 3]);
    }

    #[test]
    fn int4_rounds_half_away_from_zero() {
        let values = [7.0, -7.0, 0.5, -0.5, 0.499_999_97, -0.499_999_97, 2.5, -2.5, -0.0, 6.499_999_5];
        assert_eq!(codes(Format::Int4, &values), [7, 9, 1, 15, 0, 0, 3, 13, 0, 6]);
    }

    #[test]
    fn zero_blocks_and_the_spare_nibble_hold_the_code_of_zero() {
        for (format, zero) in [(Format::Nf4, 0x77), (Format::Fp4, 0x00), (Format::Int4, 0x00)] {
            let (bytes, scales) = encode((&[0.0_f32; 67][..]).into(), format, 32).unwrap();
            assert_eq!((bytes, scales), (vec![zero; 34], vec![0.0; 3]), "{format}");
        }
    }

    #[test]
    fn the_smallest_and_largest_weights_are_kept() {
        for format in [Format::Nf4, Format::Fp4, Format::Int4] {
            for extreme in [f32::MIN_POSITIVE, f32::MAX] {
                let (bytes, scales) = encode((&[extreme, -extreme][..]).into(), format, 32).unwrap();
                let values = [bytes[0] >> 4, bytes[0] & 0xf].map(|code| format.codebook().0[usize::from(code)]);
                let [high, low] = values.map(|v| v * scales[0]);
                assert!((high / extreme - 1.0).abs() < 1e-6 && low == -high, "{format} {extreme}: {high}");
            }
        }
    }

    #[test]
    fn the_first_bad_value_is_reported() {
        let mut values = vec![1.0_f32; 3 * TASK];
        for index in [3 * TASK - 1, TASK + 5000, TASK + 77, TASK + 76] {
            values[index] = if index % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY };
            assert_eq!(encode(values[..].into(), Format::Nf4, 64), Err(index));
        }
    }
}
