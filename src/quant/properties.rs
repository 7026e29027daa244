//! Property tests of quantization as a whole.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

fn options() -> impl Strategy<Value = QuantOptions> {
    let format = prop_oneof![Just(Format::Nf4), Just(Format::Fp4), Just(Format::Int4)];
    let double = prop_oneof![Just(DoubleQuant::None), Just(DoubleQuant::Dynamic), Just(DoubleQuant::Linear)];
    (format, 5..=12_u32, double).prop_map(|(format, log, double)| QuantOptions { format, block: 1 << log, double })
}

/// Weights of very different magnitudes, in a shape whose sides may be odd.
fn weights() -> impl Strategy<Value = (usize, usize, Vec<f32>)> {
    let weight = (-1.0..1.0_f32, -30..=8_i32).prop_map(|(mantissa, exponent)| mantissa * 2_f32.powi(exponent));
    (1..=257_usize, 1..=9_usize, prop::bool::ANY)
        .prop_map(|(long, short, wide)| if wide { (short, long) } else { (long, short) })
        .prop_flat_map(move |(rows, cols)| (Just(rows), Just(cols), prop::collection::vec(weight.clone(), rows * cols)))
}

/// Half the widest distance between neighbours in a sorted table.
fn half_gap(mut table: Vec<f32>) -> f32 {
    table.sort_by(f32::total_cmp);
    table.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).fold(0.0, f32::max)
}

proptest! {
    /// The error of a weight is at most half the widest step of the codebook. If the scale is
    /// quantized too, add the largest codebook value times the error of the scale.
    #[test]
    fn errors_stay_within_the_format((rows, cols, weights) in weights(), options in options()) {
        let plain = QuantOptions { double: DoubleQuant::None, ..options };
        let exact = QuantizedMatrix::quantize(weights[..].into(), rows, cols, &plain).unwrap();
        let matrix = QuantizedMatrix::quantize(weights[..].into(), rows, cols, &options).unwrap();
        prop_assert_eq!(exact.codes(), matrix.codes());
        // INT4 never emits -8.
        let used: Vec<f32> = options.format.codebook().0.into_iter().filter(|&v| v != -8.0).collect();
        let largest = used.iter().fold(0.0, |max: f32, v| max.max(v.abs()));
        let half_step = half_gap(used);
        let slack = 1.0 + 8.0 * f32::EPSILON;
        for (i, (w, got)) in weights.iter().zip(matrix.dequantize()).enumerate() {
            let b = i / options.block;
            let scale = exact.scales().get(b);
            let scale_error = match matrix.scales() {
                Scales::Plain(_) => 0.0,
                Scales::Double(d) => {
                    let largest = d.supers[b / d.super_block];
                    // The dynamic map ends half a step short of -1, so half a gap covers that end
                    // too. The linear map has no negative end.
                    half_gap(d.table.to_vec()) * largest + f32::EPSILON * (largest + d.offset)
                }
            };
            let bound = (half_step * scale + largest * scale_error) * slack + f32::MIN_POSITIVE;
            prop_assert!((w - got).abs() <= bound, "{}: {} -> {}, bound {}", i, w, got, bound);
        }
    }

    #[test]
    fn halves_quantize_like_their_f32_values((rows, cols, weights) in weights(), options in options()) {
        let halves: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w)).collect();
        let brains: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
        let from_f16: Vec<f32> = halves.iter().map(|w| w.to_f32()).collect();
        let from_bf16: Vec<f32> = brains.iter().map(|w| w.to_f32()).collect();
        for (source, values) in [(Source::F16(&halves), from_f16), (Source::Bf16(&brains), from_bf16)] {
            let matrix = QuantizedMatrix::quantize(source, rows, cols, &options).unwrap();
            prop_assert_eq!(matrix.dtype(), source.dtype());
            let wide = QuantizedMatrix::quantize(values[..].into(), rows, cols, &options).unwrap();
            prop_assert_eq!(matrix.into_parts(), Parts { dtype: source.dtype(), ..wide.into_parts() });
        }
    }

    #[test]
    fn rows_are_slices_of_the_whole((rows, cols, weights) in weights(), options in options(), a in 0..258_usize, b in 0..258_usize) {
        let matrix = QuantizedMatrix::quantize(weights[..].into(), rows, cols, &options).unwrap();
        let range = a.min(b) % (rows + 1)..rows;
        let mut out = vec![f32::NAN; range.len() * cols];
        matrix.dequantize_rows(range.clone(), &mut out);
        let whole = matrix.dequantize();
        prop_assert_eq!(&out[..], &whole[range.start * cols..]);
        prop_assert!(whole.iter().enumerate().all(|(i, &w)| matrix.get(i).to_bits() == w.to_bits()));
    }
}
