//! [`attention_dkv`](crate::kernels::attention::backward::dkv) for software drivers; see
//! [`attention_lanes`](crate::kernels::attention::lanes).

use super::call::GpuCall;
use crate::device::Dispatch;
use crate::error::Result;
use crate::kernels::attention::call::{AttentionParams, flops_per_group};
use crate::kernels::attention::lanes::{defines, rows, variants_of};
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention_dkv_lanes" in "attention/backward/dkv_lanes.wgsl", AttentionParams,
        [q: Read, k: Read, v: Read, d_o: Read, stats: Read, query_ranges: Read, dk: Write, dv: Write],
    variants: |tier| variants_of(tier, SUMS),
    twin: super::tests::twin,
}

/// Two sums per row: dK and dV.
const SUMS: usize = 2;

pub(crate) fn dispatch(call: &GpuCall<'_>, dk: &Tensor, dv: &Tensor) -> Result<()> {
    let GpuCall { op, gpu, shape, visibility, .. } = *call;
    let rows = rows(visibility.keys(), shape.head_dim, SUMS);
    let groups = (visibility.keys().div_ceil(rows) * shape.kv_heads) as u64;
    let own = [visibility.query_ranges()?.buffer(gpu, op)?, dk.buffer(gpu, op)?, dv.buffer(gpu, op)?];
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(rows, shape.head_dim),
        buffers: &[&call.operands()?[..], &own].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 4, groups),
    })
}
