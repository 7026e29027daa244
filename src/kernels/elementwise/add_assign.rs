//! y += x, elementwise and in place, for tensors of one shape. Used to accumulate gradients.

use rayon::prelude::*;

use super::quads::{self, CPU_CHUNK, QuadParams};
use crate::device::Gpu;
use crate::error::Result;
use crate::kernels::{expect_shape, kernel};
use crate::tensor::{Storage, Tensor};

const OP: &str = "add_assign";

kernel! {
    KERNEL = "add_assign" in "elementwise/add_assign.wgsl", QuadParams, [y: Write, x: Read],
    variants: quads::variants,
    twin: super::add::tests::twin,
}

/// Adds `x` to `y`. Tensors that shared `y`'s values keep the old ones.
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape) if shapes disagree,
/// `Error::DeviceMismatch`(crate::Error::DeviceMismatch).
pub fn add_assign(y: &mut Tensor, x: &Tensor) -> Result<()> {
    expect_shape(OP, "x", x, y.shape())?;
    y.device().same(&x.device(), OP)?;
    y.unshare()?;
    if let Storage::Gpu(gpu, buffer) = y.storage() {
        return quads::dispatch(gpu, &KERNEL, &[buffer, x.buffer(gpu, OP)?], y.len());
    }
    if let Storage::Planned(..) = y.storage() {
        return Ok(());
    }
    let x = x.host(OP)?.par_chunks(CPU_CHUNK);
    y.host_mut(OP)?.par_chunks_mut(CPU_CHUNK).zip(x).for_each(|(y, x)| {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    });
    Ok(())
}

/// Returns the tensor on `gpu` that a kernel writes its gradient to: a new one, or the existing
/// sum in memory of its own, to add to.
pub(crate) fn begin(gpu: &Gpu, op: &'static str, sum: Option<Tensor>, shape: &[usize]) -> Result<Tensor> {
    let Some(mut sum) = sum else { return Tensor::uninit(gpu, "gradient", shape) };
    expect_shape(op, "the sum of gradients", &sum, shape)?;
    sum.buffer(gpu, op)?;
    sum.unshare()?;
    Ok(sum)
}

/// Returns `gradient`, added to the sum if there is one. For kernels that can't add to it
/// themselves.
pub(crate) fn finish(sum: Option<Tensor>, gradient: Tensor) -> Result<Tensor> {
    let Some(mut sum) = sum else { return Ok(gradient) };
    add_assign(&mut sum, &gradient)?;
    Ok(sum)
}
