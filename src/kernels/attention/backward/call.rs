//! Operands that the backward kernels of attention share.

use crate::device::{Buffer, Gpu};
use crate::error::Result;
use crate::kernels::attention::call::AttentionShape;
use crate::kernels::attention::visibility::Visibility;
use crate::tensor::Tensor;

/// Operands that both passes read on a GPU.
pub(crate) struct GpuCall<'a> {
    pub op: &'static str,
    pub gpu: &'a Gpu,
    /// Q, K, V, dO.
    pub tensors: [&'a Tensor; 4],
    /// Log-sum-exp and delta of every query and head.
    pub stats: &'a Buffer,
    pub shape: &'a AttentionShape,
    pub visibility: &'a Visibility,
}

impl<'a> GpuCall<'a> {
    /// The first bindings of both kernels.
    pub fn operands(&self) -> Result<[&'a Buffer; 5]> {
        let [q, k, v, d_o] = self.tensors;
        let buffer = |tensor: &'a Tensor| tensor.buffer(self.gpu, self.op);
        Ok([buffer(q)?, buffer(k)?, buffer(v)?, buffer(d_o)?, self.stats])
    }
}
