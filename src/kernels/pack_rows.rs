//! Rows of a matrix as f16, each times its factor ([`row_factor`](super::row_factor)) and padded by zeros: what products by
//! cooperative matrices read. One pass finds the factors and packs.

use super::kernel;
use super::row_factor::{self, RowFactorParams};
use crate::device::{Buffer, Defines, Gpu};
use crate::error::Result;

kernel! {
    /// `shaders/pack_rows.wgsl`
    KERNEL = "pack_rows", RowFactorParams, [x: Read, factor: Write, packed: Write]
}

/// Packed rows have a multiple of so many values: two stages of a product, so `2 * depth` of `shaders/shared/coop.wgsl`.
pub(crate) const PACKED: usize = 64;

/// Words of `rows` packed rows of `k` values.
pub(crate) fn words(rows: usize, k: usize) -> usize {
    rows * k.next_multiple_of(PACKED) / 2
}

/// Adds what the text depends on beside what [`row_factor`]'s does.
fn defines(shared: Defines) -> Defines {
    shared.with("f16", true)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants() -> Vec<Defines> {
    row_factor::variants().into_iter().map(defines).collect()
}

/// Packs `rows` rows of `k` values.
pub(super) fn dispatch(gpu: &Gpu, x: &Buffer, [factor, packed]: [&Buffer; 2], shape: [usize; 2]) -> Result<()> {
    row_factor::run(gpu, &KERNEL, &[x, factor, packed], shape, defines)
}
