//! Y = X * W^T + bias + s * H * B^T: the fused product with a packed matrix and an adapter.
//!
//! | letter | meaning | shape |
//! |---|---|---|
//! | X | activations | [M, K] |
//! | W | 4-bit or dense matrix, decoded on the way and never stored whole | [N, K] |
//! | bias | added to every row; or a residual, added row by row | `[N]` or [M, N] |
//! | H, B, s | adapter: H = X * A^T ([`lora_down`](crate::kernels::lora::down)), B and its scale | [M, r], [N, r] |
//!
//! Reference: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, equation 5.
//! W stands for its dequantized f32 values; sums are f32. Forms: [`qmatmul_gemv`](super) for few
//! rows, register tiles, one by cooperative matrices, and one for software drivers. On the CPU:
//! SIMD for few rows, a GEMM crate over decoded tiles for many.

pub(crate) mod call;
pub(crate) mod coop;
pub(crate) mod cpu;
pub mod dx;
pub(crate) mod gemv;
pub(crate) mod lanes;
pub(crate) mod tile;

use self::call::{GEMV_ROWS, GpuCall, HostLora, OP};
use self::coop::splits;
use crate::device::Tier;
use crate::error::{Error, Result};
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::rows::column_sum::Partial;
use crate::kernels::{LoraUp, RowFactors, Rows, expect_2d, expect_shape};
use crate::tensor::{Storage, Tensor};

/// Computes X * W^T + bias + s * H * B^T on the device of `x`: [M, N].
///
/// # Errors
/// [`Error::Shape`] if shapes disagree, [`Error::DeviceMismatch`], and the device's own errors.
/// Values are not checked: NaN and infinities propagate as in the formula.
pub fn qmatmul(x: &Tensor, w: &DeviceMatrix, bias: Option<&Tensor>, lora: Option<LoraUp<'_>>) -> Result<Tensor> {
    product(Rows { tensor: x, factors: &RowFactors::default() }, Product { w, bias, lora })
}

/// Everything that X is multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// W, [N, K].
    pub w: &'a DeviceMatrix,
    /// `[N]`, added to every row of the result, or [M, N], added row by row.
    pub bias: Option<&'a Tensor>,
    /// The adapter's part.
    pub lora: Option<LoraUp<'a>>,
}

/// Like [`qmatmul`], for an X that other kernels also read.
pub(crate) fn product(rows: Rows<'_>, Product { w, bias, lora }: Product<'_>) -> Result<Tensor> {
    let x = rows.tensor;
    let (m, k) = expect_2d(OP, "x", x)?;
    let n = w.rows();
    if k != w.cols() {
        return Err(Error::shape(OP, "columns of x", format!("{} for a matrix {n} x {}", w.cols(), w.cols()), k));
    }
    x.device().same(&w.device(), OP)?;
    if let Some(bias) = bias {
        let residual = [m, n];
        expect_shape(OP, "bias", bias, if bias.shape().len() == 1 { &residual[1..] } else { &residual })?;
    }
    if let Some(lora) = lora {
        let (_, rank) = expect_2d(OP, "B", lora.b)?;
        expect_shape(OP, "B", lora.b, &[n, rank])?;
        expect_shape(OP, "H", lora.h, &[m, rank])?;
    }
    match (x.storage(), w.host(), w.gpu()) {
        (Storage::Cpu(cpu, _), Some(matrix), _) => {
            let mut y = cpu.zeros(m * n)?;
            let lora = match lora {
                Some(lora) => Some(HostLora {
                    h: lora.h.host(OP)?,
                    b: lora.b.host(OP)?,
                    rank: lora.b.shape()[1],
                    scale: lora.scale,
                }),
                None => None,
            };
            let bias = bias.map(|bias| bias.host(OP)).transpose()?;
            cpu::forward(cpu, x.host(OP)?, matrix, bias, lora, &mut y)?;
            Ok(Tensor::from_host(cpu, &[m, n], y))
        }
        (Storage::Gpu(gpu, x), _, Some((_, parts))) => {
            let y = Tensor::uninit(gpu, "y", &[m, n])?;
            let splits = splits(gpu, split_shape([m, n, k]));
            let partial = Partial::new(gpu, "splits of a product", splits, m * n)?;
            let result = y.buffer(gpu, OP)?;
            let call = GpuCall { gpu, w, x, m, bias, lora, splits, y: partial.or(result) };
            let factor = || if gpu.tier().f16() { rows.found(gpu, OP) } else { gpu.unused() };
            for part in parts {
                match (gpu.tier(), gpu.cooperative()) {
                    _ if m == 0 => {}
                    (Tier::Software, _) => lanes::dispatch(&call, part)?,
                    _ if m <= GEMV_ROWS => gemv::dispatch(&call, part)?,
                    (_, Some(cooperative)) => {
                        coop::dispatch(&call, part, rows.packed(gpu, OP)?, cooperative)?;
                    }
                    _ => tile::dispatch(&call, part, factor()?)?,
                }
            }
            partial.add_up(gpu, result)?;
            Ok(y)
        }
        (Storage::Planned(cpu, _), ..) => cpu::scratch(m, n, k).beside(cpu, &[m, n]),
        // Unreachable: `same` has checked that there is one device.
        _ => Err(Error::DeviceMismatch { op: OP, left: x.device().name().into(), right: w.device().name().into() }),
    }
}

