//! [`attention_dq`](super::attention_dq) by cooperative matrices. A workgroup owns 64 or 32
//! queries of a head and loops over tiles of keys. Operands are f16, sums f32. One shader serves
//! both sizes of cooperative matrices.

use super::attention::{AttentionParams, flops_per_group};
use super::attention_backward::GpuCall;
use super::attention_form::Form;
use super::attention_pack::Packed;
use super::kernel;
use crate::device::Dispatch;
use crate::error::Result;
use crate::tensor::Tensor;

kernel! {
    /// `shaders/attention_dq_coop.wgsl`
    KERNEL = "attention_dq_coop", AttentionParams,
        [queries: Read, keys: Read, query_scales: Read, key_scales: Read, stats: Read, key_ranges: Read, dq: Write]
}

pub(crate) fn dispatch(call: &GpuCall<'_>, packed: &Packed, form: Form, dq: &Tensor) -> Result<()> {
    let GpuCall { op, gpu, stats, shape, visibility, .. } = *call;
    let groups = (visibility.queries().div_ceil(form.own_rows()) * shape.heads) as u64;
    let own = [stats, visibility.key_ranges().buffer(gpu, op)?, dq.buffer(gpu, op)?];
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &form.defines(),
        buffers: &[&packed.operands()[..], &own].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 5, groups),
    })
}
