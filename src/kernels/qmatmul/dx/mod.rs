//! dX = dY * W + mask * (G * A): the input gradient of the fused product, from the same packed
//! bytes as the forward.
//!
//! | letter | meaning | shape |
//! |---|---|---|
//! | dY | gradient of [`qmatmul`](crate::kernels::qmatmul)'s result | [M, N] |
//! | W | 4-bit or dense matrix, decoded on the way and never stored whole | [N, K] |
//! | G, A | adapter: G = s * dY * B, the gradient of H, and its down-projection | [M, r], [r, K] |
//! | mask | elementwise dropout factors of [`lora_down`](crate::kernels::lora::down); 1 without dropout | [M, K] |
//!
//! Reference: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3. W
//! stands for its dequantized f32 values; sums are f32. Forms: a register tile, one by cooperative
//! matrices, and one for software drivers; on the CPU, a GEMM crate over decoded tiles. If W is
//! split by rows into parts, they add to dX one after another.

pub(crate) mod call;
pub(crate) mod coop;
pub(crate) mod cpu;
pub(crate) mod lanes;
pub(crate) mod tile;

pub use self::call::LoraDx;
use self::call::{GpuDxCall, HostLoraDx, OP, reads_packed};
use crate::device::{Gpu, Tier};
use crate::error::{Error, Result};
use crate::kernels::elementwise::add_assign;
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::qmatmul::coop::splits;
use crate::kernels::rows::column_sum::Partial;
use crate::kernels::{RowFactors, Rows, expect_2d, expect_shape};
use crate::tensor::{Storage, Tensor};

/// Computes dY * W + mask * (G * A) on the device of `dy`: [M, K].
///
/// # Errors
/// [`Error::Shape`] if shapes disagree, [`Error::DeviceMismatch`], [`Error::Invalid`] for a
/// dropout probability outside 0..1, and the device's own errors. Values are not checked: NaN and
/// infinities propagate as in the formula.
pub fn qmatmul_dx(dy: &Tensor, w: &DeviceMatrix, lora: Option<LoraDx<'_>>) -> Result<Tensor> {
    onto(None, Rows { tensor: dy, factors: &RowFactors::default() }, w, lora)
}

/// Like [`qmatmul_dx`], for a dY that other kernels also read. Adds to `sum`, the gradient
/// accumulated so far.
pub(crate) fn onto(sum: Option<Tensor>, rows: Rows<'_>, w: &DeviceMatrix, lora: Option<LoraDx<'_>>) -> Result<Tensor> {
    let dy = rows.tensor;
    let (m, n) = expect_2d(OP, "dY", dy)?;
    let k = w.cols();
    if n != w.rows() {
        return Err(Error::shape(OP, "columns of dY", format!("{} for a matrix {} x {k}", w.rows(), w.rows()), n));
    }
    dy.device().same(&w.device(), OP)?;
    let mut adapter = None;
    if let Some(lora) = lora {
        let (rank, _) = expect_2d(OP, "A", lora.a)?;
        expect_shape(OP, "A", lora.a, &[rank, k])?;
        expect_shape(OP, "G", lora.g, &[m, rank])?;
        let dropout = lora.dropout.map_or(Ok(None), |dropout| dropout.active(OP))?;
        // Rank 0 adds nothing.
        adapter = (rank > 0).then_some(LoraDx { dropout, ..lora });
    }
    match (dy.storage(), w.host(), w.gpu()) {
        (Storage::Cpu(cpu, _), Some(matrix), _) => {
            let mut dx = cpu.zeros(m * k)?;
            let lora = match adapter {
                Some(lora) => Some(HostLoraDx {
                    g: lora.g.host(OP)?,
                    a: lora.a.host(OP)?,
                    rank: lora.rank(),
                    dropout: lora.dropout,
                }),
                None => None,
            };
            cpu::backward(cpu, dy.host(OP)?, matrix, lora, &mut dx)?;
            add_assign::finish(sum, Tensor::from_host(cpu, &[m, k], dx))
        }
        (Storage::Gpu(gpu, dy), _, Some((_, parts))) => {
            let (sum, later) = if adds_in_place(gpu) { (sum, None) } else { (None, sum) };
            let adds = sum.is_some();
            let dx = add_assign::begin(gpu, OP, sum, &[m, k])?;
            if m == 0 {
                return add_assign::finish(later, dx);
            }
            let packed = parts.iter().all(|part| reads_packed(w, part));
            // Only packed rows are summed in splits.
            let splits = splits(gpu, [m, k, if packed { n } else { 0 }]);
            let partial = Partial::new(gpu, "splits of a product", splits, m * k)?.adding(adds);
            let result = dx.buffer(gpu, OP)?;
            let adds = adds && splits == 1;
            let call = GpuDxCall { gpu, w, dy, m, lora: adapter, splits, dx: partial.or(result), adds };
            let factor = || if gpu.tier().f16() { rows.found(gpu, OP) } else { gpu.unused() };
            for part in parts {
                match (gpu.tier(), gpu.cooperative()) {
                    (Tier::Software, _) => lanes::dispatch(&call, part)?,
                    (_, Some(cooperative)) if packed => {
                        coop::dispatch(&call, part, rows.packed(gpu, OP)?, cooperative)?;
                    }
                    _ => tile::dispatch(&call, part, factor()?)?,
                }
            }
            partial.add_up(gpu, result)?;
            add_assign::finish(later, dx)
        }
        (Storage::Planned(cpu, _), ..) => add_assign::finish(sum, cpu::scratch(n, k).beside(cpu, &[m, k])?),
        // Unreachable: `same` has checked that there is one device.
        _ => Err(Error::DeviceMismatch { op: OP, left: dy.device().name().into(), right: w.device().name().into() }),
    }
}