/// The shape of a product as [`splits`] counts it. With few rows of X it is a matrix-vector
/// product, which has no splits.
fn split_shape([m, n, k]: [usize; 3]) -> [usize; 3] {
    [m, n, if m > GEMV_ROWS { k } else { 0 }]
}

/// The formula, for any real type; every form is compared with it. `x` is [M, K], `w` [N, K],
/// `lora` (H [M, r], B [N, r], s). Returns Y and, for tolerances, the sums of the terms' absolute
/// values.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(
    x: &[T],
    w: &[T],
    [m, n, k]: [usize; 3],
    bias: Option<&[T]>,
    lora: Option<(&[T], &[T], T)>,
) -> (Vec<T>, Vec<T>) {
    let mut y = vec![T::zero(); m * n];
    let mut terms = vec![T::zero(); m * n];
    for i in 0..m {
        for j in 0..n {
            let (mut sum, mut magnitude) = (T::zero(), T::zero());
            let mut add = |term: T| {
                sum += term;
                magnitude += term.abs();
            };
            for e in 0..k {
                add(x[i * k + e] * w[j * k + e]);
            }
            if let Some((h, b, scale)) = lora {
                let rank = b.len() / n;
                for e in 0..rank {
                    add(scale * h[i * rank + e] * b[j * rank + e]);
                }
            }
            if let Some(bias) = bias {
                add(bias[if bias.len() == n { j } else { i * n + j }]);
            }
            (y[i * n + j], terms[i * n + j]) = (sum, magnitude);
        }
    }
    (y, terms)
}

