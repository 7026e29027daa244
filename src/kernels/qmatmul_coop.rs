//! [`qmatmul`](super::qmatmul) for many rows of X by cooperative matrices: 64 x 64 tiles of Y, operands staged as f16 in
//! workgroup memory with powers of two that keep their range, sums in f32. One shader for both sizes of matrices.

use super::kernel;
use super::packing::Part;
use super::qmatmul_operands::{GpuCall, QmatmulParams};
use crate::device::{Buffer, Cooperative, Defines, Dispatch};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_coop.wgsl`
    KERNEL = "qmatmul_coop", QmatmulParams, [x: Read, w: Read, bias: Read, h: Read, b: Read, row_factor: Read, y: Write]
}

/// Rows and columns of a tile of Y, fixed in the shader by its four subgroups of 32 x 32.
const TILE: u32 = 64;

/// Text constants beside the matrix's.
fn defines(matrix: Defines, cooperative: Cooperative) -> Defines {
    cooperative.defines(matrix).with("share", false)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines]) -> Vec<Defines> {
    let each = |matrix: &Defines| Cooperative::ALL.map(|cooperative| defines(matrix.clone(), cooperative));
    matrices.iter().flat_map(each).collect()
}

/// `factor`: that of the rows of X ([`row_factor`](super::row_factor)).
pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part, factor: &Buffer, cooperative: Cooperative) -> Result<()> {
    let operands = call.operands(part)?;
    let (m, n) = (call.m as u32, part.rows.len() as u32);
    let column_groups = n.div_ceil(TILE);
    let params = QmatmulParams { column_groups, ..call.params(part) };
    call.gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(call.w.defines(), cooperative),
        buffers: &[&operands[..], &[factor, call.y]].concat(),
        params: bytemuck::bytes_of(&params),
        groups: u64::from(m.div_ceil(TILE)) * u64::from(column_groups),
        flops_per_group: call.flops(TILE.into(), TILE.into()),
    })
}
