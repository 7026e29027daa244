//! [`attention`](crate::kernels::attention) of many queries by cooperative matrices. A workgroup
//! owns 64 or 32 queries of a head and loops over tiles of keys. Operands are f16, sums f32. One
//! shader serves both sizes of cooperative matrices.

use super::call::{AttentionParams, AttentionShape, flops_per_group};
use super::form::{Form, Pass};
use super::pack::Packed;
use super::visibility::Visibility;
use crate::device::{Dispatch, Gpu};
use crate::error::Result;
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention_coop" in "attention/coop.wgsl", AttentionParams,
        [queries: Read, keys: Read, query_scales: Read, key_scales: Read, key_ranges: Read, o: Write, lse: Write],
    variants: |tier| Form::variants(Pass::Forward, tier),
    twin: super::tests::twin,
}

pub(crate) fn dispatch(
    gpu: &Gpu,
    form: Form,
    op: &'static str,
    qkv: [&Tensor; 3],
    shape: &AttentionShape,
    visibility: &Visibility,
    [o, lse]: [&Tensor; 2],
) -> Result<()> {
    let packed = Packed::new(gpu, op, qkv, None, shape, visibility)?;
    let groups = (visibility.queries().div_ceil(form.own_rows()) * shape.heads) as u64;
    let own = [visibility.key_ranges().buffer(gpu, op)?, o.buffer(gpu, op)?, lse.buffer(gpu, op)?];
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &form.defines(),
        buffers: &[&packed.operands()[..], &own].concat(),
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 4, groups),
    })
}
