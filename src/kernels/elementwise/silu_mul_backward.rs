//! Gradients of y = silu(gate) * up, elementwise, with s = 1 / (1 + exp(-gate)):
//! d_gate = dy * up * s * (1 + gate * (1 - s)), d_up = dy * gate * s.

use rayon::prelude::*;

use super::quads::{self, CPU_CHUNK, QuadParams};
use super::silu_mul::sigmoid;
use crate::error::Result;
use crate::kernels::{expect_shape, kernel};
use crate::tensor::{Storage, Tensor};

const OP: &str = "silu_mul_backward";

kernel! {
    KERNEL = "silu_mul_backward" in "elementwise/silu_mul_backward.wgsl", QuadParams, [dy: Read, gate: Read, up: Read, d_gate: Write, d_up: Write],
    variants: quads::variants,
    twin: tests::twin,
}

/// Returns (d_gate, d_up) of [`silu_mul`](crate::kernels::elementwise::silu_mul::silu_mul), given
/// the gradient of its result. All have one shape.
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape) if shapes disagree,
/// `Error::DeviceMismatch`(crate::Error::DeviceMismatch).
pub fn silu_mul_backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let shape = dy.shape();
    expect_shape(OP, "gate", gate, shape)?;
    expect_shape(OP, "up", up, shape)?;
    dy.device().same(&gate.device(), OP)?;
    dy.device().same(&up.device(), OP)?;
    match dy.storage() {
        Storage::Cpu(cpu, dy) => {
            let (mut d_gate, mut d_up) = (cpu.zeros(dy.len())?, cpu.zeros(dy.len())?);
            let outputs = d_gate.par_chunks_mut(CPU_CHUNK).zip(d_up.par_chunks_mut(CPU_CHUNK));
            let inputs = gate.host(OP)?.par_chunks(CPU_CHUNK).zip(up.host(OP)?.par_chunks(CPU_CHUNK));
            outputs.zip(inputs).zip(dy.par_chunks(CPU_CHUNK)).for_each(|(((d_gate, d_up), (gate, up)), dy)| {
                let outputs = d_gate.iter_mut().zip(d_up);
                outputs.zip(gate.iter().zip(up)).zip(dy).for_each(|(((d_gate, d_up), (&gate, up)), dy)| {
                    let (s, rest) = sigmoid(gate);
                    *d_gate = dy * up * s * (1.0 + gate * rest);
                    *d_up = dy * gate * s;
                });
            });
            Ok((Tensor::from_host(cpu, shape, d_gate), Tensor::from_host(cpu, shape, d_up)))
        }
        Storage::Gpu(gpu, buffer) => {
            let (d_gate, d_up) = (Tensor::uninit(gpu, "d_gate", shape)?, Tensor::uninit(gpu, "d_up", shape)?);
            let inputs = [buffer, gate.buffer(gpu, OP)?, up.buffer(gpu, OP)?];
            let outputs = [d_gate.buffer(gpu, OP)?, d_up.buffer(gpu, OP)?];
            quads::dispatch(gpu, &KERNEL, &[&inputs[..], &outputs].concat(), dy.len())?;
            Ok((d_gate, d_up))
        }
        Storage::Planned(cpu, _) => Ok((Tensor::planned(cpu, shape)?, Tensor::planned(cpu, shape)?)),
    }
}

/// The formula, for any real type. Returns d_gate and d_up.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(dy: &[T], gate: &[T], up: &[T]) -> (Vec<T>, Vec<T>) {
    let one = T::one();
    let each = |i: usize| {
        let s = one / (one + (-gate[i]).exp());
        (dy[i] * up[i] * s * (one + gate[i] * (one - s)), dy[i] * gate[i] * s)
    };
    (0..dy.len()).map(each).unzip()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::kernels::elementwise::silu_mul;
    use crate::testing::tolerances::ROWS;
    use crate::testing::{self, wide};

    fn check(device: &Device, shape: &[usize], seed: u64) {
        let len = shape.iter().product();
        let [dy, gate, up] = [(0, 1.0), (1, 10.0), (2, 1.0)].map(|(i, scale)| testing::values(seed + i, len, scale));
        let tensor = |values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let (d_gate, d_up) = silu_mul_backward(&tensor(&dy), &tensor(&gate), &tensor(&up)).unwrap();
        assert_eq!((d_gate.shape(), d_up.shape()), (shape, shape));
        let (wanted_gate, wanted_up) = reference(&wide(&dy), &wide(&gate), &wide(&up));
        let context = format!("{} {shape:?}", testing::name(device));
        let terms = |i: usize| {
            let (gate, terms) = (f64::from(gate[i]), f64::from((dy[i] * up[i]).abs()));
            let s = 1.0 / (1.0 + (-gate).exp());
            terms * s * (1.0 + gate.abs() * (1.0 - s))
        };
        let bounds = ROWS.f32.bounds(&(0..len).map(terms).collect::<Vec<_>>());
        testing::assert_close(&context, &d_gate.to_vec().unwrap(), &wanted_gate, &bounds);
        let bounds = ROWS.f32.bounds(&wanted_up);
        testing::assert_close(&context, &d_up.to_vec().unwrap(), &wanted_up, &bounds);
    }

    pub fn twin(device: &Device) {
        for shape in [[0, 3], [1, 1], [33, 17], [257, 64]] {
            check(device, &shape, 1);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(rows in 0..=257usize, cols in 1..=257usize, seed in 0..1000u64) {
            for device in testing::devices() {
                check(&device, &[rows, cols], seed);
            }
        }
    }

    #[test]
    fn large_gates_stay_finite() {
        for device in testing::devices() {
            let tensor = |values: &[f32]| Tensor::from_slice(&device, &[4], values).unwrap();
            let ones = tensor(&[1.0; 4]);
            let (d_gate, d_up) = silu_mul_backward(&ones, &tensor(&[1e4, -1e4, 3e38, -3e38]), &ones).unwrap();
            let bounds = [1e-5, 1e-5, 1e33, 1e-5];
            let context = testing::name(&device);
            testing::assert_close(&context, &d_gate.to_vec().unwrap(), &[1.0, 0.0, 1.0, 0.0], &[1e-5; 4]);
            testing::assert_close(&context, &d_up.to_vec().unwrap(), &[1e4, 0.0, 3e38, 0.0], &bounds.map(|b| b + 0.1));
        }
    }

    #[test]
    fn the_reference_is_the_gradient_of_the_forward() {
        let [dy, gate, up] = [(0, 1.0), (1, 8.0), (2, 1.0)].map(|(i, scale)| wide(&testing::values(i, 20, scale)));
        let (d_gate, d_up) = reference(&dy, &gate, &up);
        let along = |y: Vec<f64>| y.iter().zip(&dy).map(|(y, dy)| y * dy).sum::<f64>();
        testing::assert_gradient("gate", &gate, &d_gate, |gate| along(silu_mul::reference(gate, &up)));
        testing::assert_gradient("up", &up, &d_up, |up| along(silu_mul::reference(&gate, up)));
    }
}
