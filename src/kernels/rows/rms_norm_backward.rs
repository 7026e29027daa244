//! Input gradient of y = x * rstd * w over rows of K values:
//! dx = rstd * (w * dy - x * rstd^2 * mean(w * dy * x)).
//!
//! rstd is recomputed from x, so the forward saves only its input. The weight is frozen and gets
//! no gradient.

use rayon::prelude::*;

use super::rms_norm::{self, RmsNormParams, cpu_task, dispatch, row_len, rstd};
use super::teams::RowTeams;
use crate::device::{Defines, Tier};
use crate::error::Result;
use crate::kernels::cpu::simd::dot;
use crate::kernels::elementwise::add_assign;
use crate::kernels::{expect_shape, kernel};
use crate::tensor::{Storage, Tensor};

const OP: &str = "rms_norm_backward";

kernel! {
    KERNEL = "rms_norm_backward" in "rows/rms_norm_backward.wgsl", RmsNormParams, [dy: Read, x: Read, w: Read, dx: Write],
    variants: variants,
    twin: tests::twin,
}

/// Text constants of every variant.
fn variants(tier: Tier) -> Vec<Defines> {
    let adding = |defines: Defines| [false, true].map(|adds| defines.clone().with("adds", adds));
    [false, true].into_iter().flat_map(|ragged| adding(RowTeams::short(tier).row_defines(ragged))).collect()
}

/// Returns the gradient of the input `x` of [`rms_norm`](crate::kernels::rows::rms_norm::rms_norm),
/// given the gradient of its result. Both have any shape that consists of rows of K; `weight` is
/// `[K]`.
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape), `Error::DeviceMismatch`(crate::Error::DeviceMismatch).
pub fn rms_norm_backward(dy: &Tensor, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    onto(None, dy, x, weight, eps)
}

