//! `norm[n]` = the length of row n of deq(W) + s * B * A, the divisor of DoRA's magnitude. `[N]`,
//! from W [N, K], B [N, r], A [r, K]. W is decoded on the way and never stored whole.
//!
//! Reference: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, section 4.3: no
//! gradient flows through the norm. The smallest result is the smallest normal f32, so that a row
//! of zeros, whose magnitude is zero too, has a factor of 0.

use rayon::prelude::*;

use crate::device::{Buffer, Defines, Device, Dispatch, Gpu, Tier};
use crate::error::{Error, Result};
use crate::kernels::cpu::simd;
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::matrix::dequantize::{CPU_ROWS, Delta, host_rows};
use crate::kernels::matrix::packing::{MatrixLayout, Part};
use crate::kernels::matrix::variants::matrices;
use crate::kernels::{Scratch, kernel, params};
use crate::tensor::Tensor;

const OP: &str = "dora_norm";

params! {
    struct DoraNormParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
        /// Words of eight weights per row.
        words: u32,
        /// Rows of W in the part.
        rows: u32,
        /// Row of B and place in the result, for the part's first row of W.
        column: u32,
        /// 0: no adapter.
        rank: u32,
        lora_scale: f32,
        m: MatrixLayout,
    }
}

kernel! {
    KERNEL = "dora_norm" in "lora/dora_norm.wgsl", DoraNormParams, [w: Read, a: Read, b: Read, norm: Write],
    variants: |tier| matrices().into_iter().map(|matrix| defines(matrix, tier)).collect(),
    twin: tests::twin,
}

/// Computes the lengths of the rows of deq(W) + s * B * A on the device of `w`: `[N]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DeviceMismatch`], and device errors.
pub fn dora_norm(w: &DeviceMatrix, delta: Option<Delta<'_>>) -> Result<Tensor> {
    if let Some(delta) = delta {
        delta.check(OP, w)?;
    }
    let (n, k) = (w.rows(), w.cols());
    match (w.device(), w.host(), w.gpu()) {
        (Device::Cpu(cpu), Some(matrix), _) => {
            let mut norm = cpu.zeros(n)?;
            let delta = delta.map(|delta| delta.host(OP)).transpose()?;
            norm.par_chunks_mut(CPU_ROWS).enumerate().try_for_each(|(task, norm)| {
                let mut rows = cpu.zeros(norm.len() * k)?;
                host_rows(matrix, delta, task * CPU_ROWS, &mut rows);
                for (norm, row) in norm.iter_mut().zip(rows.chunks_exact(k)) {
                    *norm = simd::dot(row, row).sqrt().max(f32::MIN_POSITIVE);
                }
                Ok::<_, Error>(())
            })?;
            Ok(Tensor::from_host(&cpu, &[n], norm))
        }
        (_, _, Some((gpu, parts))) => {
            let norm = Tensor::uninit(gpu, "row norms", &[n])?;
            for part in parts {
                dispatch(gpu, part, w, delta, norm.buffer(gpu, OP)?)?;
            }
            Ok(norm)
        }
        (Device::Cpu(cpu), None, None) => scratch(n, k).beside(&cpu, &[n]),
        // Unreachable: a matrix on the CPU has its host form.
        (device, ..) => Err(Error::DeviceMismatch { op: OP, left: device.name().into(), right: "cpu".into() }),
    }
}

/// Memory that [`dora_norm`] takes beside its result on the CPU, for W [N, K].
fn scratch(n: usize, k: usize) -> Scratch {
    Scratch::tasks((0..n).step_by(CPU_ROWS).map(|first| CPU_ROWS.min(n - first) * k))
}

/// Returns the rows of W per owner, and the invocations per workgroup. The owner is an invocation
/// on software drivers, a workgroup on hardware.
fn tile(tier: Tier) -> (u32, u32) {
    if tier == Tier::Software { (2, 8) } else { (4, 64) }
}

fn defines(matrix: Defines, tier: Tier) -> Defines {
    let (rows, threads) = tile(tier);
    matrix.with("rows", rows).with("threads", threads).with("software", tier == Tier::Software)
}

fn dispatch(gpu: &Gpu, part: &Part, w: &DeviceMatrix, delta: Option<Delta<'_>>, norm: &Buffer) -> Result<()> {
    let unused = gpu.unused()?;
    let (a, b, rank, lora_scale) = match delta.filter(|delta| delta.a.shape()[0] > 0) {
        Some(delta) => (delta.a.buffer(gpu, OP)?, delta.b.buffer(gpu, OP)?, delta.a.shape()[0] as u32, delta.scale),
        None => (unused, unused, 0, 0.0),
    };
    let (rows, threads) = tile(gpu.tier());
    let group_rows = if gpu.tier() == Tier::Software { rows * threads } else { rows };
    let k = w.cols();
    let params = DoraNormParams {
        k: k as u32,
        words: k.div_ceil(8) as u32,
        rows: part.rows.len() as u32,
        column: part.rows.start as u32,
        rank,
        lora_scale,
        m: part.layout,
        ..Default::default()
    };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(w.defines(), gpu.tier()),
        buffers: &[&part.buffer, a, b, norm],
        params: bytemuck::bytes_of(&params),
        groups: part.rows.len().div_ceil(group_rows as usize) as u64,
        flops_per_group: 2 * u64::from(group_rows) * u64::from(rank + 1) * k as u64,
    })
}

