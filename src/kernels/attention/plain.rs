//! [`attention`](super::attention) on software drivers whose workgroups aren't one subgroup of
//! eight lanes: one thread per row, or several where heads are large.

use super::call::{AttentionParams, AttentionShape, Split, flops_per_group};
use super::visibility::Visibility;
use crate::device::{Dispatch, Gpu};
use crate::error::Result;
use crate::kernels::kernel;
use crate::tensor::Tensor;

kernel! {
    KERNEL = "attention" in "attention/plain.wgsl", AttentionParams, [q: Read, k: Read, v: Read, key_ranges: Read, o: Write, lse: Write],
    variants: |tier| Split::variants(tier, MOST_QUADS, TILE),
    twin: super::tests::twin_of_odd_heads,
}

/// Maximum vec4 of a row that a thread owns when threads share the row, for each of Q and O.
const MOST_QUADS: usize = 16;
/// Keys between barriers: their scores are a vec4.
const TILE: u32 = 4;

pub(crate) fn dispatch(
    gpu: &Gpu,
    op: &'static str,
    [q, k, v]: [&Tensor; 3],
    shape: &AttentionShape,
    visibility: &Visibility,
    [o, lse]: [&Tensor; 2],
) -> Result<()> {
    let split = Split::new(shape.head_dim, MOST_QUADS);
    let groups = (visibility.queries().div_ceil(split.rows) * shape.heads) as u64;
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &split.defines(TILE),
        buffers: &[
            q.buffer(gpu, op)?,
            k.buffer(gpu, op)?,
            v.buffer(gpu, op)?,
            visibility.key_ranges().buffer(gpu, op)?,
            o.buffer(gpu, op)?,
            lse.buffer(gpu, op)?,
        ],
        params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
        groups,
        flops_per_group: flops_per_group(shape, visibility, 2, groups),
    })
}
