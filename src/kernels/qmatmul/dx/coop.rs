//! [`qmatmul_dx`](crate::kernels::qmatmul::dx) by cooperative matrices: tiles of dX, operands
//! staged as f16 in workgroup memory with powers of two that keep their range, sums in f32. One
//! shader serves both sizes of cooperative matrices.

use super::call::{GpuDxCall, QmatmulDxParams};
use crate::device::{Buffer, Cooperative, Defines, Dispatch, Tier};
use crate::error::Result;
use crate::kernels::kernel;
use crate::kernels::matrix::packing::Part;
use crate::kernels::matrix::variants::wide_matrices;
use crate::kernels::qmatmul::coop::Tile;

kernel! {
    KERNEL = "qmatmul_dx_coop" in "qmatmul/dx/coop.wgsl", QmatmulDxParams,
        [dy: Read, w: Read, g: Read, a: Read, row_factor: Read, w4: Read, dx: Write],
    variants: variants,
    twin: super::tests::twin,
}

/// Properties of a variant's text besides the matrix and the device.
#[derive(Clone, Copy)]
struct Form {
    tile: Tile,
    /// G is read four ranks at a time.
    rank_quads: bool,
    dropout: bool,
}

/// Adds text constants to those of the matrix.
fn defines(matrix: Defines, cooperative: Cooperative, form: Form) -> Defines {
    form.tile.defines(cooperative.defines(matrix)).with("rank_quads", form.rank_quads).with("dropout", form.dropout)
}

/// Text constants of every variant.
fn variants(tier: Tier) -> Vec<Defines> {
    if !tier.cooperative() {
        return Vec::new();
    }
    let matrices = wide_matrices();
    let mut all = Vec::new();
    for cooperative in Cooperative::ALL {
        let of = |matrix: &Defines, tile, rank_quads, dropout| {
            defines(matrix.clone(), cooperative, Form { tile, rank_quads, dropout })
        };
        let small = Tile::ALL[0];
        all.extend(matrices.iter().flat_map(|matrix| [false, true].map(|dropout| of(matrix, small, true, dropout))));
        all.push(of(&matrices[0], small, false, false));
        for tile in &Tile::ALL[1..] {
            let forms = [(true, false), (true, true), (false, false)];
            all.extend(forms.map(|(rank_quads, dropout)| of(&matrices[0], *tile, rank_quads, dropout)));
        }
    }
    all
}

/// `dy`: packed rows of dY, and their factors ([`pack_rows`](crate::kernels::rows::pack_rows)).
pub(crate) fn dispatch(call: &GpuDxCall<'_>, part: &Part, dy: [&Buffer; 2], cooperative: Cooperative) -> Result<()> {
    let [dy, factor] = dy;
    let form = |tile| Form { tile, rank_quads: call.reads_rank_quads(part), dropout: call.dropout(part).is_some() };
    let run = |call: &GpuDxCall<'_>, tile: Tile| {
        let [_, operands @ ..] = call.operands(part)?;
        call.gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(call.w.wide_defines(), cooperative, form(tile)),
            buffers: &[&[dy], &operands[..], &[factor, &part.buffer, call.dx]].concat(),
            params: bytemuck::bytes_of(&call.params(part)),
            groups: tile.groups([call.m, call.w.cols(), call.splits]),
            flops_per_group: call.flops(part, tile.rows.into(), tile.columns.into()) / call.splits as u64,
        })
    };
    call.with_tile(&KERNEL, part, Tile::of(call.gpu, cooperative, call.m), run)
}
