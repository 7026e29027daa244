//! [`attention`](crate::kernels::attention) on hardware: tiles of queries by tiles of keys in
//! workgroup memory, sums in registers, all in f32. Both backward kernels share this code.

use super::call::{AttentionParams, ForwardCall};
use crate::device::{Defines, Tier};
use crate::error::Result;
use crate::kernels::kernel;

kernel! {
    KERNEL = "attention_tile" in "attention/tile.wgsl", AttentionParams, [q: Read, k: Read, v: Read, key_ranges: Read, o: Write, lse: Write],
    variants: |tier| Tiling::variants(tier, WORK),
    twin: super::tests::twin_of_few_queries,
}

/// Threads of a workgroup along its own rows, and across: along the other side's rows, or along a
/// head's vec4.
const DOWN: usize = 8;
const ACROSS: usize = 16;
/// Maximum numbers of tiles and sums that a thread may hold. With operands and addresses they must
/// fit 128 registers, the limit for a thread on some GPUs.
const MOST_HELD: usize = 64;

/// Work per own row: the products held at a time, and the heads summed up from them.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub products: usize,
    pub results: usize,
}

/// Distribution of a tile of scores, and the sums made from it, to a workgroup's threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Own rows per thread.
    tall: usize,
    /// vec4 of a head.
    head_quads: usize,
}

impl Tiling {
    /// Takes the most rows per thread whose sums fit, because operands are loaded once for all of
    /// them.
    pub fn new(head_dim: usize, work: Work) -> Tiling {
        let head_quads = head_dim / 4;
        let sums = work.results * head_quads.div_ceil(ACROSS);
        let fits = |tall: &usize| {
            // Products of heads this small are unrolled, which holds more operands.
            let small = *tall == 4 && head_dim < 32;
            4 * tall * (sums + work.products) <= MOST_HELD && !small
        };
        Tiling { tall: [4, 2].into_iter().find(fits).unwrap_or(1), head_quads }
    }

    /// Rows that a workgroup owns.
    pub fn rows(self) -> usize {
        DOWN * self.tall
    }

    /// Text constants of the variant.
    pub fn defines(self) -> Defines {
        Defines::new().with("tall", self.tall as u32).with("head_quads", self.head_quads as u32)
    }

    /// Text constants of every variant. One of the head sizes doesn't fill a tile.
    pub fn variants(tier: Tier, work: Work) -> Vec<Defines> {
        if tier == Tier::Software {
            return Vec::new();
        }
        [8, 44, 64, 80, 96, 128, 192, 256].map(|head_dim| Tiling::new(head_dim, work).defines()).to_vec()
    }
}

/// The result is O.
const WORK: Work = Work { products: 1, results: 1 };

pub(crate) fn dispatch(call: &ForwardCall<'_>) -> Result<()> {
    let tiling = Tiling::new(call.shape.head_dim, WORK);
    call.dispatch(&KERNEL, &tiling.defines(), tiling.rows())
}
