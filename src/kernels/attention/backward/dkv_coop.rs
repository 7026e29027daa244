//! [`attention_dkv`](crate::kernels::attention::backward::dkv) by cooperative matrices. A workgroup
//! owns 64 or 32 keys of a head and loops over tiles of queries. Operands are f16, sums f32. One
//! shader serves both sizes of cooperative matrices.

use super::call::GpuCall;
use crate::device::Dispatch;
use crate::error::Result;
use crate::kernels::attention::call::{AttentionParams, flops_per_group};
use crate::kernels::attention::form::{Form, Pass};
use crate::kernels::attention::pack::Packed;
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention_dkv_coop" in "attention/backward/dkv_coop.wgsl", AttentionParams,
        [
            queries: Read, keys: Read, query_scales: Read, key_scales: Read, stats: Read, query_ranges: Read, dk: Write,
            dv: Write,
        ],
    variants: |tier| Form::variants(Pass::Dkv, tier),
    twin: super::tests::twin,
}

pub(crate) fn dispatch(call: &GpuCall<'_>, packed: &Packed, form: Form, [dk, dv]: [&Tensor; 2]) -> Result<()> {
    let GpuCall { op, gpu, stats, shape, visibility, .. } = *call;
    let groups = (visibility.keys().div_ceil(form.own_rows()) * shape.kv_heads) as u64;
    let own = [stats, visibility.query_ranges()?.buffer(gpu, op)?, dk.buffer(gpu, op)?, dv.buffer(gpu, op)?];
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &form.defines(),
        buffers: &[&packed.operands()[..], &own].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 6, groups),
    })
}
