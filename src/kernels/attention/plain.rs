//! [`attention`](super::attention) on software drivers whose workgroups aren't one subgroup of
//! eight lanes: one thread per row, or several where heads are large.

use super::call::{AttentionParams, ForwardCall, Split};
use crate::error::Result;
use crate::kernels::kernel;

kernel! {
    KERNEL = "attention" in "attention/plain.wgsl", AttentionParams, [q: Read, k: Read, v: Read, key_ranges: Read, o: Write, lse: Write],
    variants: |tier| Split::variants(tier, MOST_QUADS, TILE),
    twin: super::tests::twin_of_odd_heads,
}

/// Maximum vec4 of a row that a thread owns when threads share the row, for each of Q and O.
const MOST_QUADS: usize = 16;
/// Keys between barriers: their scores are a vec4.
const TILE: u32 = 4;

pub(crate) fn dispatch(call: &ForwardCall<'_>) -> Result<()> {
    let split = Split::new(call.shape.head_dim, MOST_QUADS);
    call.dispatch(&KERNEL, &split.defines(TILE), split.rows)
}
