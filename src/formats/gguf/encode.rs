//! Encodes f32 values as blocks of ggml's types. The arithmetic is that of ggml's reference
//! quantizers, bit for bit.

use half::{bf16, f16};
use rayon::prelude::*;

use super::TensorType;
use crate::quant::encode_q8_0;

/// Values per thread at a time; a multiple of every block.
const CHUNK: usize = 1 << 14;

/// Encodes values as F32, F16, BF16, Q8_0 or Q4_0, in rows of whole blocks.
///
/// Q8_0: per block d = max |w| / 127, codes round(w / d). Q4_0: d = w / -8 for the w with the
/// largest |w|, codes floor(w / d + 8.5), at most 15. d is stored as f16, but the codes are
/// computed with the f32.
///
/// # Errors
/// Says what is wrong: values that aren't finite or exceed the type's range, or another type.
pub(crate) fn encode(kind: TensorType, values: &[f32]) -> Result<Vec<u8>, String> {
    let fill: fn(&[f32], &mut [u8]) = match kind {
        TensorType::F32 => |values, out| out.copy_from_slice(bytemuck::cast_slice(values)),
        TensorType::F16 => |values, out| each(values, out, |value| f16::from_f32(value).to_le_bytes()),
        TensorType::Bf16 => |values, out| each(values, out, |value| bf16::from_f32(value).to_le_bytes()),
        TensorType::Q8_0 => |values, out| blocks(values, out, q8_0),
        TensorType::Q4_0 => |values, out| blocks(values, out, q4_0),
        other => return Err(format!("can't be written as {other}")),
    };
    let bytes = kind.bytes(values.len()).ok_or_else(|| {
        format!("has {} values, not a multiple of {kind}'s block size {}", values.len(), kind.block())
    })?;
    check_range(kind, values)?;
    let mut out = vec![0; bytes];
    let chunk_bytes = CHUNK / kind.block() * kind.block_bytes();
    out.par_chunks_mut(chunk_bytes).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| fill(values, out));
    Ok(out)
}

/// Fails for the first value that isn't finite or wouldn't be after the conversion.
fn check_range(kind: TensorType, values: &[f32]) -> Result<(), String> {
    // The largest value that rounds to a finite value of the type, or gives a finite f16 scale.
    let most = match kind {
        TensorType::F16 => 65_519.0,
        TensorType::Q8_0 => 65_504.0 * 127.0,
        TensorType::Q4_0 => 65_504.0 * 8.0,
        _ => f32::MAX,
    };
    match values.par_iter().position_first(|value| !value.is_finite() || value.abs() > most) {
        Some(at) if values[at].is_finite() => {
            Err(format!("has {} at flat index {at}, which {kind} can't represent; choose bf16 or f32", values[at]))
        }
        Some(at) => Err(format!("has {} at flat index {at}; only finite values can be written", values[at])),
        None => Ok(()),
    }
}

fn each(values: &[f32], out: &mut [u8], round: fn(f32) -> [u8; 2]) {
    for (&value, out) in values.iter().zip(out.as_chunks_mut().0) {
        *out = round(value);
    }
}

/// Values per block, for all types here that have blocks.
const BLOCK: usize = 32;

fn blocks(values: &[f32], out: &mut [u8], block: fn(&[f32; BLOCK], &mut [u8]) -> f16) {
    let blocks = values.as_chunks().0;
    for (values, out) in blocks.iter().zip(out.chunks_exact_mut(out.len() / blocks.len().max(1))) {
        let (scale, codes) = out.split_at_mut(2);
        scale.copy_from_slice(&block(values, codes).to_le_bytes());
    }
}

fn q8_0(values: &[f32; BLOCK], codes: &mut [u8]) -> f16 {
    encode_q8_0(values, bytemuck::cast_slice_mut(codes))
}

fn q4_0(values: &[f32; BLOCK], codes: &mut [u8]) -> f16 {
    // The first one, if two are equally large.
    let largest = values.iter().fold(0.0_f32, |most, &value| if value.abs() > most.abs() { value } else { most });
    let d = largest / -8.0;
    let reciprocal = if d == 0.0 { 0.0 } else { 1.0 / d };
    let code = |value: f32| ((value * reciprocal + 8.5) as u8).min(15);
    let (low, high) = values.split_at(BLOCK / 2);
    for ((&low, &high), out) in low.iter().zip(high).zip(codes) {
        *out = code(low) | code(high) << 4;
    }
    f16::from_f32(d)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::formats::safetensors::SafetensorsFile;

    #[test]
    fn blocks_are_those_of_ggufs_own_library() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/block_vectors.safetensors");
        let file = SafetensorsFile::open(path).unwrap();
        let source = file.tensor("src_f32").unwrap().f32s().unwrap().into_owned();
        for kind in [TensorType::Bf16, TensorType::Q8_0, TensorType::Q4_0] {
            let expected = file.tensor(&format!("{kind}.bytes")).unwrap().bytes;
            assert_eq!(encode(kind, &source).unwrap(), expected, "{kind}");
        }
        assert_eq!(encode(TensorType::F32, &source).unwrap(), bytemuck::cast_slice::<f32, u8>(&source));
        let halves: Vec<u8> = source.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
        assert_eq!(encode(TensorType::F16, &source).unwrap(), halves);
    }

    #[test]
    fn long_tensors_are_those_of_their_parts() {
        let values: Vec<f32> = (0..3 * CHUNK + 64).map(|i| (i as f32 * 0.37).sin() * (i % 97) as f32).collect();
        for kind in [TensorType::F16, TensorType::Q8_0, TensorType::Q4_0] {
            let parts: Vec<u8> = values.chunks(64).flat_map(|part| encode(kind, part).unwrap()).collect();
            assert_eq!(encode(kind, &values).unwrap(), parts, "{kind}");
        }
    }

    #[test]
    fn what_a_type_cannot_hold_is_an_error() {
        let mut values = vec![0.0; 64];
        assert_eq!(
            encode(TensorType::Q4_0, &values).unwrap()[..3],
            [0, 0x80, 0x88],
            "zeros, with ggml's own sign of the scale"
        );
        assert!(encode(TensorType::Q4_0, &values[1..]).unwrap_err().contains("63 values"));
        assert_eq!(encode(TensorType::Q6K, &values).unwrap_err(), "can't be written as Q6_K");
        values[40] = 65_520.0;
        let error = encode(TensorType::F16, &values).unwrap_err();
        assert!(error.contains("65520 at flat index 40") && error.contains("bf16"), "{error}");
        assert!(encode(TensorType::Q8_0, &values).is_ok());
        values[40] = 1e9;
        assert!(encode(TensorType::Q8_0, &values).is_err() && encode(TensorType::Bf16, &values).is_ok());
        values[40] = f32::NAN;
        for kind in [TensorType::F32, TensorType::F16, TensorType::Bf16, TensorType::Q8_0, TensorType::Q4_0] {
            assert!(encode(kind, &values).unwrap_err().contains("NaN at flat index 40"), "{kind}");
        }
    }
}
