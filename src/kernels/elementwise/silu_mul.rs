//! y = silu(gate) * up, elementwise: the gated activation of an MLP. silu(g) = g / (1 + exp(-g)).
//!
//! Reference: Shazeer, "GLU Variants Improve Transformer", 2020 (SwiGLU).

use rayon::prelude::*;

use super::quads::{self, CPU_CHUNK, QuadParams};
use crate::error::Result;
use crate::kernels::cpu::exp::exp;
use crate::kernels::{expect_shape, kernel};
use crate::tensor::{Storage, Tensor};

const OP: &str = "silu_mul";

kernel! {
    KERNEL = "silu_mul" in "elementwise/silu_mul.wgsl", QuadParams, [gate: Read, up: Read, y: Write],
    variants: quads::variants,
    twin: tests::twin,
}

/// Returns silu(gate) * up, in their shape.
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape) if shapes disagree,
/// `Error::DeviceMismatch`(crate::Error::DeviceMismatch).
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    expect_shape(OP, "up", up, gate.shape())?;
    gate.device().same(&up.device(), OP)?;
    match gate.storage() {
        Storage::Cpu(cpu, gate_values) => {
            let mut y = cpu.zeros(gate.len())?;
            let (gates, ups) = (gate_values.par_chunks(CPU_CHUNK), up.host(OP)?.par_chunks(CPU_CHUNK));
            y.par_chunks_mut(CPU_CHUNK).zip(gates).zip(ups).for_each(|((y, gate), up)| {
                y.iter_mut().zip(gate).zip(up).for_each(|((y, &gate), up)| *y = gate * sigmoid(gate).0 * up);
            });
            Ok(Tensor::from_host(cpu, gate.shape(), y))
        }
        Storage::Gpu(gpu, gates) => {
            let y = Tensor::uninit(gpu, OP, gate.shape())?;
            quads::dispatch(gpu, &KERNEL, &[gates, up.buffer(gpu, OP)?, y.buffer(gpu, OP)?], gate.len())?;
            Ok(y)
        }
        Storage::Planned(cpu, _) => Tensor::planned(cpu, gate.shape()),
    }
}

/// Returns 1 / (1 + exp(-x)) and 1 minus that. Neither overflows nor subtracts nearly equal
/// values.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> (f32, f32) {
    let e = exp(-x.abs());
    let (small, large) = (e / (1.0 + e), 1.0 / (1.0 + e));
    if x >= 0.0 { (large, small) } else { (small, large) }
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(gate: &[T], up: &[T]) -> Vec<T> {
    gate.iter().zip(up).map(|(&gate, &up)| gate / (T::one() + (-gate).exp()) * up).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::testing::tolerances::ROWS;
    use crate::testing::{self, wide};

    fn check(device: &Device, shape: &[usize], amplitude: f32, seed: u64) {
        let len = shape.iter().product();
        let (gate, up) = (testing::values(seed, len, amplitude), testing::values(seed + 1, len, 1.0));
        let tensor = |values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let y = silu_mul(&tensor(&gate), &tensor(&up)).unwrap();
        assert_eq!(y.shape(), shape);
        let wanted = reference(&wide(&gate), &wide(&up));
        let bounds = ROWS.f32.bounds(&wanted);
        let context = format!("{} {shape:?}", testing::name(device));
        testing::assert_close(&context, &y.to_vec().unwrap(), &wanted, &bounds);
    }

    pub fn twin(device: &Device) {
        for shape in [[0, 3], [1, 1], [33, 17], [257, 64]] {
            check(device, &shape, 10.0, 1);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(rows in 0..=257usize, cols in 1..=257usize, seed in 0..1000u64) {
            for device in testing::devices() {
                check(&device, &[rows, cols], 10.0, seed);
            }
        }
    }

    #[test]
    fn large_gates_stay_finite() {
        let gate = [1e4, -1e4, 3e38, -3e38, 90.0, -90.0, 0.0, -0.0, 30.0, -30.0];
        for device in testing::devices() {
            let tensor = |values: &[f32]| Tensor::from_slice(&device, &[10], values).unwrap();
            let y = silu_mul(&tensor(&gate), &tensor(&[1.0; 10])).unwrap().to_vec().unwrap();
            let wanted = gate.map(|gate: f32| f64::from(gate.max(0.0)));
            // Below -30, silu is smaller than 3e-12, so a flush to zero is accurate enough.
            let bounds = gate.map(|gate| 1e-5 * f64::from(gate.max(0.0)) + 4e-12);
            testing::assert_close(&testing::name(&device), &y, &wanted, &bounds);
        }
    }
}
