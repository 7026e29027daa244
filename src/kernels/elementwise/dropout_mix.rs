//! `Y[i] = f(i) * X[i] + (1 - f(i)) * Z[i]`, with f the dropout's factors, 0 or 1 / (1 - p). It
//! computes dropout(X), the part of Z that dropout removes (dropout(Z) + Y = Z), or the sum of a
//! gradient that went through dropout and one that bypassed it.

use rayon::prelude::*;

use super::dropout::{CPU_CHUNK, Dropout};
use crate::device::{Defines, Dispatch, Gpu};
use crate::error::Result;
use crate::kernels::{expect_shape, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "dropout";

params! {
    struct DropoutMixParams {
        first_group: u32,
        groups: u32,
        /// Values.
        len: u32,
        /// Lower half of the dropout's seed, then the upper half.
        seed_low: u32,
        seed_high: u32,
        /// Values with a hash below this are dropped.
        drop_below: u32,
        /// 1 / (1 - p).
        keep_scale: f32,
    }
}

kernel! {
    KERNEL = "dropout_mix" in "elementwise/dropout_mix.wgsl", DropoutMixParams, [x: Read, z: Read, y: Write],
    variants: |_| vec![defines(true, false), defines(false, true), defines(true, true)],
    twin: tests::twin,
}

/// Which terms a mix has.
#[derive(Clone, Copy)]
pub enum Mix<'a> {
    /// f * X: dropout.
    Kept(&'a Tensor),
    /// (1 - f) * Z: the part that dropout removes.
    Rest(&'a Tensor),
    /// f * X + (1 - f) * Z.
    Both(&'a Tensor, &'a Tensor),
}

impl<'a> Mix<'a> {
    fn parts(self) -> (Option<&'a Tensor>, Option<&'a Tensor>) {
        match self {
            Mix::Kept(x) => (Some(x), None),
            Mix::Rest(z) => (None, Some(z)),
            Mix::Both(x, z) => (Some(x), Some(z)),
        }
    }

    fn first(self) -> &'a Tensor {
        match self {
            Mix::Kept(tensor) | Mix::Rest(tensor) | Mix::Both(tensor, _) => tensor,
        }
    }
}

/// Computes the mix on its device, in the shape of its tensors.
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape), `Error::DeviceMismatch`(crate::Error::DeviceMismatch),
/// `Error::Invalid`(crate::Error::Invalid) for a probability outside 0..1, and device errors.
pub fn dropout_mix(mix: Mix<'_>, dropout: Dropout) -> Result<Tensor> {
    let first = mix.first();
    if let Mix::Both(x, z) = mix {
        expect_shape(OP, "Z", z, x.shape())?;
        x.device().same(&z.device(), OP)?;
    }
    // Only checks the probability: the factors are right for zero, too.
    dropout.active(OP)?;
    match first.storage() {
        Storage::Cpu(cpu, values) => {
            let mut y = cpu.zeros(values.len())?;
            match mix.parts() {
                (Some(_), None) => dropout.apply(values, &mut y),
                (Some(_), Some(z)) => on_cpu(values, z.host(OP)?, &mut y, |f, x, z| f * x + (1.0 - f) * z, dropout),
                (None, _) => on_cpu(values, values, &mut y, |f, _, z| (1.0 - f) * z, dropout),
            }
            Ok(Tensor::from_host(cpu, first.shape(), y))
        }
        Storage::Gpu(gpu, _) => dispatch(gpu, mix, dropout),
        Storage::Planned(cpu, _) => Tensor::planned(cpu, first.shape()),
    }
}

fn on_cpu(x: &[f32], z: &[f32], y: &mut [f32], mix: impl Fn(f32, f32, f32) -> f32 + Sync, dropout: Dropout) {
    let operands = x.par_chunks(CPU_CHUNK).zip(z.par_chunks(CPU_CHUNK));
    y.par_chunks_mut(CPU_CHUNK).zip(operands).enumerate().for_each(|(index, (y, (x, z)))| {
        dropout.factors((index * CPU_CHUNK) as u32, y);
        y.iter_mut().zip(x.iter().zip(z)).for_each(|(y, (x, z))| *y = mix(*y, *x, *z));
    });
}

