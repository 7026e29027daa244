//! y = a + b, elementwise, for tensors of one shape. Used for residual connections.

use rayon::prelude::*;

use super::quads::{self, CPU_CHUNK, QuadParams};
use crate::error::Result;
use crate::kernels::{expect_shape, kernel};
use crate::tensor::{Storage, Tensor};

const OP: &str = "add";

kernel! {
    KERNEL = "add" in "elementwise/add.wgsl", QuadParams, [a: Read, b: Read, y: Write],
    variants: quads::variants,
    twin: tests::twin,
}

/// Returns a + b, in their shape.
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape) if shapes disagree,
/// `Error::DeviceMismatch`(crate::Error::DeviceMismatch).
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    expect_shape(OP, "b", b, a.shape())?;
    a.device().same(&b.device(), OP)?;
    match a.storage() {
        Storage::Cpu(cpu, a_values) => {
            let mut y = cpu.zeros(a.len())?;
            let (a_chunks, b_chunks) = (a_values.par_chunks(CPU_CHUNK), b.host(OP)?.par_chunks(CPU_CHUNK));
            y.par_chunks_mut(CPU_CHUNK).zip(a_chunks).zip(b_chunks).for_each(|((y, a), b)| {
                y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = a + b);
            });
            Ok(Tensor::from_host(cpu, a.shape(), y))
        }
        Storage::Gpu(gpu, a_buffer) => {
            let y = Tensor::uninit(gpu, OP, a.shape())?;
            quads::dispatch(gpu, &KERNEL, &[a_buffer, b.buffer(gpu, OP)?, y.buffer(gpu, OP)?], a.len())?;
            Ok(y)
        }
        Storage::Planned(cpu, _) => Tensor::planned(cpu, a.shape()),
    }
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(a: &[T], b: &[T]) -> Vec<T> {
    a.iter().zip(b).map(|(&a, &b)| a + b).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device::Device;
    use crate::kernels::elementwise::add_assign::add_assign;
    use crate::testing;

    pub fn twin(device: &Device) {
        for shape in [vec![1], vec![3, 5], vec![257, 65], vec![2, 0]] {
            let len = shape.iter().product();
            let (a, b) = (testing::values(1, len, 1.0), testing::values(2, len, 1e-3));
            let wanted = reference(&a, &b);
            let tensor = |values: &[f32]| Tensor::from_slice(device, &shape, values).unwrap();
            let (a_tensor, b_tensor) = (tensor(&a), tensor(&b));
            let y = add(&a_tensor, &b_tensor).unwrap();
            assert_eq!((y.shape(), y.to_vec().unwrap()), (&shape[..], wanted.clone()), "{}", testing::name(device));
            let mut sum = a_tensor.clone();
            add_assign(&mut sum, &b_tensor).unwrap();
            assert_eq!(sum.to_vec().unwrap(), wanted);
            assert_eq!(a_tensor.to_vec().unwrap(), a, "a clone is not an alias");
            // Adds a tensor to itself: both operands are the same buffer.
            let itself = sum.clone();
            add_assign(&mut sum, &itself).unwrap();
            assert_eq!(sum.to_vec().unwrap(), reference(&wanted, &wanted));
            assert_eq!(add(&itself, &itself).unwrap().to_vec().unwrap(), reference(&wanted, &wanted));
        }
    }

    #[test]
    fn shapes_that_disagree_are_named() {
        let zeros = |shape: &[usize]| Tensor::zeros(&crate::Device::cpu(), shape).unwrap();
        let message = add(&zeros(&[2, 3]), &zeros(&[3, 2])).unwrap_err().to_string();
        assert_eq!(message, "add: b: expected [2, 3], got [3, 2]");
        assert_eq!(
            add_assign(&mut zeros(&[2]), &zeros(&[3])).unwrap_err().to_string(),
            "add_assign: x: expected [2], got [3]"
        );
    }
}
