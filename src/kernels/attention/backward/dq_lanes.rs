//! [`attention_dq`](crate::kernels::attention::backward::dq) for software drivers; see
//! [`attention_lanes`](crate::kernels::attention::lanes).

use super::call::GpuCall;
use crate::device::Dispatch;
use crate::error::Result;
use crate::kernels::attention::call::{AttentionParams, flops_per_group};
use crate::kernels::attention::lanes::{defines, rows, variants_of};
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention_dq_lanes" in "attention/backward/dq_lanes.wgsl", AttentionParams,
        [q: Read, k: Read, v: Read, d_o: Read, stats: Read, key_ranges: Read, dq: Write],
    variants: |tier| variants_of(tier, 1),
    twin: super::tests::twin,
}

pub(crate) fn dispatch(call: &GpuCall<'_>, dq: &Tensor) -> Result<()> {
    let GpuCall { op, gpu, shape, visibility, .. } = *call;
    let rows = rows(visibility.queries(), shape.head_dim, 1);
    let groups = (visibility.queries().div_ceil(rows) * shape.heads) as u64;
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(rows, shape.head_dim),
        buffers: &[&call.operands()?[..], &[visibility.key_ranges().buffer(gpu, op)?, dq.buffer(gpu, op)?]].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 3, groups),
    })
}
