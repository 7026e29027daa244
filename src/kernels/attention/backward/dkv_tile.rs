//! dK and dV of [`attention`](crate::kernels::attention) on hardware, with the tiles of
//! [`attention_tile`](crate::kernels::attention::tile).

use super::call::GpuCall;
use crate::device::Dispatch;
use crate::error::Result;
use crate::kernels::attention::call::{AttentionParams, flops_per_group};
use crate::kernels::attention::tile::{Tiling, Work};
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention_dkv_tile" in "attention/backward/dkv_tile.wgsl", AttentionParams,
        [q: Read, k: Read, v: Read, d_o: Read, stats: Read, query_ranges: Read, dk: Write, dv: Write],
    variants: |tier| Tiling::variants(tier, WORK),
    twin: super::tests::twin_of_few_queries,
}

/// The results are dK and dV.
const WORK: Work = Work { products: 2, results: 2 };

pub(crate) fn dispatch(call: &GpuCall<'_>, dk: &Tensor, dv: &Tensor) -> Result<()> {
    let GpuCall { op, gpu, shape, visibility, .. } = *call;
    let tiling = Tiling::new(shape.head_dim, WORK);
    let groups = (visibility.keys().div_ceil(tiling.rows()) * shape.kv_heads) as u64;
    let own = [visibility.query_ranges()?.buffer(gpu, op)?, dk.buffer(gpu, op)?, dv.buffer(gpu, op)?];
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &tiling.defines(),
        buffers: &[&call.operands()?[..], &own].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 4, groups),
    })
}
