//! Packs the rows of a matrix as f16, each multiplied by its factor
//! ([`row_factor`](crate::kernels::rows::row_factor)) and padded with zeros. Products by
//! cooperative matrices read these rows. One pass finds the factors and packs.

use super::row_factor::{self, RowFactorParams};
use crate::device::{Buffer, Defines, Gpu};
use crate::error::Result;
use crate::kernels::kernel;

kernel! {
    KERNEL = "pack_rows" in "rows/pack_rows.wgsl", RowFactorParams, [x: Read, factor: Write, packed: Write],
    variants: |tier| row_factor::variants().into_iter().filter(|_| tier.cooperative()).map(defines).collect(),
    twin: super::factors::tests::twin,
}

/// Packed rows have a multiple of this many values: two stages of a product, which is `2 * depth`
/// of `shaders/shared/coop.wgsl`.
pub(crate) const PACKED: usize = 64;

/// Number of words in `rows` packed rows of `k` values.
pub(crate) fn words(rows: usize, k: usize) -> usize {
    rows * k.next_multiple_of(PACKED) / 2
}

/// Adds text constants to those of [`row_factor`].
fn defines(shared: Defines) -> Defines {
    shared.with("f16", true)
}

/// Packs `rows` rows of `k` values.
pub(crate) fn dispatch(gpu: &Gpu, x: &Buffer, [factor, packed]: [&Buffer; 2], shape: [usize; 2]) -> Result<()> {
    row_factor::run(gpu, &KERNEL, &[x, factor, packed], shape, defines)
}
