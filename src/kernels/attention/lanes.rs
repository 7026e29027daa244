//! [`attention`](crate::kernels::attention) on software drivers whose workgroups can be one
//! subgroup of eight lanes: tiles of rows by eight rows of the other side, in registers. Both
//! backward kernels share this code.

use super::call::{AttentionParams, ForwardCall};
use crate::device::{Defines, Gpu, Tier};
use crate::error::Result;
use crate::kernels::kernel;
use crate::kernels::qmatmul::lanes::one_subgroup;

kernel! {
    KERNEL = "attention_lanes" in "attention/lanes.wgsl", AttentionParams, [q: Read, k: Read, v: Read, key_ranges: Read, o: Write, lse: Write],
    variants: |tier| variants_of(tier, 1),
    twin: super::tests::twin,
}

/// Whether these kernels can run on this device.
pub(crate) fn fits(gpu: &Gpu, head_dim: usize) -> bool {
    gpu.tier() == Tier::Software && one_subgroup(gpu) && head_dim.is_multiple_of(8)
}

/// Rows that a workgroup owns. Large heads get fewer, because the workgroup keeps `sums` sums for
/// each row and value of a head. At most `count`, rounded up to a power of two.
pub(crate) fn rows(count: usize, head_dim: usize, sums: usize) -> usize {
    let most = (MOST_SUMS / (head_dim * sums)).clamp(1, MOST_ROWS);
    most.min(count.max(1).next_power_of_two())
}

const MOST_ROWS: usize = 16;
/// Maximum sums of a workgroup, over all lanes.
const MOST_SUMS: usize = 2048;

/// Text constants of a variant.
pub(crate) fn defines(rows: usize, head_dim: usize) -> Defines {
    // GLSL lacks subgroups of a fixed size.
    Defines::new().with("rows", rows as u32).with("head_dim", head_dim as u32).with("share", true)
}

/// Text constants of every variant.
pub(crate) fn variants_of(tier: Tier, sums: usize) -> Vec<Defines> {
    if tier != Tier::Software {
        return Vec::new();
    }
    let variant = |&(count, head_dim): &(usize, usize)| defines(rows(count, head_dim, sums), head_dim);
    [(1, 64), (3, 8), (100, 8), (100, 64), (100, 80), (100, 256)].iter().map(variant).collect()
}

pub(crate) fn dispatch(call: &ForwardCall<'_>) -> Result<()> {
    let rows = rows(call.visibility.queries(), call.shape.head_dim, 1);
    call.dispatch(&KERNEL, &defines(rows, call.shape.head_dim), rows)
}
