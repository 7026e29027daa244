//! Devices and comparisons for tests.

#[path = "../tests/common/devices.rs"]
mod devices;
#[allow(dead_code, reason = "integration tests use the rest")]
#[path = "../tests/common/tolerances.rs"]
pub mod tolerances;

pub use devices::*;

pub use crate::bench::uniform as values;
use crate::error::Result;
use crate::quant::HostMatrix;
use crate::quant::{
    Codebook, DenseData, DenseMatrix, DoubleQuant, DoubleScales, Dtype, Format, Parts, QuantOptions, QuantizedMatrix,
    Scales,
};
use crate::tensor::Tensor;

/// The values as f64, for references.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Compares `gradient` with central finite differences of `f` at `x`.
///
/// # Panics
/// If a value is off by more than 1e-6 of the largest gradient value.
pub fn assert_gradient(context: &str, x: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> f64) {
    assert_eq!(x.len(), gradient.len(), "{context}: number of values");
    let largest = gradient.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    let mut moved = x.to_vec();
    for i in 0..x.len() {
        // The cube root of f64's epsilon is near the step that balances truncation and rounding.
        let step = 6e-6 * x[i].abs().max(1.0);
        let mut at = |value: f64| {
            moved[i] = value;
            f(&moved)
        };
        let slope = (at(x[i] + step) - at(x[i] - step)) / (2.0 * step);
        moved[i] = x[i];
        let off = (slope - gradient[i]).abs();
        assert!(off <= 1e-6 * largest, "{context}: [{i}] is {}, finite differences say {slope}", gradient[i]);
    }
}

/// Every kind of matrix that the kernels read, in this shape: the 4-bit formats with plain and
/// double-quantized scales, one with minima, and the dense types.
pub fn matrices(seed: u64, rows: usize, cols: usize, amplitude: f32) -> Vec<(String, HostMatrix)> {
    let dense = values(seed, rows * cols, amplitude);
    let mut all = Vec::new();
    for (format, block) in [(Format::Nf4, 64), (Format::Fp4, 32), (Format::Int4, 128)] {
        for double in [false, true] {
            let options = QuantOptions { format, block, double: DoubleQuant::None };
            let options = if double { options.double_quant() } else { options };
            let matrix = QuantizedMatrix::quantize(dense.as_slice().into(), rows, cols, &options).unwrap();
            all.push((format!("{format} block {block} double {double}"), matrix.into()));
        }
    }
    all.push(("counting codebook with minima".into(), with_minima(seed, rows, cols, amplitude).into()));
    let to_dense = |data| HostMatrix::from(DenseMatrix::new(rows, cols, data).unwrap());
    all.push(("f32".into(), to_dense(DenseData::F32(dense.clone()))));
    all.push(("f16".into(), to_dense(DenseData::F16(dense.iter().map(|&v| half::f16::from_f32(v)).collect()))));
    all.push(("bf16".into(), to_dense(DenseData::Bf16(dense.iter().map(|&v| half::bf16::from_f32(v)).collect()))));
    if cols.is_multiple_of(32) {
        all.push(("q8_0".into(), DenseMatrix::quantize_q8_0(&dense, rows, cols).unwrap().into()));
    }
    all
}

/// A matrix like Q4_K's: codes count up from 0, scales and minima are double-quantized.
fn with_minima(seed: u64, rows: usize, cols: usize, amplitude: f32) -> QuantizedMatrix {
    let n = rows * cols;
    let blocks = n.div_ceil(32);
    let bytes =
        |seed: u64, len: usize| values(seed, len, 128.0).into_iter().map(|v| (v + 128.0) as u8).collect::<Vec<_>>();
    let scales = |seed: u64, sign: f32| {
        Scales::Double(DoubleScales {
            codes: bytes(seed, blocks),
            table: Box::new(std::array::from_fn(|i| sign * i as f32 / 255.0)),
            supers: values(seed + 1, blocks.div_ceil(8), amplitude / 16.0),
            super_block: 8,
            offset: 0.0,
        })
    };
    let mut codes: Vec<u8> = bytes(seed + 2, n.div_ceil(2));
    if n % 2 == 1 {
        // The spare nibble holds the code for zero.
        codes[n / 2] &= 0xf0;
    }
    QuantizedMatrix::from_parts(Parts {
        format: Format::Int4,
        rows,
        cols,
        codes,
        codebook: Codebook(std::array::from_fn(|i| i as f32)),
        block: 32,
        scales: scales(seed + 3, 1.0),
        mins: Some(scales(seed + 5, -8.0)),
        dtype: Dtype::F32,
    })
    .unwrap()
}

