//! [`qmatmul_dx`](crate::kernels::qmatmul::dx) on hardware: square tiles of dX, operands staged in
//! workgroup memory (in tiers with f16 as f16, with powers of two that keep their range), 8 x 8
//! values of dX per invocation.

use super::call::{GpuDxCall, QmatmulDxParams};
use crate::device::{Buffer, Defines, Dispatch, Tier};
use crate::error::Result;
use crate::kernels::kernel;
use crate::kernels::matrix::packing::Part;
use crate::kernels::matrix::variants::wide_matrices;
use crate::kernels::qmatmul::tile::sides;

kernel! {
    KERNEL = "qmatmul_dx_tile" in "qmatmul/dx/tile.wgsl", QmatmulDxParams,
        [dy: Read, w: Read, g: Read, a: Read, row_factor: Read, w4: Read, dx: Write],
    variants: variants,
    twin: super::tests::twin,
}

/// Properties of a variant's text besides the matrix.
#[derive(Clone, Copy)]
struct Form {
    /// Operands are staged as f16.
    f16: bool,
    /// Rows and columns of a tile.
    side: u32,
    /// dY is read four values at a time.
    quads: bool,
    /// G is read four ranks at a time.
    rank_quads: bool,
    dropout: bool,
}

/// Adds text constants to those of the matrix.
fn defines(matrix: Defines, form: Form) -> Defines {
    let matrix = matrix.with("f16", form.f16).with("side", form.side).with("quads", form.quads);
    matrix.with("rank_quads", form.rank_quads).with("dropout", form.dropout)
}

/// Text constants of every variant. With cooperative matrices only tiny parts of a matrix take this
/// form, in the variants of the tier below.
fn variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software || tier.cooperative() {
        return Vec::new();
    }
    let matrices = wide_matrices();
    let f16 = tier.f16();
    let of = |matrix: &Defines, side, quads, dropout| {
        defines(matrix.clone(), Form { f16, side, quads, rank_quads: quads, dropout })
    };
    let mut all: Vec<_> =
        matrices.iter().flat_map(|matrix| [false, true].map(|dropout| of(matrix, 64, true, dropout))).collect();
    let sizes = [(64, false, false), (128, true, false), (128, true, true), (128, false, false)];
    all.extend(sizes.map(|(side, quads, dropout)| of(&matrices[0], side, quads, dropout)));
    all
}

/// `factor`: factors of the rows of dY, for f16 staging
/// ([`row_factor`](crate::kernels::rows::row_factor)).
pub(crate) fn dispatch(call: &GpuDxCall<'_>, part: &Part, factor: &Buffer) -> Result<()> {
    let run = |call: &GpuDxCall<'_>, side| dispatch_as(call, part, factor, side);
    call.with_tile(&KERNEL, part, sides(call.gpu, call.m), run)
}

fn dispatch_as(call: &GpuDxCall<'_>, part: &Part, factor: &Buffer, side: u32) -> Result<()> {
    let operands = call.operands(part)?;
    let (m, k) = (call.m as u32, call.w.cols() as u32);
    let column_groups = k.div_ceil(side);
    let form = Form {
        f16: call.gpu.tier().f16(),
        side,
        quads: call.loads_quads(part),
        rank_quads: call.reads_rank_quads(part),
        dropout: call.dropout(part).is_some(),
    };
    call.gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(call.w.wide_defines(), form),
        buffers: &[&operands[..], &[factor, &part.buffer, call.dx]].concat(),
        params: bytemuck::bytes_of(&call.params(part)),
        groups: u64::from(m.div_ceil(side)) * u64::from(column_groups),
        flops_per_group: call.flops(part, side.into(), side.into()),
    })
}
