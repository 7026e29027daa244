//! `out[n]` = sum over m of `A[m, n]` (* `B[m, n]`): the gradient of a bias, or of DoRA's
//! magnitude.
//!
//! Tall matrices are summed in two passes over a fixed number of rows at a time, so every run
//! gives the same bits.

use rayon::prelude::*;

use crate::device::{Buffer, Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::{expect_2d, expect_shape, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "column_sum";

params! {
    struct ColumnSumParams {
        first_group: u32,
        groups: u32,
        /// M.
        rows: u32,
        /// Rows per sum.
        rows_each: u32,
        /// N.
        columns: u32,
        /// Workgroups along N.
        column_groups: u32,
        /// Factor of the sums.
        scale: f32,
        /// 1: add to the result.
        accumulate: u32,
    }
}

kernel! {
    KERNEL = "column_sum" in "rows/column_sum.wgsl", ColumnSumParams, [a: Read, b: Read, sums: Write],
    variants: |tier| [false, true].map(|product| defines(tier, product)).into(),
    twin: tests::twin,
}

/// Computes the column sums of `a` [M, N], or of `a * b`, on their device: `[N]`.
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape), `Error::DeviceMismatch`(crate::Error::DeviceMismatch),
/// and device errors.
pub fn column_sum(a: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (m, n) = expect_2d(OP, "A", a)?;
    if let Some(b) = b {
        expect_shape(OP, "B", b, &[m, n])?;
        a.device().same(&b.device(), OP)?;
    }
    match a.storage() {
        Storage::Cpu(cpu, a) => {
            let mut sums = cpu.zeros(n)?;
            on_cpu(a, b.map(|b| b.host(OP)).transpose()?, &mut sums);
            Ok(Tensor::from_host(cpu, &[n], sums))
        }
        Storage::Gpu(gpu, a) => {
            let sums = Tensor::uninit(gpu, "column sums", &[n])?;
            let b = b.map(|b| b.buffer(gpu, OP)).transpose()?;
            dispatch(gpu, a, b, [m, n], 1.0, sums.buffer(gpu, OP)?, false)?;
            Ok(sums)
        }
        Storage::Planned(cpu, _) => Tensor::planned(cpu, &[n]),
    }
}

/// Columns per task on the CPU.
const CPU_COLUMNS: usize = 256;

/// Sums in f64, which costs nothing compared with reading A.
fn on_cpu(a: &[f32], b: Option<&[f32]>, sums: &mut [f32]) {
    let n = sums.len();
    sums.par_chunks_mut(CPU_COLUMNS).enumerate().for_each(|(task, sums)| {
        let first = task * CPU_COLUMNS;
        let columns = first..first + sums.len();
        let mut totals = [0.0f64; CPU_COLUMNS];
        match b {
            Some(b) => {
                for (a, b) in a.chunks_exact(n).zip(b.chunks_exact(n)) {
                    let products = a[columns.clone()].iter().zip(&b[columns.clone()]);
                    totals.iter_mut().zip(products).for_each(|(total, (a, b))| *total += f64::from(a * b));
                }
            }
            None => {
                for a in a.chunks_exact(n) {
                    totals.iter_mut().zip(&a[columns.clone()]).for_each(|(total, a)| *total += f64::from(*a));
                }
            }
        }
        sums.iter_mut().zip(totals).for_each(|(sum, total)| *sum = total as f32);
    });
}

fn threads(tier: Tier) -> u32 {
    if tier == Tier::Software { 8 } else { 64 }
}

fn defines(tier: Tier, product: bool) -> Defines {
    Defines::new().with("threads", threads(tier)).with("product", product)
}

/// Rows per sum, so that `groups` workgroups per sum fill the device. No sum is short, and none is
/// so long that rounding errors build up.
pub(crate) fn rows_each(tier: Tier, groups: usize, rows: usize) -> usize {
    const SHORTEST: usize = 32;
    const LONGEST: usize = 1024;
    let wanted = if tier == Tier::Software { 8 } else { 512 };
    rows.div_ceil(wanted / groups.clamp(1, wanted)).clamp(SHORTEST, LONGEST)
}

/// Where workgroups write partial sums, which are then added up in order. With a single part, this
/// is the result itself.
pub(crate) struct Partial {
    parts: usize,
    values: usize,
    buffer: Option<Buffer>,
    /// Whether to add to the result.
    adds: bool,
}

impl Partial {
    /// Allocates `parts` parts of `values` results.
    pub fn new(gpu: &Gpu, what: &'static str, parts: usize, values: usize) -> Result<Partial> {
        let buffer = if parts > 1 { Some(gpu.alloc(what, (4 * parts * values) as u64)?) } else { None };
        Ok(Partial { parts, values, buffer, adds: false })
    }

    /// The same, but adds to the result if `adds`.
    pub fn adding(self, adds: bool) -> Partial {
        Partial { adds, ..self }
    }

    /// Returns the buffer that the workgroups write: [parts, values], or `result`.
    pub fn or<'a>(&'a self, result: &'a Buffer) -> &'a Buffer {
        self.buffer.as_ref().unwrap_or(result)
    }

    /// Adds up the parts into `result`.
    pub fn add_up(&self, gpu: &Gpu, result: &Buffer) -> Result<()> {
        match &self.buffer {
            Some(buffer) => dispatch(gpu, buffer, None, [self.parts, self.values], 1.0, result, self.adds),
            None => Ok(()),
        }
    }
}

/// Records the sums of `a` (times `b`) times `scale`, written to `out`, or added to it if `adds`.
pub(crate) fn dispatch(
    gpu: &Gpu,
    a: &Buffer,
    b: Option<&Buffer>,
    [m, n]: [usize; 2],
    scale: f32,
    out: &Buffer,
    adds: bool,
) -> Result<()> {
    if n == 0 {
        return Ok(());
    }
    let column_groups = (n as u32).div_ceil(threads(gpu.tier()));
    let each = each(gpu.tier(), m, n);
    let splits = m.div_ceil(each);
    let pass = |a: &Buffer, b: Option<&Buffer>, rows: usize, rows_each: usize, scale: f32, out: &Buffer, adds: bool| {
        let params = ColumnSumParams {
            rows: rows as u32,
            rows_each: rows_each as u32,
            columns: n as u32,
            column_groups,
            scale,
            accumulate: adds.into(),
            ..Default::default()
        };
        gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(gpu.tier(), b.is_some()),
            buffers: &[a, b.unwrap_or(gpu.unused()?), out],
            params: bytemuck::bytes_of(&params),
            // A sum over no rows is still written: zero.
            groups: u64::from(column_groups) * rows.div_ceil(rows_each).max(1) as u64,
            flops_per_group: 2 * u64::from(threads(gpu.tier())) * rows_each as u64,
        })
    };
    if splits <= 1 {
        return pass(a, b, m, each, scale, out, adds);
    }
    let partial = gpu.alloc("partial column sums", (splits * n * 4) as u64)?;
    pass(a, b, m, each, 1.0, &partial, false)?;
    pass(&partial, None, splits, splits, scale, out, adds)
}

