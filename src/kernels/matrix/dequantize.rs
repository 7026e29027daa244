//! deq(W) + s * B * A: rows of a matrix as f32, with an adapter merged in if there is one.
//!
//! Without an adapter a device's values equal the host's to the bit. The exceptions: a driver may
//! flush subnormals, and where it fuses `table * super + offset` the result may differ by one ulp.

use std::ops::Range;

use gemm::Parallelism;
use ndarray::Array2;
use rayon::prelude::*;

use super::device_matrix::DeviceMatrix;
use super::packing::{MatrixLayout, Part};
use super::variants::matrices;
use crate::device::{Buffer, Defines, Dispatch, Gpu};
use crate::error::{Error, Result};
use crate::kernels::cpu::product::{Columns, View};
use crate::kernels::{expect_2d, expect_shape, kernel, params};
use crate::quant::HostMatrix;
use crate::tensor::{Tensor, from_bytes};

const OP: &str = "dequantize";

params! {
    struct DequantizeParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
        /// First row of W to write, within the part.
        first_row: u32,
        /// Rows to write.
        rows: u32,
        /// Row of B for the part's first row of W.
        column: u32,
        /// 0: no adapter.
        rank: u32,
        lora_scale: f32,
        m: MatrixLayout,
    }
}

kernel! {
    KERNEL = "dequantize" in "matrix/dequantize.wgsl", DequantizeParams, [w: Read, a: Read, b: Read, y: Write],
    variants: |_| matrices().into_iter().map(defines).collect(),
    twin: tests::twin,
}

/// Invocations per workgroup.
const THREADS: u32 = 64;

/// Maximum values decoded between two readbacks, so that neither side holds the whole matrix
/// twice.
const CHUNK_VALUES: usize = 16 << 20;

/// An adapter to merge: s * B * A.
#[derive(Clone, Copy)]
pub struct Delta<'a> {
    /// A, [r, K].
    pub a: &'a Tensor,
    /// B, [N, r].
    pub b: &'a Tensor,
    /// s.
    pub scale: f32,
}

/// A delta in host memory: A, B, s.
pub(crate) type HostDelta<'a> = (&'a [f32], &'a [f32], f32);

impl<'a> Delta<'a> {
    /// Returns an error unless the delta can be added to `w`.
    pub(crate) fn check(&self, op: &'static str, w: &DeviceMatrix) -> Result<()> {
        let (rank, _) = expect_2d(op, "A", self.a)?;
        expect_shape(op, "A", self.a, &[rank, w.cols()])?;
        expect_shape(op, "B", self.b, &[w.rows(), rank])?;
        w.device().same(&self.a.device(), op)?;
        w.device().same(&self.b.device(), op)
    }

