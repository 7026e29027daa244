//! One AdamW step, in place, with g = factor * grad and t = step:
//!
//! ```text
//! param *= 1 - lr * weight_decay
//! m = beta1 m + (1 - beta1) g
//! v = beta2 v + (1 - beta2) g^2
//! param -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, in the order
//! of torch's `AdamW`.

use rayon::prelude::*;

use super::adamw_several;
use super::grad_norm::GradNorm;
pub use super::settings::AdamW;
use super::settings::{AdamWParams, OP};
use crate::device::{Buffer, Gpu};
use crate::error::{Error, Result};
use crate::kernels::elementwise::quads::{self, CPU_CHUNK};
use crate::kernels::{expect_shape, kernel};
use crate::tensor::{Storage, Tensor};

kernel! {
    KERNEL = "adamw" in "optim/adamw.wgsl", AdamWParams, [param: Write, grad: Read, m: Write, v: Write, norm: Read],
    variants: quads::variants,
    twin: tests::twin,
}

/// A tensor to update in a step.
pub struct Update<'a> {
    /// The values.
    pub param: &'a mut Tensor,
    /// Gradient of the values.
    pub grad: &'a Tensor,
    /// Mean of gradients; zeros at first.
    pub m: &'a mut Tensor,
    /// Mean of squared gradients; zeros at first.
    pub v: &'a mut Tensor,
}

/// Updates each parameter and its moments from its gradient, multiplied by the clip factor that
/// `norm` holds on the device. The four tensors of an update have one shape; the moments start at
/// zero. `step` counts from 1. If the factor is NaN, nothing changes.
///
/// # Errors
/// [`Error::Shape`] if shapes disagree, [`Error::DeviceMismatch`], [`Error::Invalid`] for settings
/// out of range. Nothing is updated then.
pub fn adamw(updates: &mut [Update<'_>], config: &AdamW, step: u32, norm: &GradNorm) -> Result<()> {
    config.check(step)?;
    if norm.values.len() < 2 {
        let got = format!("{:?}", norm.values.shape());
        return Err(Error::shape(OP, "gradient norm", "[norm, factor, loss, ..]", got));
    }
    for Update { param, grad, m, v } in &*updates {
        for (what, tensor) in [("gradient", *grad), ("m", &**m), ("v", &**v)] {
            expect_shape(OP, what, tensor, param.shape())?;
        }
        for tensor in [*grad, &**m, &**v, &norm.values] {
            param.device().same(&tensor.device(), OP)?;
        }
    }
    for Update { param, m, v, .. } in &mut *updates {
        [&mut **param, &mut **m, &mut **v].into_iter().try_for_each(Tensor::unshare)?;
    }
    match norm.values.storage() {
        Storage::Gpu(gpu, norm) => on_gpu(gpu, updates, config, step, norm),
        Storage::Cpu(_, norm) => {
            updates.iter_mut().try_for_each(|update| on_cpu(update, &config.params(step, 0), norm[1]))
        }
        Storage::Planned(..) => Ok(()),
    }
}

/// Buffers of the values, the gradient and the moments.
fn buffers<'a>(gpu: &Gpu, Update { param, grad, m, v }: &'a Update<'_>) -> Result<[&'a Buffer; 4]> {
    Ok([param.buffer(gpu, OP)?, grad.buffer(gpu, OP)?, m.buffer(gpu, OP)?, v.buffer(gpu, OP)?])
}

