//! The L2 norm of all gradients together, and the factor that clips them. Both stay on the device:
//! factor = min(1, max_norm / (norm + 1e-6)), like torch's `clip_grad_norm_`.
//!
//! The factor is NaN if the norm or the loss is not finite; [`adamw`](crate::kernels::optim::adamw)
//! then changes nothing.

use super::square_sums;
use crate::device::{Defines, Dispatch, Gpu};
use crate::error::{Error, Result};
use crate::kernels::rows::sum;
use crate::kernels::{expect_shape, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "grad_norm";

params! {
    struct GradNormParams {
        first_group: u32,
        groups: u32,
        /// n, number of gradient tensors.
        count: u32,
        /// 0: no clipping.
        clip: u32,
        has_loss: u32,
        max_norm: f32,
        /// Sums of squares per tensor.
        runs: u32,
    }
}

kernel! {
    KERNEL = "grad_norm" in "optim/grad_norm.wgsl", GradNormParams, [squares: Read, total: Read, loss: Read, values: Write],
    variants: |_| vec![defines()],
    twin: tests::twin,
}

/// Where the norms of the single tensors begin in [`GradNorm::values`].
pub(crate) const EACH: usize = 3;

/// Invocations per workgroup.
const THREADS: u32 = 64;

/// Text constants of the variant.
pub(crate) fn defines() -> Defines {
    Defines::new().with("threads", THREADS)
}

/// Norms of gradients, and the clip factor to multiply the gradients by.
#[derive(Clone, Debug)]
pub struct GradNorm {
    /// [3 + n]: the norm of all gradients, the clip factor (NaN: skip this step), the loss (0
    /// without one), and the norm of each of the n tensors. Norms are before clipping. The loss is
    /// here so that a step reads back a single buffer.
    pub values: Tensor,
}

impl GradNorm {
    /// Returns [`GradNorm::values`]; waits for the device. On a planned device all are 0.
    pub(crate) fn read(&self) -> Result<Vec<f32>> {
        if self.values.device().is_planned() {
            return Ok(vec![0.0; self.values.len()]);
        }
        self.values.to_vec()
    }
}

/// Computes the norms of `grads`, of any shapes, and the factor that clips them together to
/// `max_norm`. Without `max_norm` the factor is 1. If `loss` `[1]` is not finite, the factor is
/// NaN too.
///
/// A GPU squares in f32: gradients below 1e-22 count as zero there, a norm over 1e19 as infinite.
///
/// # Errors
/// [`Error::Invalid`] for no gradients or a `max_norm` that is not positive, [`Error::Shape`] for
/// a loss of another shape, [`Error::DeviceMismatch`].
pub fn grad_norm(grads: &[&Tensor], loss: Option<&Tensor>, max_norm: Option<f32>) -> Result<GradNorm> {
    let Some(first) = grads.first() else {
        return Err(Error::invalid(OP, "the number of gradients", 0, "it must be at least 1"));
    };
    if let Some(max_norm) = max_norm
        && (max_norm <= 0.0 || max_norm.is_nan())
    {
        return Err(Error::invalid(OP, "max_norm", max_norm, "it must be positive"));
    }
    for tensor in grads.iter().copied().chain(loss) {
        first.device().same(&tensor.device(), OP)?;
    }
    if let Some(loss) = loss {
        expect_shape(OP, "loss", loss, &[1])?;
    }
    let values = match first.storage() {
        Storage::Cpu(cpu, _) => {
            let mut values = cpu.zeros(EACH + grads.len())?;
            let mut total = 0.0;
            for (norm, grad) in values[EACH..].iter_mut().zip(grads) {
                let squares = sum::on_cpu(grad.host(OP)?, |value| value * value);
                *norm = squares.sqrt() as f32;
                total += squares;
            }
            let loss = loss.map(|loss| loss.host(OP)).transpose()?;
            values[0] = total.sqrt() as f32;
            values[2] = loss.map_or(0.0, |loss| loss[0]);
            values[1] = factor(values[0], values[2], max_norm);
            Tensor::from_host(cpu, &[EACH + grads.len()], values)
        }
        Storage::Gpu(gpu, _) => on_gpu(gpu, grads, loss, max_norm)?,
        Storage::Planned(cpu, _) => Tensor::planned(cpu, &[EACH + grads.len()])?,
    };
    Ok(GradNorm { values })
}

fn on_gpu(gpu: &Gpu, grads: &[&Tensor], loss: Option<&Tensor>, max_norm: Option<f32>) -> Result<Tensor> {
    let values = Tensor::uninit(gpu, OP, &[EACH + grads.len()])?;
    let runs = runs(gpu);
    let squares = gpu.alloc("squared norms", 4 * (runs * grads.len()) as u64)?;
    let total = gpu.alloc("squared norm", 4)?;
    if square_sums::fits(gpu) {
        let tensors = grads.iter().map(|grad| Ok((grad.buffer(gpu, OP)?, grad.len()))).collect::<Result<Vec<_>>>()?;
        square_sums::dispatch(gpu, &tensors, &squares)?;
    } else {
        for (slot, grad) in grads.iter().enumerate() {
            sum::on_gpu(gpu, grad.buffer(gpu, OP)?, grad.len(), true, 1.0, &squares, slot)?;
        }
    }
    sum::on_gpu(gpu, &squares, runs * grads.len(), false, 1.0, &total, 0)?;
    let params = GradNormParams {
        count: grads.len() as u32,
        clip: max_norm.is_some().into(),
        has_loss: loss.is_some().into(),
        max_norm: max_norm.unwrap_or_default(),
        runs: runs as u32,
        ..Default::default()
    };
    let loss = loss.map_or_else(|| gpu.unused(), |loss| loss.buffer(gpu, OP))?;
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(),
        buffers: &[&squares, &total, loss, values.buffer(gpu, OP)?],
        params: bytemuck::bytes_of(&params),
        groups: params.count.div_ceil(THREADS).into(),
        flops_per_group: u64::from(THREADS),
    })?;
    Ok(values)
}

