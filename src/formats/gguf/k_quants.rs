//! Decodes ggml's block types other than the 4-bit matrices to f32: 2, 3, 5, 6 and 8 bits. The
//! arithmetic and its order follow ggml (`ggml-quants.c`), so values are bit-identical.

use half::f16;

use super::TensorType;

/// Decodes one block.
pub(super) type Decoder = fn(&[u8], &mut [f32]);

/// Returns the decoder for a type, if it is here.
pub(super) fn decoder(kind: TensorType) -> Option<Decoder> {
    match kind {
        TensorType::Q2K => Some(q2_k),
        TensorType::Q3K => Some(q3_k),
        TensorType::Q5_0 => Some(q5_0),
        TensorType::Q5_1 => Some(q5_1),
        TensorType::Q5K => Some(q5_k),
        TensorType::Q6K => Some(q6_k),
        TensorType::Q8K => Some(q8_k),
        _ => None,
    }
}

/// Reads the f16 at byte `at` of a block.
pub(super) fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 6-bit scale and minimum of block `i` of 8, from the 12 bytes that pack them in Q4_K and Q5_K.
pub(super) fn scale_and_min(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    let (both, scale_top, min_top) = (packed[i + 4], packed[i - 4] >> 6, packed[i] >> 6);
    (both & 0xf | scale_top << 4, both >> 4 | min_top << 4)
}

/// 5-bit codes: nibbles in `low`; bit i of `high` is the top bit of code i.
fn five_bits(high: &[u8], low: &[u8], i: usize) -> u8 {
    let nibble = if i < 16 { low[i] & 0xf } else { low[i - 16] >> 4 };
    nibble | (high[i / 8] >> (i % 8) & 1) << 4
}

/// d: f16, high bits: 4, nibbles: 16.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * (f32::from(five_bits(&block[2..6], &block[6..22], i)) - 16.0);
    }
}

/// d: f16, m: f16, high bits: 4, nibbles: 16.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * f32::from(five_bits(&block[4..8], &block[8..24], i)) + m;
    }
}

/// Scales and minima in nibbles: 16, codes: 64, d: f16, dmin: f16.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half(block, 80), half(block, 82));
    for (b, out) in out.chunks_exact_mut(16).enumerate() {
        let (scale, min) = (d * f32::from(scales[b] & 0xf), dmin * f32::from(scales[b] >> 4));
        let (codes, shift) = two_bits(codes, b);
        for (out, code) in out.iter_mut().zip(codes) {
            *out = scale * f32::from(code >> shift & 3) - min;
        }
    }
}

/// The bytes that contain the 2-bit codes of block `b` of 16 weights, and their shift: 32 bytes
/// hold four rows of 32 weights.
fn two_bits(codes: &[u8], b: usize) -> (&[u8], usize) {
    (&codes[32 * (b / 8) + 16 * (b % 2)..][..16], 2 * (b % 8 / 2))
}

/// High bits: 32, codes: 64, 6-bit scales: 12, d: f16.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, codes, packed, d) = (&block[..32], &block[32..96], &block[96..108], half(block, 108));
    for (b, out) in out.chunks_exact_mut(16).enumerate() {
        let low = packed[b % 8] >> (4 * (b / 8)) & 0xf;
        let top = packed[8 + b % 4] >> (2 * (b / 4)) & 3;
        let scale = d * (f32::from(low | top << 4) - 32.0);
        let (codes, shift) = two_bits(codes, b);
        for ((out, code), high) in out.iter_mut().zip(codes).zip(&high[16 * (b % 2)..]) {
            let bit = high >> (b / 2) & 1;
            *out = scale * (f32::from(code >> shift & 3 | bit << 2) - 4.0);
        }
    }
}

/// d: f16, dmin: f16, 6-bit scales and minima: 12, high bits: 32, nibbles: 128.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let (packed, high, codes) = (&block[4..16], &block[16..48], &block[48..176]);
    for (b, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(packed, b);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let codes = &codes[32 * (b / 2)..];
        for ((out, code), high) in out.iter_mut().zip(codes).zip(high) {
            let code = code >> (4 * (b % 2)) & 0xf | (high >> b & 1) << 4;
            *out = scale * f32::from(code) - min;
        }
    }
}

/// Nibbles: 128, high bits: 64, scales: 16 of i8, d: f16.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(block, 208));
    for (b, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[b] as i8);
        // Index of the 128 weights, of the 32 among them, and of the 16 among those.
        let (outer, row, part) = (b / 8, b % 8 / 2, 16 * (b % 2));
        let low = &low[64 * outer + 32 * (row % 2) + part..];
        let high = &high[32 * outer + part..];
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            let code = low >> (4 * (row / 2)) & 0xf | (high >> (2 * row) & 3) << 4;
            *out = scale * (f32::from(code) - 32.0);
        }
    }
}

/// d: f32, codes: 256 of i8, sums that only dot products use: 32.
fn q8_k(block: &[u8], out: &mut [f32]) {
    let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    for (out, &code) in out.iter_mut().zip(&block[4..]) {
        *out = d * f32::from(code as i8);
    }
}