/// Invocations per workgroup.
const THREADS: u32 = 64;

fn defines(kept: bool, rest: bool) -> Defines {
    Defines::new().with("threads", THREADS).with("kept", kept).with("rest", rest)
}

fn dispatch(gpu: &Gpu, mix: Mix<'_>, dropout: Dropout) -> Result<Tensor> {
    let first = mix.first();
    let y = Tensor::uninit(gpu, "mix", first.shape())?;
    let (seed_low, seed_high, drop_below, keep_scale) = Dropout::params(Some(dropout));
    let params =
        DropoutMixParams { len: y.len() as u32, seed_low, seed_high, drop_below, keep_scale, ..Default::default() };
    let (x, z) = mix.parts();
    let unused = gpu.unused()?;
    let buffer = |tensor: Option<&Tensor>| tensor.map_or(Ok(unused.clone()), |tensor| tensor.buffer(gpu, OP).cloned());
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(x.is_some(), z.is_some()),
        buffers: &[&buffer(x)?, &buffer(z)?, y.buffer(gpu, OP)?],
        params: bytemuck::bytes_of(&params),
        groups: y.len().div_ceil(THREADS as usize) as u64,
        flops_per_group: 32 * u64::from(THREADS),
    })?;
    Ok(y)
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(x: &[T], z: &[T], dropout: Dropout) -> Vec<T> {
    let mix = |(i, (&x, &z)): (u32, (&T, &T))| {
        let f = T::of(dropout.factor(i));
        f * x + (T::one() - f) * z
    };
    (0..).zip(x.iter().zip(z)).map(mix).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::testing;

    pub fn twin(device: &Device) {
        for (rows, cols, probability) in [(0, 3, 0.5), (1, 1, 0.0), (7, 37, 0.3), (129, 300, 0.9)] {
            let dropout = Dropout { probability, seed: 0x1_0000_0007 };
            let (x, z) = (testing::values(1, rows * cols, 1e4), testing::values(2, rows * cols, 1.0));
            let none = vec![0.0; rows * cols];
            let tensor = |values: &[f32]| Tensor::from_slice(device, &[rows, cols], values).unwrap();
            let (x_tensor, z_tensor) = (tensor(&x), tensor(&z));
            for (mix, x, z) in [
                (Mix::Kept(&x_tensor), &x, &none),
                (Mix::Rest(&z_tensor), &none, &z),
                (Mix::Both(&x_tensor, &z_tensor), &x, &z),
            ] {
                let y = dropout_mix(mix, dropout).unwrap();
                assert_eq!(y.shape(), [rows, cols]);
                let (wanted, _) = testing::with_terms([x, z], |[x, z]| reference(x, z, dropout));
                let bounds: Vec<f64> = wanted.iter().map(|value| 1e-5 * value.abs() + 1e-5).collect();
                let context = format!("{} {rows} x {cols} {dropout:?}", testing::name(device));
                testing::assert_close(&context, &y.to_vec().unwrap(), &wanted, &bounds);
            }
        }
    }

    #[test]
    fn bad_input_is_named() {
        let zeros = |shape: &[usize]| Tensor::zeros(&Device::cpu(), shape).unwrap();
        let message = |mix, probability| dropout_mix(mix, Dropout { probability, seed: 0 }).unwrap_err().to_string();
        let (x, z) = (zeros(&[2, 3]), zeros(&[3, 2]));
        assert_eq!(message(Mix::Both(&x, &z), 0.1), "dropout: Z: expected [2, 3], got [3, 2]");
        assert_eq!(
            message(Mix::Kept(&x), 1.0),
            "dropout: the dropout probability is 1; it must be at least 0 and less than 1"
        );
    }
}
