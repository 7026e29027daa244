//! [`qmatmul_dx`](super::qmatmul_dx) on hardware: 64 x 64 tiles of dX, operands staged in workgroup memory (as f16 where the
//! tier says so, with powers of two that keep their range), 8 x 8 values of dX an invocation.

use super::kernel;
use super::packing::Part;
use super::qmatmul_dx_operands::{GpuDxCall, QmatmulDxParams};
use crate::device::{Buffer, Defines, Dispatch};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_dx_tile.wgsl`
    KERNEL = "qmatmul_dx_tile", QmatmulDxParams, [dy: Read, w: Read, g: Read, a: Read, row_factor: Read, dx: Write]
}

/// Rows and columns of a tile of dX, fixed in the shader by its 64 threads of 8 x 8.
const TILE: u32 = 64;

/// Text constants beside the matrix's.
fn defines(matrix: Defines, f16: bool, dropout: bool) -> Defines {
    matrix.with("f16", f16).with("dropout", dropout)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines], f16: bool) -> Vec<Defines> {
    let each = |matrix: &Defines| [false, true].map(|dropout| defines(matrix.clone(), f16, dropout));
    matrices.iter().flat_map(each).collect()
}

/// `factor`: that of the rows of dY, for f16 staging ([`row_factor`](super::row_factor)).
pub(crate) fn dispatch(call: &GpuDxCall<'_>, part: &Part, factor: &Buffer) -> Result<()> {
    let operands = call.operands(part)?;
    let (m, k) = (call.m as u32, call.w.cols() as u32);
    let column_groups = k.div_ceil(TILE);
    let params = QmatmulDxParams { column_groups, ..call.params(part) };
    call.gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(call.w.defines(), call.gpu.tier().f16(), call.dropout(part).is_some()),
        buffers: &[&operands[..], &[factor, call.dx]].concat(),
        params: bytemuck::bytes_of(&params),
        groups: u64::from(m.div_ceil(TILE)) * u64::from(column_groups),
        flops_per_group: call.flops(part, TILE.into(), TILE.into()),
    })
}
