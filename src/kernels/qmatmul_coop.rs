//! [`qmatmul`](super::qmatmul) by cooperative matrices: square tiles of Y, operands staged as f16 in workgroup memory with powers
//! of two that keep their range, sums in f32. One shader for both sizes of matrices.

use super::kernel;
use super::packing::Part;
use super::qmatmul_operands::{GpuCall, QmatmulParams};
use super::qmatmul_tile::with_side;
use crate::device::{Buffer, Cooperative, Defines, Dispatch};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_coop.wgsl`
    KERNEL = "qmatmul_coop", QmatmulParams,
        [x: Read, w: Read, bias: Read, h: Read, b: Read, row_factor: Read, w4: Read, y: Write]
}

/// What a variant's text depends on beside the matrix and the device.
#[derive(Clone, Copy)]
struct Form {
    /// Rows and columns of a tile.
    side: u32,
    /// Results are stored four at a time.
    quads: bool,
    /// H and B are read four ranks at a time.
    rank_quads: bool,
}

/// Text constants beside the matrix's.
fn defines(matrix: Defines, cooperative: Cooperative, form: Form) -> Defines {
    let matrix = cooperative.defines(matrix).with("side", form.side).with("quads", form.quads);
    matrix.with("rank_quads", form.rank_quads).with("share", false)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines]) -> Vec<Defines> {
    let mut all = Vec::new();
    for cooperative in Cooperative::ALL {
        let of = |matrix: &Defines, side, quads, rank_quads| {
            defines(matrix.clone(), cooperative, Form { side, quads, rank_quads })
        };
        all.extend(matrices.iter().map(|matrix| of(matrix, 64, true, true)));
        let sizes = [(64, false, false), (128, true, true), (128, false, false)];
        all.extend(sizes.map(|(side, quads, rank_quads)| of(&matrices[0], side, quads, rank_quads)));
    }
    all
}

/// `factor`: that of the rows of X ([`row_factor`](super::row_factor)).
pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part, factor: &Buffer, cooperative: Cooperative) -> Result<()> {
    let form = Form { side: 0, quads: call.stores_quads(part), rank_quads: call.reads_rank_quads() };
    let run = |side: u32| {
        let operands = call.operands(part)?;
        let column_groups = (part.rows.len() as u32).div_ceil(side);
        let params = QmatmulParams { column_groups, ..call.params(part) };
        call.gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(call.w.wide_defines(), cooperative, Form { side, ..form }),
            buffers: &[&operands[..], &[factor, &part.buffer, call.y]].concat(),
            params: bytemuck::bytes_of(&params),
            groups: u64::from((call.m as u32).div_ceil(side)) * u64::from(column_groups),
            flops_per_group: call.flops(side.into(), side.into()),
        })
    };
    with_side(call.gpu, &KERNEL, (call.m, call.w, part), 8 * cooperative.lanes, true, run)
}