/// Decodes a whole host matrix as `T`, for [`reference()`].
#[cfg(test)]
pub(crate) fn dense_of<T: crate::kernels::Real>(matrix: &crate::quant::HostMatrix) -> Vec<T> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.dequantize_rows(0..matrix.rows(), &mut values);
    values.into_iter().map(T::of).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::kernels::qmatmul::coop::Tile;
    use crate::kernels::qmatmul::dx::{LoraDx, qmatmul_dx};
    use crate::quant::HostMatrix;
    use crate::testing;
    use crate::testing::tolerances::QMATMUL;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Bias {
        No,
        /// The same for all rows.
        Row,
        /// A residual.
        Rows,
    }

    struct Case {
        m: usize,
        n: usize,
        k: usize,
        rank: usize,
        bias: Bias,
        seed: u64,
    }

    /// Runs a case on a device and compares the result with the twin in f64.
    fn check(device: &Device, kind: &str, matrix: &HostMatrix, case: &Case) {
        let &Case { m, n, k, rank, bias, seed } = case;
        let context = format!("{} {kind} M={m} N={n} K={k} r={rank} bias={bias:?}", testing::name(device));
        let x = testing::values(seed + 10, m * k, 1.0);
        let h = testing::values(seed + 11, m * rank, 1.0);
        let b = testing::values(seed + 12, n * rank, 0.1);
        let bias_shape = if bias == Bias::Rows { vec![m, n] } else { vec![n] };
        let offsets = testing::values(seed + 13, bias_shape.iter().product(), 1.0);
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let w = DeviceMatrix::new(device, matrix.clone()).unwrap();
        let (h_tensor, b_tensor) = (tensor(&[m, rank], &h), tensor(&[n, rank], &b));
        let bias_tensor = (bias != Bias::No).then(|| tensor(&bias_shape, &offsets));
        let lora = (rank > 0).then_some(LoraUp { h: &h_tensor, b: &b_tensor, scale: 2.0 });
        let y = qmatmul(&tensor(&[m, k], &x), &w, bias_tensor.as_ref(), lora).unwrap();
        assert_eq!(y.shape(), [m, n]);

        let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<f64>>();
        let (x, w, h, b) = (wide(&x), dense_of::<f64>(matrix), wide(&h), wide(&b));
        let offsets = wide(&offsets);
        let lora = (rank > 0).then_some((h.as_slice(), b.as_slice(), 2.0));
        let (wanted, terms) = reference(&x, &w, [m, n, k], (bias != Bias::No).then_some(&offsets), lora);
        let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let mut bounds = QMATMUL.f32.bounds(&terms);
        if testing::is_f16(device) && m > GEMV_ROWS {
            let norms = |rows: &[f64]| rows.chunks(k).map(norm).collect::<Vec<_>>();
            let (x_norms, w_norms) = (norms(&x), norms(&w));
            let rounding = |i: usize| QMATMUL.f16.relative * x_norms[i / n] * w_norms[i % n];
            bounds.iter_mut().enumerate().for_each(|(i, bound)| *bound += rounding(i));
        }
        testing::assert_close(&context, &y.to_vec().unwrap(), &wanted, &bounds);
    }

    /// Runs a case with those of all kinds of matrices that `kinds` chooses.
    fn check_kinds(device: &Device, case: &Case, kinds: impl Fn(usize) -> bool) {
        for (i, (kind, matrix)) in testing::matrices(case.seed, case.n, case.k, 0.1).iter().enumerate() {
            if kinds(i) {
                check(device, kind, matrix, case);
            }
        }
    }

    pub fn twin(device: &Device) {
        twin_of_few_rows(device);
        twin_of_many_rows(device);
    }

    pub fn twin_of_few_rows(device: &Device) {
        check_kinds(device, &Case { m: 1, n: 70, k: 128, rank: 16, bias: Bias::Row, seed: 7 }, |_| true);
        check_kinds(device, &Case { m: 5, n: 72, k: 64, rank: 4, bias: Bias::Rows, seed: 7 }, |i| i == 1);
    }

    pub fn twin_of_many_rows(device: &Device) {
        // Blocks within rows and across them; whole tiles and ragged edges.
        for (k, rank, bias) in [(100, 3, Bias::Row), (96, 20, Bias::Rows)] {
            check_kinds(device, &Case { m: 9, n: 66, k, rank, bias, seed: 7 }, |_| true);
        }
        // The largest shapes take long to compile on software drivers: a few kinds of matrix
        // represent all.
        check_kinds(device, &Case { m: 65, n: 130, k: 96, rank: 20, bias: Bias::Row, seed: 7 }, |i| i % 4 == 1);
        // Results are stored four at a time if N is a multiple of 4.
        for bias in [Bias::Row, Bias::Rows] {
            check_kinds(device, &Case { m: 12, n: 72, k: 64, rank: 4, bias, seed: 7 }, |i| i == 1);
        }
        // Few tiles and a long K, which cooperative matrices sum in three splits.
        check_kinds(device, &Case { m: 12, n: 70, k: 3100, rank: 4, bias: Bias::Rows, seed: 7 }, |i| i % 4 == 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            m in prop_oneof![1..=9usize, 1..=257usize],
            n in 1..=257usize,
            k in prop_oneof![1..=257usize, (1..=32usize).prop_map(|words| 8 * words)],
            rank in prop_oneof![Just(0usize), 1..=40usize, Just(512usize)],
            bias in prop_oneof![Just(Bias::No), Just(Bias::Row), Just(Bias::Rows)],
            seed in 0..1000u64,
        ) {
            let chosen = seed as usize % testing::matrices(seed, n, k, 0.1).len();
            let case = Case { m, n, k, rank, bias, seed };
            testing::devices().iter().for_each(|device| check_kinds(device, &case, |i| i == chosen));
        }
    }

    #[test]
    fn f16_staging_keeps_large_activations_and_tiny_ones() {
        let (m, n, k) = (32, 40, 64);
        for device in testing::gpus().into_iter().filter(testing::is_f16) {
            for (amplitude, weights) in [(1e5, 0.1), (1e-8, 0.1), (1.0, 1e-6), (1.0, 300.0)] {
                let x = testing::values(1, m * k, amplitude);
                let (_, matrix) = testing::matrices(2, n, k, weights).swap_remove(0);
                let w = DeviceMatrix::new(&device, matrix.clone()).unwrap();
                let y = qmatmul(&Tensor::from_slice(&device, &[m, k], &x).unwrap(), &w, None, None).unwrap();
                let x: Vec<f64> = x.into_iter().map(f64::from).collect();
                let (wanted, terms) = reference(&x, &dense_of(&matrix), [m, n, k], None, None);
                let bounds = QMATMUL.f16.bounds(&terms);
                let context = format!("{} x {amplitude} w {weights}", testing::name(&device));
                testing::assert_close(&context, &y.to_vec().unwrap(), &wanted, &bounds);
            }
        }
    }

    #[test]
    fn a_matrix_over_the_binding_limit_is_split_by_rows() {
        let case = Case { m: 3, n: 601, k: 96, rank: 5, bias: Bias::Rows, seed: 3 };
        // Without immediates, like in a browser.
        for device in testing::gpus_with(|options| {
            options.max_binding_bytes = Some(24_000);
            options.immediates = false;
        }) {
            for (kind, matrix) in testing::matrices(3, case.n, case.k, 0.1) {
                let split = DeviceMatrix::new(&device, matrix.clone()).unwrap();
                assert!(split.part_count() > 1, "{kind}");
                assert!(*split.to_host().unwrap() == matrix, "{kind}: round trip");
                check(&device, &kind, &matrix, &case);
                check(&device, &kind, &matrix, &Case { m: 9, ..case });
            }
        }
    }

    #[test]
    fn few_rows_on_the_cpu_end_within_a_register_or_not() {
        for k in [64, 128, 192, 576, 640, 1312] {
            for (kind, matrix) in testing::matrices(5, 37, k, 0.1) {
                for m in 1..=8 {
                    check(&Device::cpu(), &kind, &matrix, &Case { m, n: 37, k, rank: 3, bias: Bias::Row, seed: 5 });
                }
            }
        }
    }

    #[test]
    fn tuned_variants_give_the_same_bits() {
        let (m, n, k, rank) = (70, 150, 128, 5);
        let values = |seed, len| testing::values(seed, len, 1.0);
        let run = |device: &Device, m: usize| {
            let tensor = |seed, shape: [usize; 2]| {
                Tensor::from_slice(device, &shape, &values(seed, shape[0] * shape[1])).unwrap()
            };
            let (_, matrix) = testing::matrices(2, n, k, 0.1).swap_remove(0);
            let w = DeviceMatrix::new(device, matrix).unwrap();
            let (h, b, g, a) = (tensor(3, [m, rank]), tensor(4, [n, rank]), tensor(5, [m, rank]), tensor(6, [rank, k]));
            let y = qmatmul(&tensor(1, [m, k]), &w, None, Some(LoraUp { h: &h, b: &b, scale: 2.0 })).unwrap();
            let lora = LoraDx { g: &g, a: &a, dropout: None };
            let dx = qmatmul_dx(&tensor(7, [m, n]), &w, Some(lora)).unwrap();
            [y.to_vec().unwrap(), dx.to_vec().unwrap()]
        };
        let kernels = [
            ("qmatmul_lanes", 3),
            ("qmatmul_dx_lanes", 3),
            ("qmatmul_gemv", 4),
            ("qmatmul_tile", 2),
            ("qmatmul_dx_tile", 2),
            ("qmatmul_coop", Tile::ALL.len()),
            ("qmatmul_dx_coop", Tile::ALL.len()),
        ];
        let info = testing::adapters();
        let runs = |tier: &Tier| info.iter().all(|info| info.tiers.contains(&tier.to_string()));
        for tier in [Tier::Software, Tier::Plain, Tier::F16, Tier::CooperativeMatrix].into_iter().filter(runs) {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("tuned.json");
            let open = |tuned: bool| {
                testing::gpus_with(|options| {
                    options.tier = Some(tier);
                    options.tune = tuned.then(|| file.clone());
                })
            };
            let wanted: Vec<_> = open(false).iter().map(|device| [m, 3].map(|m| run(device, m))).collect();
            if wanted.is_empty() {
                continue;
            }
            // In the measured file, replaces the choice by each variant in turn.
            open(true).iter().for_each(|device| [m, 3].iter().for_each(|&m| drop(run(device, m))));
            let Ok(text) = std::fs::read_to_string(&file) else {
                assert!(tier == Tier::Software, "a variant of the product of few rows is always measured");
                continue;
            };
            let mut seen = 0;
            for variant in 0..Tile::ALL.len() {
                let mut chosen: serde_json::Value = serde_json::from_str(&text).unwrap();
                for (case, choice) in
                    chosen.as_object_mut().unwrap().values_mut().flat_map(|d| d.as_object_mut().unwrap())
                {
                    if !case.contains(' ') {
                        continue; // the device's speed
                    }
                    let (_, count) =
                        kernels.iter().find(|(kernel, _)| case.starts_with(&format!("{kernel} "))).unwrap();
                    *choice = (variant % count).into();
                    seen += 1;
                }
                std::fs::write(&file, chosen.to_string()).unwrap();
                for (device, wanted) in open(true).iter().zip(&wanted) {
                    assert!([m, 3].map(|m| run(device, m)) == *wanted, "{} variant {variant}", testing::name(device));
                }
            }
            assert!(seen > 0);
        }
    }

    #[test]
    fn shapes_that_disagree_are_named() {
        let device = Device::cpu();
        let (_, matrix) = testing::matrices(1, 4, 32, 1.0).swap_remove(0);
        let w = DeviceMatrix::new(&device, matrix).unwrap();
        let zeros = |shape: &[usize]| Tensor::zeros(&device, shape).unwrap();
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let wrong = message(qmatmul(&zeros(&[2, 31]), &w, None, None));
        assert!(wrong.contains("columns of x") && wrong.contains("31") && wrong.contains("32"), "{wrong}");
        assert_eq!(message(qmatmul(&zeros(&[32]), &w, None, None)), "qmatmul: x: expected [rows, columns], got [32]");
        assert_eq!(
            message(qmatmul(&zeros(&[2, 32]), &w, Some(&zeros(&[3])), None)),
            "qmatmul: bias: expected [4], got [3]"
        );
        let lora = |h: &[usize], b: &[usize]| {
            message(qmatmul(&zeros(&[2, 32]), &w, None, Some(LoraUp { h: &zeros(h), b: &zeros(b), scale: 1.0 })))
        };
        assert_eq!(lora(&[2, 3], &[4, 2]), "qmatmul: H: expected [2, 2], got [2, 3]");
        assert_eq!(lora(&[2, 3], &[5, 3]), "qmatmul: B: expected [4, 3], got [5, 3]");
    }
}