/// The formula, for any real type: `w` is [N, K], `delta` (A [r, K], B [N, r], s).
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(w: &[T], k: usize, delta: Option<(&[T], &[T], T)>) -> Vec<T> {
    let value = |row: usize, col: usize| {
        let merged = delta.map(|(a, b, scale)| {
            let rank = a.len() / k;
            scale * (0..rank).map(|j| b[row * rank + j] * a[j * k + col]).sum::<T>()
        });
        w[row * k + col] + merged.unwrap_or(T::zero())
    };
    let squares = |row: usize| (0..k).map(|col| value(row, col).powi(2)).sum::<T>();
    (0..w.len() / k).map(|row| squares(row).sqrt().max(T::of(f32::MIN_POSITIVE))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::HostMatrix;
    use crate::testing;
    use crate::testing::tolerances::COLUMN_SUMS;

    fn check(device: &Device, kind: &str, matrix: &HostMatrix, rank: usize, seed: u64) {
        let (n, k) = (matrix.rows(), matrix.cols());
        let (a, b) = (testing::values(seed, rank * k, 1.0), testing::values(seed + 1, n * rank, 0.1));
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let (a_tensor, b_tensor) = (tensor(&[rank, k], &a), tensor(&[n, rank], &b));
        let w = DeviceMatrix::new(device, matrix.clone()).unwrap();
        let norm = dora_norm(&w, (rank > 0).then_some(Delta { a: &a_tensor, b: &b_tensor, scale: 0.5 })).unwrap();
        assert_eq!(norm.shape(), [n]);
        let mut dense = vec![0.0; n * k];
        matrix.dequantize_rows(0..n, &mut dense);
        // Norms of the absolute values: an upper bound for the norm's terms.
        let (wanted, terms) =
            testing::with_terms([&dense, &a, &b], |[w, a, b]| reference(w, k, (rank > 0).then_some((a, b, 0.5))));
        let bounds = COLUMN_SUMS.f32.bounds(&terms);
        let context = format!("{} {kind} {n} x {k} r={rank}", testing::name(device));
        testing::assert_close(&context, &norm.to_vec().unwrap(), &wanted, &bounds);
    }

    pub fn twin(device: &Device) {
        for (n, k, rank) in [(35, 64, 16), (5, 13, 3)] {
            for (kind, matrix) in testing::matrices(5, n, k, 0.1) {
                check(device, &kind, &matrix, rank, 1);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            n in 1..=257usize,
            k in prop_oneof![1..=257usize, (1..=32usize).prop_map(|words| 8 * words)],
            rank in 0..=40usize,
            seed in 0..1000u64,
        ) {
            // 4-bit with plain scales, or dense: few variants to compile.
            let (kind, matrix) = testing::matrices(seed, n, k, 0.1).swap_remove(seed as usize % 2 * 7);
            for device in testing::devices() {
                check(&device, &kind, &matrix, rank, seed);
            }
        }
    }

    #[test]
    fn a_matrix_over_the_binding_limit_and_rows_of_zeros() {
        for device in testing::gpus_with(|options| options.max_binding_bytes = Some(24_000)) {
            let (kind, matrix) = testing::matrices(3, 601, 96, 0.1).swap_remove(1);
            assert!(DeviceMatrix::new(&device, matrix.clone()).unwrap().part_count() > 1);
            check(&device, &kind, &matrix, 5, 3);
        }
        let zeros = crate::quant::DenseMatrix::new(3, 8, crate::quant::DenseData::F32(vec![0.0; 24])).unwrap();
        for device in testing::devices() {
            let norm = dora_norm(&DeviceMatrix::new(&device, HostMatrix::from(zeros.clone())).unwrap(), None).unwrap();
            assert_eq!(norm.to_vec().unwrap(), [f32::MIN_POSITIVE; 3], "{}", testing::name(&device));
        }
    }

    #[test]
    fn shapes_that_disagree_are_named() {
        let device = Device::cpu();
        let (_, matrix) = testing::matrices(1, 4, 32, 1.0).swap_remove(0);
        let w = DeviceMatrix::new(&device, matrix).unwrap();
        let zeros = |shape: &[usize]| Tensor::zeros(&device, shape).unwrap();
        let message = |a: &[usize], b: &[usize]| {
            dora_norm(&w, Some(Delta { a: &zeros(a), b: &zeros(b), scale: 1.0 })).unwrap_err().to_string()
        };
        assert_eq!(message(&[2, 31], &[4, 2]), "dora_norm: A: expected [2, 32], got [2, 31]");
        assert_eq!(message(&[2, 32], &[4, 3]), "dora_norm: B: expected [4, 2], got [4, 3]");
    }
}