/// Whether the kernel itself adds to a sum of gradients. On the CPU and software drivers this
/// wouldn't save a costly dispatch, and on Mesa's a kernel that also loads what it stores takes
/// half as long again to compile.
fn adds_in_place(gpu: &Gpu) -> bool {
    gpu.tier() != Tier::Software
}

/// The formula, for any real type; every form is compared with it. `dy` is [M, N], `w` [N, K],
/// `lora` (G [M, r], A [r, K], dropout). Returns dX and, for tolerances, the sums of the terms'
/// absolute values.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(
    dy: &[T],
    w: &[T],
    [m, n, k]: [usize; 3],
    lora: Option<(&[T], &[T], Option<crate::kernels::elementwise::dropout::Dropout>)>,
) -> (Vec<T>, Vec<T>) {
    let mut dx = vec![T::zero(); m * k];
    let mut terms = vec![T::zero(); m * k];
    for i in 0..m {
        for j in 0..k {
            let (mut sum, mut magnitude) = (T::zero(), T::zero());
            let mut add = |term: T| {
                sum += term;
                magnitude += term.abs();
            };
            for e in 0..n {
                add(dy[i * n + e] * w[e * k + j]);
            }
            if let Some((g, a, dropout)) = lora {
                let rank = a.len() / k;
                let mask = dropout.map_or(T::one(), |dropout| T::of(dropout.factor((i * k + j) as u32)));
                for e in 0..rank {
                    add(mask * g[i * rank + e] * a[e * k + j]);
                }
            }
            (dx[i * k + j], terms[i * k + j]) = (sum, magnitude);
        }
    }
    (dx, terms)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::kernels::elementwise::add::add;
    use crate::kernels::elementwise::dropout::Dropout;
    use crate::kernels::lora::down;
    use crate::kernels::qmatmul::tile::sides;
    use crate::kernels::qmatmul::{self, dense_of};
    use crate::quant::HostMatrix;
    use crate::testing;
    use crate::testing::tolerances::QMATMUL_DX;

    #[derive(Clone, Copy, Debug)]
    struct Case {
        m: usize,
        n: usize,
        k: usize,
        rank: usize,
        dropout: Option<Dropout>,
        seed: u64,
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().copied().map(f64::from).collect()
    }

    /// Runs a case on a device and compares the result with the twin in f64.
    fn check(device: &Device, kind: &str, matrix: &HostMatrix, case: &Case) {
        let &Case { m, n, k, rank, dropout, seed } = case;
        let context = format!("{} {kind} {case:?}", testing::name(device));
        let dy = testing::values(seed + 10, m * n, 1.0);
        let g = testing::values(seed + 11, m * rank, 1.0);
        let a = testing::values(seed + 12, rank * k, 0.1);
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let w = DeviceMatrix::new(device, matrix.clone()).unwrap();
        let (g_tensor, a_tensor) = (tensor(&[m, rank], &g), tensor(&[rank, k], &a));
        let lora = LoraDx { g: &g_tensor, a: &a_tensor, dropout };
        let dy_tensor = tensor(&[m, n], &dy);
        let dx = qmatmul_dx(&dy_tensor, &w, Some(lora)).unwrap();
        assert_eq!(dx.shape(), [m, k]);
        // Parts are added one after another, and the f16 tiles add the adapter first.
        let whole_first = match device {
            Device::Cpu(_) => true,
            Device::Gpu(gpu) => {
                let adapter_apart = gpu.tier().f16() && gpu.cooperative().is_none() && rank > 0;
                w.part_count() == 1 && !adapter_apart
            }
        };
        let onto = |sum| onto(sum, Rows { tensor: &dy_tensor, factors: &RowFactors::default() }, &w, Some(lora));

        let (dy, dense, g, a) = (wide(&dy), dense_of::<f64>(matrix), wide(&g), wide(&a));
        let (wanted, terms) = reference(&dy, &dense, [m, n, k], Some((&g, &a, dropout)));
        let row_norm = |i: usize| dy[i * n..][..n].iter().map(|value| value * value).sum::<f64>().sqrt();
        let col_norm = |j: usize| (0..n).map(|e| dense[e * k + j] * dense[e * k + j]).sum::<f64>().sqrt();
        let (rows, cols): (Vec<_>, Vec<_>) = ((0..m).map(row_norm).collect(), (0..k).map(col_norm).collect());
        let mut bounds = QMATMUL_DX.f32.bounds(&terms);
        if testing::is_f16(device) {
            let rounding = |i: usize| QMATMUL_DX.f16.relative * rows[i / k] * cols[i % k];
            bounds.iter_mut().enumerate().for_each(|(i, bound)| *bound += rounding(i));
        }
        testing::assert_close(&context, &dx.to_vec().unwrap(), &wanted, &bounds);
        let rounding = |i: usize, sum: f64| QMATMUL_DX.f32.relative * (terms[i] + sum.abs());
        testing::assert_adds(&context, &dx, |i, sum| if whole_first { 0.0 } else { rounding(i, sum) }, onto);
    }

    /// Runs a case with those of all kinds of matrices that `kinds` chooses. Only the software
    /// drivers' form uses subgroups; tiers that differ only in them are covered by smaller tests.
    fn check_kinds(device: &Device, case: &Case, kinds: impl Fn(usize) -> bool) {
        if matches!(device, Device::Gpu(gpu) if gpu.tier().subgroups() && !gpu.tier().cooperative()) {
            return;
        }
        for (i, (kind, matrix)) in testing::matrices(case.seed, case.n, case.k, 0.1).iter().enumerate() {
            if kinds(i) {
                check(device, kind, matrix, case);
            }
        }
    }

    const DROPOUT: Option<Dropout> = Some(Dropout { probability: 0.3, seed: 0x1234_5678_9abc_def0 });

    pub fn twin(device: &Device) {
        // Blocks within rows and across them; scales shared by 8 words, by 4 and by none.
        for (n, k, rank, every) in [(66, 100, 3, 1), (33, 96, 20, 1), (70, 128, 16, 3)] {
            check_kinds(device, &Case { m: 1, n, k, rank, dropout: None, seed: 7 }, |i| i % every == 0);
        }
        check_kinds(device, &Case { m: 2, n: 33, k: 128, rank: 4, dropout: DROPOUT, seed: 7 }, |i| i % 4 == 1);
        // The largest shapes take long to compile on software drivers: one kind of matrix
        // represents all.
        check_kinds(device, &Case { m: 65, n: 130, k: 192, rank: 20, dropout: None, seed: 7 }, |i| i == 1);
        // Few tiles and a long N, which cooperative matrices sum in three splits.
        check_kinds(device, &Case { m: 3, n: 3100, k: 64, rank: 4, dropout: None, seed: 7 }, |i| i == 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            m in prop_oneof![1..=9usize, 1..=257usize],
            n in 1..=257usize,
            k in prop_oneof![1..=257usize, (1..=32usize).prop_map(|words| 8 * words)],
            rank in prop_oneof![Just(0usize), 1..=40usize],
            dropout: bool,
            seed in 0..1000u64,
        ) {
            let chosen = if m <= 9 { seed as usize % testing::matrices(seed, n, k, 0.1).len() } else { 1 };
            let case = Case { m, n, k, rank, dropout: DROPOUT.filter(|_| dropout), seed };
            testing::devices().iter().for_each(|device| check_kinds(device, &case, |i| i == chosen));
        }
    }

    #[test]
    fn tiny_gradients_and_large_ones_survive_every_tier() {
        let (m, n, k) = (32, 40, 64);
        for device in testing::devices() {
            for (amplitude, weights) in [(1e4, 0.1), (1e-8, 0.1), (1e-12, 1e-6), (1.0, 300.0)] {
                let dy = testing::values(1, m * n, amplitude);
                let (g, a) = (testing::values(2, m * 4, amplitude), testing::values(3, 4 * k, 1.0));
                let (_, matrix) = testing::matrices(2, n, k, weights).swap_remove(0);
                let w = DeviceMatrix::new(&device, matrix.clone()).unwrap();
                let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(&device, shape, values).unwrap();
                let (g_tensor, a_tensor) = (tensor(&[m, 4], &g), tensor(&[4, k], &a));
                for lora in [None, Some(LoraDx { g: &g_tensor, a: &a_tensor, dropout: DROPOUT })] {
                    let dx = qmatmul_dx(&tensor(&[m, n], &dy), &w, lora).unwrap();
                    let (wide_g, wide_a) = (wide(&g), wide(&a));
                    let lora = lora.map(|lora| (wide_g.as_slice(), wide_a.as_slice(), lora.dropout));
                    let (wanted, terms) = reference(&wide(&dy), &dense_of(&matrix), [m, n, k], lora);
                    let bounds = QMATMUL_DX.f16.bounds(&terms);
                    let context = format!("{} dY x {amplitude} w {weights}", testing::name(&device));
                    testing::assert_close(&context, &dx.to_vec().unwrap(), &wanted, &bounds);
                }
            }
        }
    }

    #[test]
    fn parts_of_a_matrix_over_the_binding_limit_add_up() {
        let case = Case { m: 1, n: 601, k: 96, rank: 5, dropout: DROPOUT, seed: 3 };
        let info = testing::adapters();
        let tiers = |tier: &Tier| info.iter().all(|info| info.tiers.contains(&tier.to_string()));
        for tier in Tier::ALL.into_iter().filter(tiers) {
            // Without immediates, like in a browser.
            for device in testing::gpus_with(|options| {
                options.max_binding_bytes = Some(24_000);
                options.immediates = false;
                options.tier = Some(tier);
            }) {
                for (kind, matrix) in testing::matrices(3, case.n, case.k, 0.1).iter().step_by(3) {
                    assert!(DeviceMatrix::new(&device, matrix.clone()).unwrap().part_count() > 1, "{kind}");
                    check(&device, kind, matrix, &case);
                    check(&device, kind, matrix, &Case { m: 3, dropout: None, ..case });
                }
            }
        }
    }

    /// Passes a sum before the tiles for it have been measured.
    #[test]
    fn what_is_measured_does_not_add_up() {
        let (m, n, k) = (70, 150, 128);
        let info = testing::adapters();
        let runs = |tier: &Tier| info.iter().all(|info| info.tiers.contains(&tier.to_string()));
        for tier in [Tier::Plain, Tier::F16, Tier::CooperativeMatrix].into_iter().filter(runs) {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("tuned.json");
            for device in testing::gpus_with(|options| {
                options.tier = Some(tier);
                options.tune = Some(file.clone());
            }) {
                let (_, matrix) = testing::matrices(2, n, k, 0.1).swap_remove(0);
                let w = DeviceMatrix::new(&device, matrix).unwrap();
                let tensor = |seed, shape: [usize; 2]| {
                    Tensor::from_slice(&device, &shape, &testing::values(seed, shape[0] * shape[1], 1.0)).unwrap()
                };
                let (dy, sum) = (tensor(1, [m, n]), tensor(2, [m, k]));
                let rows = Rows { tensor: &dy, factors: &RowFactors::default() };
                let run = || onto(Some(sum.clone()), rows, &w, None).unwrap().to_vec().unwrap();
                let (measuring, then) = (run(), run());
                let wanted = add(&sum, &qmatmul_dx(&dy, &w, None).unwrap()).unwrap().to_vec().unwrap();
                assert!(measuring == wanted && then == wanted, "{}", testing::name(&device));
                let Device::Gpu(gpu) = &device else { unreachable!("only GPUs were asked for") };
                assert!(file.exists() || sides(gpu, m).len() == 1, "{} measures", testing::name(&device));
            }
        }
    }

    #[test]
    fn results_are_the_same_bytes_every_time() {
        let (m, n, k) = (33, 70, 96);
        for device in testing::devices() {
            let (_, matrix) = testing::matrices(2, n, k, 0.1).swap_remove(1);
            let w = DeviceMatrix::new(&device, matrix).unwrap();
            let dy = Tensor::from_slice(&device, &[m, n], &testing::values(1, m * n, 1.0)).unwrap();
            let run = || qmatmul_dx(&dy, &w, None).unwrap().to_vec().unwrap();
            assert_eq!(run(), run(), "{}", testing::name(&device));
        }
    }

    /// For every X, <dY, forward(X)> = <dX, X>, because the forward is linear in X.
    #[test]
    fn the_reference_is_the_adjoint_of_the_forward() {
        let (m, n, k, rank, scale) = (5, 7, 12, 3, 0.5);
        let values = |seed: u64, len: usize| wide(&testing::values(seed, len, 1.0));
        let (x, w, dy) = (values(1, m * k), values(2, n * k), values(3, m * n));
        let (a, b) = (values(4, rank * k), values(5, n * rank));
        let dot = |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(left, right)| left * right).sum::<f64>();
        for dropout in [None, DROPOUT] {
            let h = down::reference(&x, &a, [m, rank, k], dropout);
            let (y, _) = qmatmul::reference(&x, &w, [m, n, k], None, Some((&h, &b, scale)));
            let g_value = |i: usize, j: usize| (0..n).map(|e| scale * dy[i * n + e] * b[e * rank + j]).sum::<f64>();
            let g: Vec<f64> = (0..m * rank).map(|at| g_value(at / rank, at % rank)).collect();
            let (dx, _) = reference(&dy, &w, [m, n, k], Some((&g, &a, dropout)));
            let (left, right) = (dot(&dy, &y), dot(&dx, &x));
            assert!((left - right).abs() < 1e-12 * dot(&dy, &dy).sqrt() * dot(&y, &y).sqrt(), "{left} {right}");
        }
    }

    #[test]
    fn shapes_that_disagree_are_named_and_no_rows_are_no_work() {
        let device = Device::cpu();
        let (_, matrix) = testing::matrices(1, 4, 32, 1.0).swap_remove(0);
        let w = DeviceMatrix::new(&device, matrix.clone()).unwrap();
        let zeros = |shape: &[usize]| Tensor::zeros(&device, shape).unwrap();
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let wrong = message(qmatmul_dx(&zeros(&[2, 5]), &w, None));
        assert!(wrong.contains("columns of dY") && wrong.contains('5') && wrong.contains("4 x 32"), "{wrong}");
        assert_eq!(message(qmatmul_dx(&zeros(&[4]), &w, None)), "qmatmul_dx: dY: expected [rows, columns], got [4]");
        let lora = |g: &[usize], a: &[usize], probability: f32| {
            let (g, a) = (zeros(g), zeros(a));
            let dropout = Some(Dropout { probability, seed: 1 });
            message(qmatmul_dx(&zeros(&[2, 4]), &w, Some(LoraDx { g: &g, a: &a, dropout })))
        };
        assert_eq!(lora(&[2, 3], &[3, 31], 0.0), "qmatmul_dx: A: expected [3, 32], got [3, 31]");
        assert_eq!(lora(&[2, 2], &[3, 32], 0.0), "qmatmul_dx: G: expected [2, 3], got [2, 2]");
        assert_eq!(
            lora(&[2, 3], &[3, 32], 1.0),
            "qmatmul_dx: the dropout probability is 1; it must be at least 0 and less than 1"
        );
        for device in testing::devices() {
            let w = DeviceMatrix::new(&device, matrix.clone()).unwrap();
            let dx = qmatmul_dx(&Tensor::zeros(&device, &[0, 4]).unwrap(), &w, None).unwrap();
            assert_eq!((dx.shape(), dx.to_vec().unwrap().len()), (&[0, 32][..], 0));
        }
    }
}
