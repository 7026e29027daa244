//! Parity of INT4 with entrenar 0.7.13, whose recorded outputs are in `tests/golden/seed.json`.

use crate::common::seed::{bits, bytes, floats, fnv1a64, seed};
use qlora_wgpu::error::Error;
use qlora_wgpu::internal::bench::uniform;
use qlora_wgpu::quant::{QuantOptions, QuantizedMatrix, Scales};
use serde_json::Value;

/// The input of a recorded case, from the formula it names.
fn input(name: &str) -> Vec<f32> {
    let index = |n: u64, f: fn(u64) -> f32| (0..n).map(f).collect::<Vec<_>>();
    match name {
        "ramp64" => index(64, |i| (i as f32 - 31.5) * 0.25),
        "perm100" => index(100, |i| ((i * 37 % 101) as f32 - 50.0) / 16.0),
        "rand77_odd" => uniform(7, 77, 2.0),
        "blocks256_zero_outlier_small" => {
            let mut values = uniform(11, 256, 0.02);
            values[64..128].fill(0.0);
            values[130] = 3.0;
            values[192..].iter_mut().for_each(|v| *v *= 1e-3);
            values
        }
        "ties64" => index(64, |i| if i == 0 { 7.0 } else { (i % 14) as f32 - 7.0 + 0.5 }),
        "rand4096" => uniform(42, 4096, 1.0),
        "super19200" => index(19200, |i| {
            let q = ((i * 2_654_435_761 % 65536) as f32 - 32768.0) / 32768.0;
            if i < 16384 { q * ((i / 64 + 1) as f32 / 256.0) } else { q * 10.0 }
        }),
        _ => panic!("unknown case {name}"),
    }
}

fn quantize(values: &[f32], options: QuantOptions) -> Result<QuantizedMatrix, Error> {
    QuantizedMatrix::quantize(values.into(), 1, values.len(), &options)
}

/// Quantizes finite `values` with plain and with double quantization; the codes must be equal.
fn both(values: &[f32]) -> (QuantizedMatrix, QuantizedMatrix) {
    let single = quantize(values, QuantOptions::int4()).unwrap();
    let double = quantize(values, QuantOptions::int4().double_quant()).unwrap();
    assert_eq!(single.codes(), double.codes());
    (single, double)
}

fn plain(matrix: &QuantizedMatrix) -> &[f32] {
    let Scales::Plain(scales) = matrix.scales() else { panic!("double-quantized") };
    scales
}

/// Codes and super-scales of a double-quantized matrix.
fn nested(matrix: &QuantizedMatrix) -> (&[u8], &[f32]) {
    let Scales::Double(double) = matrix.scales() else { panic!("not double-quantized") };
    (&double.codes, &double.supers)
}

/// Compares dequantized values with the record: all values, or the first 64 and a hash.
fn assert_dequantized(matrix: &QuantizedMatrix, record: &Value, name: &str) {
    let values = matrix.dequantize();
    assert_eq!(fnv1a64(&values), record["dequant_fnv1a64"], "{name}");
    let recorded = record.get("dequant_hex").unwrap_or(&record["dequant_first64_hex"]);
    let recorded = floats(recorded);
    assert_eq!(bits(&values[..recorded.len()]), bits(&recorded), "{name}");
}

#[test]
fn quantization_is_equal_to_the_bit() {
    let seed = seed();
    let cases = seed["quant"].as_array().unwrap();
    assert_eq!(cases.len(), 7);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let values = input(name);
        assert_eq!(values.len() as u64, case["len"].as_u64().unwrap(), "{name}");
        // Short inputs are recorded in full, long ones as a hash.
        match case.get("input_hex") {
            Some(hex) if case.get("input_fnv1a64").is_none() => assert_eq!(bits(&values), bits(&floats(hex)), "{name}"),
            _ => assert_eq!(fnv1a64(&values), case["input_fnv1a64"], "{name}"),
        }

        let (single, double) = both(&values);
        let record = &case["single"];
        assert_eq!(single.codes(), bytes(&record["data_hex"]), "{name}");
        assert_eq!(bits(plain(&single)), bits(&floats(&record["scales_hex"])), "{name}");
        assert_dequantized(&single, record, name);
        let stored = single.bits_per_weight() * values.len() as f64 / 8.0;
        assert_eq!(stored.round() as u64, record["memory_bytes"].as_u64().unwrap(), "{name}");

        let record = &case["double"];
        let (codes, supers) = nested(&double);
        assert_eq!(codes, bytes(&record["quantized_scales_hex"]), "{name}");
        assert_eq!(bits(supers), bits(&floats(&record["super_scales_hex"])), "{name}");
        assert_dequantized(&double, record, name);
        // The record has no offset, which is 4 bytes here.
        let stored = double.bits_per_weight() * values.len() as f64 / 8.0 - 4.0;
        assert_eq!(stored.round() as u64, record["memory_bytes"].as_u64().unwrap(), "{name}");
    }
}

#[test]
fn special_inputs_are_equal_or_errors() {
    let seed = seed();
    let cases = seed["specials"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    let mut errors = 0;
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let values = floats(&case["input_hex"]);
        if let Some(first) = values.iter().position(|v| !v.is_finite()) {
            for options in [QuantOptions::int4(), QuantOptions::int4().double_quant()] {
                let error = quantize(&values, options).unwrap_err();
                assert!(matches!(error, Error::NonFinite { index, .. } if index == first), "{name}: {error}");
            }
            errors += 1;
            continue;
        }
        let (single, double) = both(&values);
        assert_eq!(single.codes(), bytes(&case["data_hex"]), "{name}");
        assert_eq!(bits(plain(&single)), bits(&floats(&case["scales_hex"])), "{name}");
        assert_eq!(bits(&single.dequantize()), bits(&floats(&case["dequant_hex"])), "{name}");
        let (codes, supers) = nested(&double);
        assert_eq!(codes, bytes(&case["dq_scales_hex"]), "{name}");
        assert_eq!(bits(supers), bits(&floats(&case["dq_super_hex"])), "{name}");
        assert_eq!(bits(&double.dequantize()), bits(&floats(&case["dq_dequant_hex"])), "{name}");
    }
    assert_eq!(errors, 3);
}
