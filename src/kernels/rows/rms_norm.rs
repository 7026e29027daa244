//! y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps), over the last K values: a row of a
//! hidden state, or one head of it.
//!
//! Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

use rayon::prelude::*;

use super::teams::{RowTeams, is_ragged};
use crate::device::{Buffer, Defines, Dispatch, Gpu, Kernel, Tier};
use crate::error::{Error, Result};
use crate::kernels::cpu::simd::dot;
use crate::kernels::{kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "rms_norm";

params! {
    /// Also used by the backward kernel.
    struct RmsNormParams {
        first_group: u32,
        groups: u32,
        /// K, values per row.
        k: u32,
        rows: u32,
        /// Added to the mean of the squares.
        eps: f32,
    }
}

kernel! {
    KERNEL = "rms_norm" in "rows/rms_norm.wgsl", RmsNormParams, [x: Read, w: Read, y: Write],
    variants: |tier| [false, true].map(|ragged| RowTeams::short(tier).row_defines(ragged)).to_vec(),
    twin: tests::twin,
}

/// Text constants for rows of `k` values.
pub(crate) fn defines(tier: Tier, k: usize) -> Defines {
    RowTeams::short(tier).row_defines(is_ragged(k))
}

/// Normalizes every run of K values of `x`, of any shape, and multiplies them by `weight` `[K]`.
///
/// # Errors
/// [`Error::Shape`] if `x` doesn't consist of whole runs of K, [`Error::DeviceMismatch`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let k = row_len(OP, x, weight)?;
    x.device().same(&weight.device(), OP)?;
    match x.storage() {
        Storage::Cpu(cpu, values) => {
            let mut y = cpu.zeros(x.len())?;
            let weight = weight.host(OP)?;
            let task = cpu_task(k);
            y.par_chunks_mut(task).zip(values.par_chunks(task)).for_each(|(y, x)| {
                for (y, x) in y.chunks_exact_mut(k).zip(x.chunks_exact(k)) {
                    let rstd = rstd(dot(x, x), k, eps);
                    y.iter_mut().zip(x).zip(weight).for_each(|((y, x), w)| *y = x * rstd * w);
                }
            });
            Ok(Tensor::from_host(cpu, x.shape(), y))
        }
        Storage::Gpu(gpu, buffer) => {
            let y = Tensor::uninit(gpu, OP, x.shape())?;
            let buffers = [buffer, weight.buffer(gpu, OP)?, y.buffer(gpu, OP)?];
            dispatch(gpu, &KERNEL, &defines(gpu.tier(), k), &buffers, [x.len(), k], eps)?;
            Ok(y)
        }
        Storage::Planned(cpu, _) => Tensor::planned(cpu, x.shape()),
    }
}

/// Returns K, if `x` consists of rows of that length.
pub(crate) fn row_len(op: &'static str, x: &Tensor, weight: &Tensor) -> Result<usize> {
    match *weight.shape() {
        [k] if k > 0 && x.len().is_multiple_of(k) => Ok(k),
        _ => Err(Error::shape(
            op,
            "weight",
            format!("[K] where K divides the number of values in x {:?}", x.shape()),
            format!("{:?}", weight.shape()),
        )),
    }
}

/// Values per task on the CPU: whole rows.
pub(crate) fn cpu_task(k: usize) -> usize {
    k * (crate::kernels::elementwise::quads::CPU_CHUNK / k).max(1)
}

/// 1 / sqrt(mean + eps), from the sum of `k` squares.
pub(crate) fn rstd(squares: f32, k: usize, eps: f32) -> f32 {
    1.0 / (squares / k as f32 + eps).sqrt()
}

/// Records the forward or the backward kernel for `len` values in rows of `k`.
pub(crate) fn dispatch(
    gpu: &Gpu,
    kernel: &'static Kernel,
    defines: &Defines,
    buffers: &[&Buffer],
    [len, k]: [usize; 2],
    eps: f32,
) -> Result<()> {
    let teams = RowTeams::short(gpu.tier());
    let rows = len / k;
    let params = RmsNormParams { k: k as u32, rows: rows as u32, eps, ..Default::default() };
    gpu.dispatch(Dispatch {
        kernel,
        defines,
        buffers,
        params: bytemuck::bytes_of(&params),
        groups: teams.groups(rows),
        flops_per_group: 16 * teams.group_rows() * k as u64,
    })
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(x: &[T], weight: &[T], eps: T) -> Vec<T> {
    let row = |x: &[T]| {
        let mean = x.iter().map(|&x| x * x).sum::<T>() / T::of(weight.len() as f32);
        let rstd = T::one() / (mean + eps).sqrt();
        x.iter().zip(weight).map(|(&x, &w)| x * rstd * w).collect::<Vec<T>>()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::testing::tolerances::ROWS;
    use crate::testing::{self, wide};

    fn check(device: &Device, shape: &[usize], k: usize, amplitude: f32, seed: u64) {
        let eps = 1e-6;
        let (x, weight) = (testing::values(seed, shape.iter().product(), amplitude), testing::values(seed + 1, k, 2.0));
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let y = rms_norm(&tensor(shape, &x), &tensor(&[k], &weight), eps).unwrap();
        assert_eq!(y.shape(), shape);
        let wanted = reference(&wide(&x), &wide(&weight), eps.into());
        let bounds = ROWS.f32.bounds(&wanted);
        let context = format!("{} {shape:?} K={k} amplitude {amplitude}", testing::name(device));
        testing::assert_close(&context, &y.to_vec().unwrap(), &wanted, &bounds);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            rows in 0..=67usize,
            heads in 1..=3usize,
            k in prop_oneof![1..=257usize, (1..=64usize).prop_map(|quads| 4 * quads)],
            seed in 0..1000u64,
        ) {
            for device in testing::devices() {
                check(&device, &[rows, heads * k], k, 1.0, seed);
            }
        }
    }

    pub fn twin(device: &Device) {
        for amplitude in [1e-6, 1e6] {
            check(device, &[3, 576], 576, amplitude, 1);
        }
        check(device, &[2, 4096], 4096, 1.0, 2);
    }

    #[test]
    fn zero_rows_stay_zero_and_wrong_weights_are_named() {
        for device in testing::devices() {
            let zeros = |shape: &[usize]| Tensor::zeros(&device, shape).unwrap();
            assert_eq!(rms_norm(&zeros(&[2, 6]), &zeros(&[3]), 1e-5).unwrap().to_vec().unwrap(), [0.0; 12]);
            let message = rms_norm(&zeros(&[2, 6]), &zeros(&[5]), 1e-5).unwrap_err().to_string();
            assert_eq!(
                message,
                "rms_norm: weight: expected [K] where K divides the number of values in x [2, 6], got [5]"
            );
            assert_eq!(
                rms_norm(&zeros(&[2, 6]), &zeros(&[0]), 1e-5).unwrap_err().to_string(),
                "rms_norm: weight: expected [K] where K divides the number of values in x [2, 6], got [0]"
            );
        }
    }
}