/// Sums of squares per tensor, before its norm is computed.
fn runs(gpu: &Gpu) -> usize {
    if square_sums::fits(gpu) { square_sums::RUNS } else { 1 }
}

fn factor(norm: f32, loss: f32, max_norm: Option<f32>) -> f32 {
    if !norm.is_finite() || !loss.is_finite() {
        return f32::NAN;
    }
    max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0))
}

/// The formula in f64. Returns the norm of all gradients, the clip factor, the loss, and the norm
/// of each gradient.
#[cfg(test)]
pub(crate) fn reference(grads: &[&[f64]], loss: Option<f64>, max_norm: Option<f64>) -> Vec<f64> {
    let norm = |squares: f64| squares.sqrt();
    let squares = grads.iter().map(|grad| grad.iter().map(|value| value * value).sum::<f64>());
    let total = norm(squares.clone().sum());
    let finite = total.is_finite() && loss.is_none_or(f64::is_finite);
    let factor = max_norm.map_or(1.0, |max_norm| (max_norm / (total + 1e-6)).min(1.0));
    [total, if finite { factor } else { f64::NAN }, loss.unwrap_or(0.0)].into_iter().chain(squares.map(norm)).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device::Device;
    use crate::testing::tolerances::GRAD_NORM;
    use crate::testing::{self, wide};

    fn norms(device: &Device, grads: &[Vec<f32>], loss: Option<f32>, max_norm: Option<f32>) -> Vec<f32> {
        let tensor = |values: &[f32]| Tensor::from_slice(device, &[values.len()], values).unwrap();
        let tensors: Vec<Tensor> = grads.iter().map(|grad| tensor(grad)).collect();
        let loss = loss.map(|loss| tensor(&[loss]));
        let norm = grad_norm(&tensors.iter().collect::<Vec<_>>(), loss.as_ref(), max_norm).unwrap();
        assert_eq!(norm.values.shape(), [EACH + grads.len()]);
        norm.values.to_vec().unwrap()
    }

    fn check(device: &Device, lens: &[usize], amplitude: f32, max_norm: Option<f32>) {
        let grads: Vec<Vec<f32>> = (0..).zip(lens).map(|(i, &len)| testing::values(i, len, amplitude)).collect();
        let wide: Vec<Vec<f64>> = grads.iter().map(|grad| wide(grad)).collect();
        let wide: Vec<&[f64]> = wide.iter().map(Vec::as_slice).collect();
        let wanted = reference(&wide, Some(2.5), max_norm.map(f64::from));
        let bounds = GRAD_NORM.f32.bounds(&wanted);
        let context = format!("{} {lens:?} amplitude {amplitude} {max_norm:?}", testing::name(device));
        let got = norms(device, &grads, Some(2.5), max_norm);
        testing::assert_close(&context, &got, &wanted, &bounds);
        assert_eq!(norms(device, &grads, Some(2.5), max_norm), got, "{context}: the same again");
    }

    pub fn twin(device: &Device) {
        for amplitude in [1e-8, 1.0, 1e15] {
            for max_norm in [None, Some(1.0), Some(1e30)] {
                check(device, &[1, 37, 4096, 0, 20_001], amplitude, max_norm);
            }
        }
        check(device, &vec![3; 300], 1.0, Some(0.3));
        check(device, &[10_000_000], 1.0, Some(1.0));
    }

    #[test]
    fn what_is_not_finite_makes_the_factor_nan() {
        for device in testing::devices() {
            let fine = vec![1.0; 9];
            let with = |value: f32| vec![vec![2.0; 3], vec![1.0, value, 1.0], fine.clone()];
            for max_norm in [None, Some(1.0)] {
                for grads in [with(f32::NAN), with(f32::INFINITY), with(f32::NEG_INFINITY)] {
                    assert!(norms(&device, &grads, None, max_norm)[1].is_nan(), "{}", testing::name(&device));
                }
                for loss in [f32::NAN, f32::INFINITY] {
                    let got = norms(&device, std::slice::from_ref(&fine), Some(loss), max_norm);
                    assert!(got[1].is_nan() && got[0] == 3.0, "{}", testing::name(&device));
                }
                assert_eq!(norms(&device, &[vec![0.0; 5]], Some(1e30), max_norm), [0.0, 1.0, 1e30, 0.0]);
            }
            let large = norms(&device, &[vec![1e18; 1000]], None, Some(1.0));
            let fits = large[0].is_infinite() && large[1].is_nan() || (large[0] / 3.162_277_7e19 - 1.0).abs() < 1e-5;
            assert!(fits, "{}: infinite or right, not {large:?}", testing::name(&device));
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        let one = Tensor::zeros(&Device::cpu(), &[1]).unwrap();
        let message = |result: Result<GradNorm>| result.unwrap_err().to_string();
        assert_eq!(
            message(grad_norm(&[], None, None)),
            "grad_norm: the number of gradients is 0; it must be at least 1"
        );
        assert_eq!(message(grad_norm(&[&one], None, Some(0.0))), "grad_norm: max_norm is 0; it must be positive");
        assert_eq!(
            message(grad_norm(&[&one], None, Some(f32::NAN))),
            "grad_norm: max_norm is NaN; it must be positive"
        );
        let two = Tensor::zeros(&Device::cpu(), &[2]).unwrap();
        assert_eq!(message(grad_norm(&[&one], Some(&two), None)), "grad_norm: loss: expected [1], got [2]");
    }
}
