//! dQ of [`attention`](crate::kernels::attention), [M, H * D], on software drivers. For each query
//! it loops over the keys that it sees.

use super::call::GpuCall;
use crate::device::Dispatch;
use crate::error::Result;
use crate::kernels::attention::call::{AttentionParams, Split, flops_per_group};
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention_dq" in "attention/backward/dq.wgsl", AttentionParams,
        [q: Read, k: Read, v: Read, d_o: Read, stats: Read, key_ranges: Read, dq: Write],
    variants: |tier| Split::variants(tier, MOST_QUADS, TILE),
    twin: super::tests::twin_of_odd_heads,
}

/// Maximum vec4 of a row that a thread owns when threads share the row, for each of Q, dO and dQ.
const MOST_QUADS: usize = 8;
/// Keys between barriers: for each a score and a gradient, together a vec4.
const TILE: u32 = 2;

pub(crate) fn dispatch(call: &GpuCall<'_>, dq: &Tensor) -> Result<()> {
    let GpuCall { op, gpu, shape, visibility, .. } = *call;
    let split = Split::new(shape.head_dim, MOST_QUADS);
    let groups = (visibility.queries().div_ceil(split.rows) * shape.heads) as u64;
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &split.defines(TILE),
        buffers: &[&call.operands()?[..], &[visibility.key_ranges().buffer(gpu, op)?, dq.buffer(gpu, op)?]].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 3, groups),
    })
}