/// Rows of A [M, N] per sum of the first pass.
fn each(tier: Tier, m: usize, n: usize) -> usize {
    rows_each(tier, n.div_ceil(threads(tier) as usize), m)
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(a: &[T], b: Option<&[T]>, n: usize) -> Vec<T> {
    let value = |i: usize| b.map_or(a[i], |b| a[i] * b[i]);
    (0..n).map(|column| (column..a.len()).step_by(n).map(value).sum()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::testing;
    use crate::testing::tolerances::COLUMN_SUMS;

    fn check(device: &Device, [m, n]: [usize; 2], product: bool, amplitude: f32, seed: u64) {
        let a = testing::values(seed, m * n, amplitude);
        let b = testing::values(seed + 1, m * n, 1.0);
        let tensor = |values: &[f32]| Tensor::from_slice(device, &[m, n], values).unwrap();
        let sums = column_sum(&tensor(&a), product.then(|| tensor(&b)).as_ref()).unwrap();
        assert_eq!(sums.shape(), [n]);
        let (wanted, terms) = testing::with_terms([&a, &b], |[a, b]| reference(a, product.then_some(b), n));
        let bounds = COLUMN_SUMS.f32.bounds(&terms);
        let context = format!("{} M={m} N={n} product {product} A {amplitude}", testing::name(device));
        testing::assert_close(&context, &sums.to_vec().unwrap(), &wanted, &bounds);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            m in prop_oneof![1..=257usize, 1000..5000usize],
            n in 1..=257usize,
            product: bool,
            seed in 0..1000u64,
        ) {
            for device in testing::devices() {
                check(&device, [m, n], product, 1.0, seed);
            }
        }
    }

    pub fn twin(device: &Device) {
        for (shape, amplitude) in [([0, 3], 1.0), ([3, 0], 1.0), ([300, 70], 1e-8), ([5000, 3], 1e4)] {
            check(device, shape, true, amplitude, 1);
        }
    }

    #[test]
    fn a_tall_sum_of_one_sign_is_exact_enough_and_the_same_every_time() {
        let values: Vec<f32> = testing::values(1, 20_000 * 3, 1.0).into_iter().map(f32::abs).collect();
        for device in testing::devices() {
            let a = Tensor::from_slice(&device, &[20_000, 3], &values).unwrap();
            let sums = || column_sum(&a, None).unwrap().to_vec().unwrap();
            let (wanted, _) = testing::with_terms([&values], |[a]| reference(a, None, 3));
            let bounds: Vec<f64> = wanted.iter().map(|sum| 1e-6 * sum).collect();
            testing::assert_close(&testing::name(&device), &sums(), &wanted, &bounds);
            assert_eq!(sums(), sums());
        }
    }

    #[test]
    fn shapes_that_disagree_are_named() {
        let zeros = |shape: &[usize]| Tensor::zeros(&Device::cpu(), shape).unwrap();
        assert_eq!(
            column_sum(&zeros(&[2, 3]), Some(&zeros(&[3, 2]))).unwrap_err().to_string(),
            "column_sum: B: expected [2, 3], got [3, 2]"
        );
        assert_eq!(
            column_sum(&zeros(&[2]), None).unwrap_err().to_string(),
            "column_sum: A: expected [rows, columns], got [2]"
        );
    }
}
