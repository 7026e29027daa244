//! dQ of [`attention`](super::attention) on hardware, with the tiles of
//! [`attention_tile`](super::attention_tile).

use super::attention::{AttentionParams, flops_per_group};
use super::attention_backward::GpuCall;
use super::attention_tile::{Tiling, Work};
use super::kernel;
use crate::device::{Defines, Dispatch, Tier};
use crate::error::Result;
use crate::tensor::Tensor;

kernel! {
    /// `shaders/attention_dq_tile.wgsl`
    KERNEL = "attention_dq_tile", AttentionParams,
        [q: Read, k: Read, v: Read, d_o: Read, stats: Read, key_ranges: Read, dq: Write]
}

/// The result is dQ.
const WORK: Work = Work { products: 2, results: 1 };

/// Text constants of every variant, for the registry test.
pub(crate) fn variants(tier: Tier) -> Vec<Defines> {
    Tiling::variants(tier, WORK)
}

pub(super) fn dispatch(call: &GpuCall<'_>, dq: &Tensor) -> Result<()> {
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