/// Like [`rms_norm_backward`], added to `sum`, the gradient accumulated so far.
pub(crate) fn onto(sum: Option<Tensor>, dy: &Tensor, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let k = row_len(OP, x, weight)?;
    expect_shape(OP, "dy", dy, x.shape())?;
    x.device().same(&weight.device(), OP)?;
    x.device().same(&dy.device(), OP)?;
    match x.storage() {
        Storage::Cpu(cpu, values) => {
            let mut dx = cpu.zeros(x.len())?;
            let weight = weight.host(OP)?;
            let task = cpu_task(k);
            let inputs = values.par_chunks(task).zip(dy.host(OP)?.par_chunks(task));
            dx.par_chunks_mut(task).zip(inputs).for_each(|(dx, (x, dy))| {
                let inputs = x.chunks_exact(k).zip(dy.chunks_exact(k));
                for (dx, (x, dy)) in dx.chunks_exact_mut(k).zip(inputs) {
                    dx.iter_mut().zip(dy).zip(weight).for_each(|((dx, dy), w)| *dx = w * dy);
                    let rstd = rstd(dot(x, x), k, eps);
                    let along = dot(dx, x) / k as f32 * rstd * rstd;
                    dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = rstd * (*dx - along * x));
                }
            });
            add_assign::finish(sum, Tensor::from_host(cpu, x.shape(), dx))
        }
        Storage::Gpu(gpu, buffer) => {
            let defines = rms_norm::defines(gpu.tier(), k).with("adds", sum.is_some());
            let dx = add_assign::begin(gpu, OP, sum, x.shape())?;
            let buffers = [dy.buffer(gpu, OP)?, buffer, weight.buffer(gpu, OP)?, dx.buffer(gpu, OP)?];
            dispatch(gpu, &KERNEL, &defines, &buffers, [x.len(), k], eps)?;
            Ok(dx)
        }
        Storage::Planned(cpu, _) => add_assign::finish(sum, Tensor::planned(cpu, x.shape())?),
    }
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(dy: &[T], x: &[T], weight: &[T], eps: T) -> Vec<T> {
    let k = T::of(weight.len() as f32);
    let row = |(dy, x): (&[T], &[T])| {
        let mean = x.iter().map(|&x| x * x).sum::<T>() / k;
        let rstd = T::one() / (mean + eps).sqrt();
        let along = (0..x.len()).map(|i| weight[i] * dy[i] * x[i]).sum::<T>() / k * rstd * rstd;
        (0..x.len()).map(|i| rstd * (weight[i] * dy[i] - x[i] * along)).collect::<Vec<T>>()
    };
    dy.chunks(weight.len()).zip(x.chunks(weight.len())).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::kernels::rows::rms_norm;
    use crate::testing::tolerances::ROWS;
    use crate::testing::{self, wide};

    fn check(device: &Device, rows: usize, k: usize, amplitude: f32, seed: u64) {
        let eps = 1e-6;
        let x = testing::values(seed, rows * k, 1.0);
        let (dy, weight) = (testing::values(seed + 1, rows * k, amplitude), testing::values(seed + 2, k, 2.0));
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let (x_tensor, dy_tensor, weight_tensor) =
            (tensor(&[rows, k], &x), tensor(&[rows, k], &dy), tensor(&[k], &weight));
        let dx = rms_norm_backward(&dy_tensor, &x_tensor, &weight_tensor, eps).unwrap();
        assert_eq!(dx.shape(), [rows, k]);
        let (dy, x, weight) = (wide(&dy), wide(&x), wide(&weight));
        let wanted = reference(&dy, &x, &weight, eps.into());
        let terms = |i: usize| {
            let row = i / k * k..i / k * k + k;
            let mean = x[row.clone()].iter().map(|x| x * x).sum::<f64>() / k as f64 + f64::from(eps);
            let along = row.clone().map(|j| (weight[j % k] * dy[j] * x[j]).abs()).sum::<f64>() / k as f64 / mean;
            ((weight[i % k] * dy[i]).abs() + x[i].abs() * along) / mean.sqrt()
        };
        let bounds = ROWS.f32.bounds(&(0..rows * k).map(terms).collect::<Vec<_>>());
        let context = format!("{} {rows} x {k} amplitude {amplitude}", testing::name(device));
        testing::assert_close(&context, &dx.to_vec().unwrap(), &wanted, &bounds);
        // A GPU's fused multiply-add may round once instead of twice.
        let dx_values = dx.to_vec().unwrap();
        let fused = matches!(device, Device::Gpu(gpu) if gpu.tier() != Tier::Software);
        let rounding = |i: usize, sum: f64| f64::from(f32::EPSILON) * (sum.abs() + f64::from(dx_values[i].abs()));
        let bound = |i: usize, sum: f64| if fused { rounding(i, sum) } else { 0.0 };
        testing::assert_adds(&context, &dx, bound, |sum| onto(sum, &dy_tensor, &x_tensor, &weight_tensor, eps));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            rows in 0..=131usize,
            k in prop_oneof![1..=257usize, (1..=64usize).prop_map(|quads| 4 * quads)],
            seed in 0..1000u64,
        ) {
            for device in testing::devices() {
                check(&device, rows, k, 1.0, seed);
            }
        }
    }

    pub fn twin(device: &Device) {
        for amplitude in [1e-8, 1e4] {
            check(device, 5, 576, amplitude, 1);
        }
    }

    #[test]
    fn the_reference_is_the_gradient_of_the_forward() {
        let [x, dy] = [1, 2].map(|seed| wide(&testing::values(seed, 33, 1.0)));
        let weight = wide(&testing::values(3, 11, 2.0));
        let dx = reference(&dy, &x, &weight, 1e-2);
        testing::assert_gradient("x", &x, &dx, |x| {
            rms_norm::reference(x, &weight, 1e-2).iter().zip(&dy).map(|(y, dy)| y * dy).sum()
        });
    }
}