    pub(crate) fn host(&self, op: &'static str) -> Result<HostDelta<'a>> {
        Ok((self.a.host(op)?, self.b.host(op)?, self.scale))
    }
}

/// Adds text constants to those of the matrix.
pub(crate) fn defines(matrix: Defines) -> Defines {
    matrix.with("threads", THREADS)
}

/// Returns deq(W) + s * B * A on the host, [N, K] f32, computed on the device of `w`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DeviceMismatch`], and device errors.
pub fn dequantize(w: &DeviceMatrix, delta: Option<Delta<'_>>) -> Result<Array2<f32>> {
    let (n, k) = (w.rows(), w.cols());
    if let Some(delta) = delta {
        delta.check(OP, w)?;
    }
    let mut values = vec![0.0; n * k];
    match (w.host(), w.gpu()) {
        (Some(matrix), _) => {
            let delta = delta.map(|delta| delta.host(OP)).transpose()?;
            values.par_chunks_mut(CPU_ROWS * k).enumerate().for_each(|(task, out)| {
                host_rows(matrix, delta, task * CPU_ROWS, out);
            });
        }
        (_, Some((gpu, parts))) => on_gpu(gpu, parts, w, delta, &mut values)?,
        (None, None) => {}
    }
    Array2::from_shape_vec((n, k), values).map_err(|error| Error::shape(OP, "result", format!("[{n}, {k}]"), error))
}

/// Rows per task on the CPU.
pub(crate) const CPU_ROWS: usize = 64;

/// Decodes rows from `first` on, as many as `out` holds.
pub(crate) fn host_rows(matrix: &HostMatrix, delta: Option<HostDelta<'_>>, first: usize, out: &mut [f32]) {
    let k = matrix.cols();
    let rows = out.len() / k;
    matrix.dequantize_rows(first..first + rows, out);
    if let Some((a, b, scale)) = delta {
        let rank = a.len() / k;
        let left = View { data: &b[first * rank..], row_stride: rank, col_stride: 1 };
        let right = View { data: a, row_stride: k, col_stride: 1 };
        Columns::new(out, rows, k).product(left, right, rank, scale, true, Parallelism::None);
    }
}

fn on_gpu(gpu: &Gpu, parts: &[Part], w: &DeviceMatrix, delta: Option<Delta<'_>>, values: &mut [f32]) -> Result<()> {
    let k = w.cols();
    let most = CHUNK_VALUES.min(gpu.limits().max_binding_bytes as usize / 4);
    let chunk = (most / k).max(1);
    for part in parts {
        for start in part.rows.clone().step_by(chunk) {
            let rows = start..(start + chunk).min(part.rows.end);
            let buffer = gpu.alloc("dequantized rows", (rows.len() * k * 4) as u64)?;
            rows_on_gpu(gpu, part, w, delta, rows.clone(), &buffer)?;
            let read = from_bytes(&gpu.read(&buffer, (rows.len() * k * 4) as u64)?);
            values[rows.start * k..rows.end * k].copy_from_slice(&read);
        }
    }
    Ok(())
}

/// Records the kernel for `rows` of the matrix, all of them in `part`.
fn rows_on_gpu(
    gpu: &Gpu,
    part: &Part,
    w: &DeviceMatrix,
    delta: Option<Delta<'_>>,
    rows: Range<usize>,
    out: &Buffer,
) -> Result<()> {
    let unused = gpu.unused()?;
    let (a, b, rank, lora_scale) = match delta.filter(|delta| delta.a.shape()[0] > 0) {
        Some(delta) => (delta.a.buffer(gpu, OP)?, delta.b.buffer(gpu, OP)?, delta.a.shape()[0] as u32, delta.scale),
        None => (unused, unused, 0, 0.0),
    };
    let k = w.cols();
    let params = DequantizeParams {
        k: k as u32,
        first_row: (rows.start - part.rows.start) as u32,
        rows: rows.len() as u32,
        column: part.rows.start as u32,
        rank,
        lora_scale,
        m: part.layout,
        ..Default::default()
    };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(w.defines()),
        buffers: &[&part.buffer, a, b, out],
        params: bytemuck::bytes_of(&params),
        groups: (rows.len() * k.div_ceil(8)).div_ceil(THREADS as usize) as u64,
        flops_per_group: 16 * u64::from(THREADS) * u64::from(rank + 1),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::testing;
    use crate::testing::tolerances::MERGE;

    /// lavapipe on Debian 12 computes like the host; other drivers may flush subnormals and fuse a
    /// multiply-add.
    fn is_exact(device: &Device) -> bool {
        match device {
            Device::Cpu(_) => true,
            Device::Gpu(gpu) => gpu.info().driver_info.contains("Mesa 22.3"),
        }
    }

    fn check_exact(device: &Device, kind: &str, matrix: &HostMatrix) {
        let (n, k) = (matrix.rows(), matrix.cols());
        let mut wanted = vec![0.0; n * k];
        matrix.dequantize_rows(0..n, &mut wanted);
        let w = DeviceMatrix::new(device, matrix.clone()).unwrap();
        let double = w.is_double_quantized();
        let most = wanted.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let got = dequantize(&w, None).unwrap();
        for (i, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            // On other drivers subnormals may be zero, and a double-quantized scale may be fused,
            // to within one ulp of its largest term.
            let fused = if double { f32::EPSILON * (wanted.abs() + most) } else { 0.0 };
            let close = got.to_bits() == wanted.to_bits()
                || (!is_exact(device) && (got - wanted).abs() <= fused.max(f32::MIN_POSITIVE));
            assert!(close, "{} {kind} {n} x {k}: [{i}] got {got:e}, wanted {wanted:e}", testing::name(device));
        }
        assert!(*w.to_host().unwrap() == *matrix, "{} {kind} {n} x {k}: round trip", testing::name(device));
    }

    fn check_merge(device: &Device, matrix: &HostMatrix, rank: usize, seed: u64) {
        let (n, k) = (matrix.rows(), matrix.cols());
        let (a, b) = (testing::values(seed, rank * k, 1.0), testing::values(seed + 1, n * rank, 1.0));
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let (a_tensor, b_tensor) = (tensor(&[rank, k], &a), tensor(&[n, rank], &b));
        let w = DeviceMatrix::new(device, matrix.clone()).unwrap();
        let got = dequantize(&w, Some(Delta { a: &a_tensor, b: &b_tensor, scale: 0.5 })).unwrap();
        let mut base = vec![0.0; n * k];
        matrix.dequantize_rows(0..n, &mut base);
        let (mut wanted, mut all_terms) = (Vec::new(), Vec::new());
        for (i, base) in base.into_iter().enumerate() {
            let (row, col) = (i / k, i % k);
            let terms = (0..rank).map(|j| 0.5 * f64::from(b[row * rank + j]) * f64::from(a[j * k + col]));
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
            wanted.push(f64::from(base) + sum);
            all_terms.push(f64::from(base.abs()) + magnitude);
        }
        let context = format!("{} merge {n} x {k} r={rank}", testing::name(device));
        testing::assert_close(&context, got.as_slice().unwrap(), &wanted, &MERGE.f32.bounds(&all_terms));
    }

    pub fn twin(device: &Device) {
        for (n, k) in [(5, 64), (33, 70), (5, 13), (3, 1), (64, 160)] {
            for (kind, matrix) in testing::matrices(5, n, k, 0.1) {
                check_exact(device, &kind, &matrix);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            n in 1..=257usize,
            k in 1..=257usize,
            rank in 1..=40usize,
            seed in 0..1000u64,
        ) {
            let mut matrices = testing::matrices(seed, n, k, 0.1);
            let (kind, matrix) = matrices.swap_remove(seed as usize % matrices.len());
            for device in testing::devices() {
                check_exact(&device, &kind, &matrix);
                check_merge(&device, &matrix, rank, seed);
            }
        }
    }

    #[test]
    fn a_result_over_the_binding_limit_comes_in_chunks() {
        for device in testing::gpus_with(|options| options.max_binding_bytes = Some(8192)) {
            let (kind, matrix) = testing::matrices(5, 300, 64, 0.1).swap_remove(1);
            check_exact(&device, &kind, &matrix);
        }
    }
}