fn on_gpu(gpu: &Gpu, updates: &[Update<'_>], config: &AdamW, step: u32, norm: &Buffer) -> Result<()> {
    let (threes, rest) = match adamw_several::fits(gpu) {
        true => updates.as_chunks::<{ adamw_several::TENSORS }>(),
        false => (&[][..], updates),
    };
    for three in threes {
        let [a, b, c] = three.each_ref().map(|update| buffers(gpu, update));
        let ([a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3]) = (a?, b?, c?);
        let all = [norm, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3];
        let lens = three.each_ref().map(|update| update.param.len());
        adamw_several::dispatch(gpu, &all, lens, &config.params(step, 0))?;
    }
    for update in rest {
        let [param, grad, m, v] = buffers(gpu, update)?;
        let len = update.param.len();
        let params = config.params(step, len);
        quads::dispatch_with(gpu, &KERNEL, &[param, grad, m, v, norm], len, bytemuck::bytes_of(&params))?;
    }
    Ok(())
}

fn on_cpu(update: &mut Update<'_>, params: &AdamWParams, factor: f32) -> Result<()> {
    if !factor.is_finite() {
        return Ok(());
    }
    let Update { param, grad, m, v } = update;
    let moments = m.host_mut(OP)?.par_chunks_mut(CPU_CHUNK).zip(v.host_mut(OP)?.par_chunks_mut(CPU_CHUNK));
    let inputs = moments.zip(grad.host(OP)?.par_chunks(CPU_CHUNK));
    param.host_mut(OP)?.par_chunks_mut(CPU_CHUNK).zip(inputs).for_each(|(param, ((m, v), grad))| {
        for ((param, grad), (m, v)) in param.iter_mut().zip(grad).zip(m.iter_mut().zip(v)) {
            let g = grad * factor;
            *m += (g - *m) * params.new1;
            *v = *v * params.beta2 + g * g * params.new2;
            *param = *param * params.decay - params.step_size * *m / (v.sqrt() / params.root2 + params.eps);
        }
    });
    Ok(())
}

/// The formula in f64, for gradients that are already clipped.
#[cfg(test)]
pub(crate) fn reference(param: &mut [f64], grad: &[f64], m: &mut [f64], v: &mut [f64], config: &AdamW, step: u32) {
    let &AdamW { lr, beta1, beta2, eps, weight_decay } = config;
    let [bias1, bias2] = [beta1, beta2].map(|beta| 1.0 - beta.powi(step as i32));
    for i in 0..param.len() {
        param[i] *= 1.0 - lr * weight_decay;
        m[i] = beta1 * m[i] + (1.0 - beta1) * grad[i];
        v[i] = beta2 * v[i] + (1.0 - beta2) * grad[i] * grad[i];
        param[i] -= lr / bias1 * m[i] / (v[i].sqrt() / bias2.sqrt() + eps);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device::Device;
    use crate::kernels::optim::grad_norm::{self, grad_norm};
    use crate::testing::tolerances::ADAMW;
    use crate::testing::{self, wide};

    const CONFIG: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };

    /// Compares ten steps with different gradients, some clipped, with the same steps in f64.
    fn one(
        param: &mut Tensor,
        grad: &Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        config: &AdamW,
        step: u32,
        norm: &GradNorm,
    ) -> Result<()> {
        adamw(&mut [Update { param, grad, m, v }], config, step, norm)
    }

    fn check(device: &Device, len: usize, amplitude: f32) {
        let start = testing::values(1, len, 1.0);
        let tensor = |values: &[f32]| Tensor::from_slice(device, &[len], values).unwrap();
        let (mut param, mut m, mut v) = (tensor(&start), tensor(&vec![0.0; len]), tensor(&vec![0.0; len]));
        let (mut param64, mut m64, mut v64) = (wide(&start), vec![0.0; len], vec![0.0; len]);
        for step in 1..=10 {
            let grad = testing::values(100 + u64::from(step), len, amplitude);
            let grad_tensor = tensor(&grad);
            // Even steps clip, odd steps don't.
            let max_norm = (step % 2 == 0).then_some(amplitude);
            let norm = grad_norm(&[&grad_tensor], None, max_norm).unwrap();
            one(&mut param, &grad_tensor, &mut m, &mut v, &CONFIG, step, &norm).unwrap();
            let factor = grad_norm::reference(&[&wide(&grad)], None, max_norm.map(f64::from))[1];
            let grad: Vec<f64> = grad.iter().map(|&g| factor * f64::from(g)).collect();
            reference(&mut param64, &grad, &mut m64, &mut v64, &CONFIG, step);
        }
        let context = format!("{} {len} values, gradients of {amplitude}", testing::name(device));
        // Ten updates of at most lr each; their relative error is that of a few roundings.
        testing::assert_close(&context, &param.to_vec().unwrap(), &param64, &ADAMW.f32.bounds(&vec![1.0; len]));
        testing::assert_close(&context, &m.to_vec().unwrap(), &m64, &vec![1e-5 * f64::from(amplitude); len]);
        let bounds: Vec<f64> = v64.iter().map(|v| 2e-5 * v + 1e-37).collect();
        testing::assert_close(&context, &v.to_vec().unwrap(), &v64, &bounds);
    }

    pub fn twin(device: &Device) {
        for len in [1, 7, 1000, 40_001] {
            check(device, len, 0.1);
        }
        for amplitude in [1e-8, 1e4] {
            check(device, 37, amplitude);
        }
    }

    pub fn twin_of_several(device: &Device) {
        let tensors = |seed: u64| -> Vec<Tensor> {
            let new = |(i, len): (u64, &usize)| {
                Tensor::from_slice(device, &[*len], &testing::values(seed + i, *len, 1.0)).unwrap()
            };
            (0..).zip(&[1, 1000, 7, 0, 4096, 257, 3, 20_001]).map(new).collect()
        };
        let grads = tensors(100);
        let norm = grad_norm(&grads.iter().collect::<Vec<_>>(), None, Some(0.5)).unwrap();
        let run = |together: bool| {
            let (mut params, mut m, mut v) = (tensors(1), tensors(20), tensors(1));
            let mut updates: Vec<Update<'_>> = params
                .iter_mut()
                .zip(&grads)
                .zip(m.iter_mut().zip(&mut v))
                .map(|((param, grad), (m, v))| Update { param, grad, m, v })
                .collect();
            let size = if together { updates.len() } else { 1 };
            updates.chunks_mut(size).for_each(|updates| adamw(updates, &CONFIG, 3, &norm).unwrap());
            let all = params.iter().chain(&m).chain(&v);
            all.map(|tensor| tensor.to_vec().unwrap().into_iter().map(f32::to_bits).collect()).collect::<Vec<Vec<_>>>()
        };
        assert_eq!(run(true), run(false), "{}", testing::name(device));
    }

    #[test]
    fn a_norm_that_is_not_finite_changes_nothing() {
        for device in testing::devices() {
            let len = 21;
            let tensor = |seed: u64| Tensor::from_slice(&device, &[len], &testing::values(seed, len, 1.0)).unwrap();
            let (mut param, mut m, mut v) = (tensor(1), tensor(2), tensor(3));
            let before = [&param, &m, &v].map(|tensor| tensor.to_vec().unwrap());
            let mut grad = testing::values(4, len, 1.0);
            grad[20] = f32::NAN;
            let grad = Tensor::from_slice(&device, &[len], &grad).unwrap();
            let norm = grad_norm(&[&grad], None, Some(1.0)).unwrap();
            one(&mut param, &grad, &mut m, &mut v, &CONFIG, 1, &norm).unwrap();
            let fine = tensor(5);
            let nan = Tensor::from_slice(&device, &[1], &[f32::NAN]).unwrap();
            let norm = grad_norm(&[&fine], Some(&nan), None).unwrap();
            one(&mut param, &fine, &mut m, &mut v, &CONFIG, 1, &norm).unwrap();
            assert_eq!([&param, &m, &v].map(|tensor| tensor.to_vec().unwrap()), before, "{}", testing::name(&device));
        }
    }

    #[test]
    fn tensors_that_share_values_keep_the_old_ones() {
        for device in testing::devices() {
            let ones = Tensor::from_slice(&device, &[5], &[1.0; 5]).unwrap();
            let zeros = Tensor::zeros(&device, &[5]).unwrap();
            let (mut param, mut m, mut v) = (ones.clone(), zeros.clone(), zeros.clone());
            let norm = grad_norm(&[&ones], None, None).unwrap();
            one(&mut param, &ones, &mut m, &mut v, &CONFIG, 1, &norm).unwrap();
            assert_eq!((ones.to_vec().unwrap(), zeros.to_vec().unwrap()), (vec![1.0; 5], vec![0.0; 5]));
            let wanted = 1.0 - 1e-3 - 1e-2;
            testing::assert_close(&testing::name(&device), &param.to_vec().unwrap(), &[wanted; 5], &[1e-6; 5]);
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        let device = Device::cpu();
        let zeros = |len: usize| Tensor::zeros(&device, &[len]).unwrap();
        let norm = grad_norm(&[&zeros(3)], None, None).unwrap();
        let message = |config: AdamW, step: u32, len: usize| {
            one(&mut zeros(3), &zeros(len), &mut zeros(3), &mut zeros(3), &config, step, &norm).unwrap_err().to_string()
        };
        assert_eq!(message(CONFIG, 0, 3), "adamw: the step is 0; steps count from 1");
        assert_eq!(message(CONFIG, 1, 4), "adamw: gradient: expected [3], got [4]");
        assert_eq!(
            message(AdamW { beta1: 1.0, ..CONFIG }, 1, 3),
            "adamw: beta1 is 1; it must be at least 0 and less than 1"
        );
        assert!(message(AdamW { lr: f64::NAN, ..CONFIG }, 1, 3).contains("learning rate"));
        assert_eq!(AdamW::default().beta2, 0.999);
    }
}
