//! [`qmatmul_dx`](super::qmatmul_dx) by cooperative matrices: 64 x 64 tiles of dX, operands staged as f16 in workgroup memory
//! with powers of two that keep their range, sums in f32. One shader for both sizes of matrices.

use super::kernel;
use super::packing::Part;
use super::qmatmul_dx_operands::{GpuDxCall, QmatmulDxParams};
use crate::device::{Buffer, Cooperative, Defines, Dispatch};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_dx_coop.wgsl`
    KERNEL = "qmatmul_dx_coop", QmatmulDxParams, [dy: Read, w: Read, g: Read, a: Read, row_factor: Read, dx: Write]
}

/// Rows and columns of a tile of dX, fixed in the shader by its four subgroups of 32 x 32.
const TILE: u32 = 64;

/// Text constants beside the matrix's.
fn defines(matrix: Defines, cooperative: Cooperative, dropout: bool) -> Defines {
    cooperative.defines(matrix).with("dropout", dropout)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines]) -> Vec<Defines> {
    let each = |matrix: &Defines| {
        let matrix = matrix.clone();
        let flags = move |cooperative| [false, true].map(|dropout| defines(matrix.clone(), cooperative, dropout));
        Cooperative::ALL.into_iter().flat_map(flags)
    };
    matrices.iter().flat_map(each).collect()
}

/// `factor`: that of the rows of dY ([`row_factor`](super::row_factor)).
pub(crate) fn dispatch(call: &GpuDxCall<'_>, part: &Part, factor: &Buffer, cooperative: Cooperative) -> Result<()> {
    let operands = call.operands(part)?;
    let (m, k) = (call.m as u32, call.w.cols() as u32);
    let column_groups = k.div_ceil(TILE);
    let params = QmatmulDxParams { column_groups, ..call.params(part) };
    call.gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(call.w.defines(), cooperative, call.dropout(part).is_some()),
        buffers: &[&operands[..], &[factor, call.dx]].concat(),
        params: bytemuck::bytes_of(&params),
        groups: u64::from(m.div_ceil(TILE)) * u64::from(column_groups),
        flops_per_group: call.flops(part, TILE.into(), TILE.into()),
    })
}
