//! dQ of [`attention`](crate::kernels::attention) on hardware, with the tiles of
//! [`attention_tile`](crate::kernels::attention::tile).

use super::call::GpuCall;
use crate::device::Dispatch;
use crate::error::Result;
use crate::kernels::attention::call::{AttentionParams, flops_per_group};
use crate::kernels::attention::tile::{Tiling, Work};
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention_dq_tile" in "attention/backward/dq_tile.wgsl", AttentionParams,
        [q: Read, k: Read, v: Read, d_o: Read, stats: Read, key_ranges: Read, dq: Write],
    variants: |tier| Tiling::variants(tier, WORK),
    twin: super::tests::twin_of_few_queries,
}

/// The result is dQ.
const WORK: Work = Work { products: 2, results: 1 };

pub(crate) fn dispatch(call: &GpuCall<'_>, dq: &Tensor) -> Result<()> {
    let GpuCall { op, gpu, shape, visibility, .. } = *call;
    let tiling = Tiling::new(shape.head_dim, WORK);
    let groups = (visibility.queries().div_ceil(tiling.rows()) * shape.heads) as u64;
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &tiling.defines(),
        buffers: &[&call.operands()?[..], &[visibility.key_ranges().buffer(gpu, op)?, dq.buffer(gpu, op)?]].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 3, groups),
    })
}