/// Compares values with a bound for each, and prints the first mismatches.
///
/// # Panics
/// If a value is off by more than its bound.
pub fn assert_close(context: &str, got: &[f32], wanted: &[f64], bounds: &[f64]) {
    assert_eq!(got.len(), wanted.len(), "{context}: number of values");
    // NaN counts as off.
    let close = |i: usize| (f64::from(got[i]) - wanted[i]).abs() <= bounds[i];
    let off = |&i: &usize| !close(i);
    let bad: Vec<usize> = (0..got.len()).filter(off).collect();
    let shown = bad.iter().take(5).map(|&i| format!("[{i}] got {}, wanted {} +- {:e}", got[i], wanted[i], bounds[i]));
    assert!(
        bad.is_empty(),
        "{context}: {} of {} values off: {}",
        bad.len(),
        got.len(),
        shown.collect::<Vec<_>>().join("; ")
    );
}

/// Checks a kernel that adds its result to a given sum. The new sum must be within bounds of the
/// expected values, whether or not other tensors share the old one. It must be updated in place if
/// none does.
///
/// # Panics
/// If a check fails.
pub fn assert_adds(
    context: &str,
    result: &Tensor,
    bound: impl Fn(usize, f64) -> f64,
    onto: impl Fn(Option<Tensor>) -> Result<Tensor>,
) {
    let before = values(99, result.len(), 1e-2);
    let sum = Tensor::from_slice(&result.device(), result.shape(), &before).unwrap();
    let shared = onto(Some(sum.clone())).unwrap().to_vec().unwrap();
    assert_eq!(sum.to_vec().unwrap(), before, "{context}: a clone must not change");
    let place = sum.place();
    let own = onto(Some(sum)).unwrap();
    assert!(own.place() == place, "{context}: a sum of its own is not copied");
    let own = own.to_vec().unwrap();
    assert_eq!(own, shared, "{context}: shared and not");
    let result = result.to_vec().unwrap();
    let wanted: Vec<f64> = before.iter().zip(&result).map(|(sum, result)| f64::from(sum + result)).collect();
    let bounds: Vec<f64> = wanted.iter().enumerate().map(|(i, &wanted)| bound(i, wanted)).collect();
    assert_close(&format!("{context} added to a sum"), &own, &wanted, &bounds);
}

/// Evaluates a reference in f64 on these values and on their absolute values: returns sums of
/// products, and the sums of the terms' absolute values.
pub fn with_terms<const N: usize>(
    values: [&[f32]; N],
    reference: impl Fn([&[f64]; N]) -> Vec<f64>,
) -> (Vec<f64>, Vec<f64>) {
    let wide = |f: fn(f32) -> f32| values.map(|values| values.iter().map(|&v| f64::from(f(v))).collect::<Vec<_>>());
    let of = |wide: &[Vec<f64>; N]| reference(std::array::from_fn(|i| wide[i].as_slice()));
    (of(&wide(|v| v)), of(&wide(f32::abs)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::tolerances::{KERNELS, MODELS, TRAINING};

    #[test]
    fn docs_accuracy_has_the_tolerances_of_the_tests() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = root.join("docs/accuracy.md");
        let page = std::fs::read_to_string(&path).unwrap();
        let mut wanted = page.clone();
        for (title, table) in [("| kernel |", KERNELS), ("| model |", MODELS), ("| training |", TRAINING)] {
            // The first two lines are titles.
            let start = wanted.find(title).unwrap_or_else(|| panic!("docs/accuracy.md has a table {title}"));
            let rows = start + wanted[start..].match_indices('\n').nth(1).unwrap().0 + 1;
            let end = rows + wanted[rows..].find("\n\n").unwrap() + 1;
            wanted.replace_range(rows..end, &table.iter().map(|tolerance| tolerance.row() + "\n").collect::<String>());
            for tolerance in table {
                assert!(root.join(tolerance.test).is_file(), "there is no {}", tolerance.test);
            }
        }
        if std::env::var_os("QLORA_UPDATE_DOCS").is_some_and(|value| value == "1") {
            std::fs::write(&path, &wanted).unwrap();
        } else {
            assert!(
                page == wanted,
                "docs/accuracy.md differs from tests/common/tolerances.rs; \
                 `QLORA_UPDATE_DOCS=1 cargo test --lib docs_accuracy` writes it"
            );
        }
    }
}
