//! Reads `tests/golden/seed.json`, the outputs of entrenar 0.7.13; its `hex_conventions` explain
//! the format.

use std::fs;
use std::path::Path;

use serde_json::Value;

pub fn seed() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/seed.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

pub fn bytes(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

pub fn floats(hex: &Value) -> Vec<f32> {
    bytes(hex).as_chunks::<4>().0.iter().map(|&bits| f32::from_be_bytes(bits)).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub fn fnv1a64(values: &[f32]) -> String {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}
