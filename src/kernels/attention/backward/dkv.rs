//! dK and dV of [`attention`](crate::kernels::attention), [keys, Hkv * D], on software drivers. For
//! each key it loops over the queries that see it, in all heads that share the key.

use super::call::GpuCall;
use crate::device::Dispatch;
use crate::error::Result;
use crate::kernels::attention::call::{AttentionParams, Split, flops_per_group};
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention_dkv" in "attention/backward/dkv.wgsl", AttentionParams,
        [q: Read, k: Read, v: Read, d_o: Read, stats: Read, query_ranges: Read, dk: Write, dv: Write],
    variants: |tier| Split::variants(tier, MOST_QUADS, TILE),
    twin: super::tests::twin_of_odd_heads,
}

/// Maximum vec4 of a row that a thread owns when threads share the row, for each of K, V, dK and
/// dV.
const MOST_QUADS: usize = 8;
/// Queries between barriers: for each a score and a gradient, together a vec4.
const TILE: u32 = 2;

pub(crate) fn dispatch(call: &GpuCall<'_>, dk: &Tensor, dv: &Tensor) -> Result<()> {
    let GpuCall { op, gpu, shape, visibility, .. } = *call;
    let split = Split::new(shape.head_dim, MOST_QUADS);
    let groups = (visibility.keys().div_ceil(split.rows) * shape.kv_heads) as u64;
    let own = [visibility.query_ranges()?.buffer(gpu, op)?, dk.buffer(gpu, op)?, dv.buffer(gpu, op)?];
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &split.defines(TILE),
        buffers: &[&call.operands()?[..], &own].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 4, groups),
    })
}
