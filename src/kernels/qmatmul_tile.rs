//! [`qmatmul`](super::qmatmul) for many rows of X on hardware: 64 x 64 tiles of Y, operands staged in workgroup memory
//! (as f16 where the tier says so, with powers of two that keep their range), 8 x 8 values of Y an invocation.

use super::kernel;
use super::packing::Part;
use super::qmatmul_operands::{GpuCall, QmatmulParams};
use crate::device::{Buffer, Defines, Dispatch};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_tile.wgsl`
    KERNEL = "qmatmul_tile", QmatmulParams, [x: Read, w: Read, bias: Read, h: Read, b: Read, row_factor: Read, y: Write]
}

/// Rows and columns of a tile of Y, fixed in the shader by its 64 threads of 8 x 8.
const TILE: u32 = 64;

/// Text constants beside the matrix's.
pub(crate) fn defines(matrix: Defines, f16: bool) -> Defines {
    matrix.with("f16", f16).with("share", false)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines], f16: bool) -> Vec<Defines> {
    matrices.iter().map(|matrix| defines(matrix.clone(), f16)).collect()
}

/// `factor`: that of the rows of X, for f16 staging ([`row_factor`](super::row_factor)).
pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part, factor: &Buffer) -> Result<()> {
    let operands = call.operands(part)?;
    let f16 = call.gpu.tier().f16();
    let (m, n) = (call.m as u32, part.rows.len() as u32);
    let column_groups = n.div_ceil(TILE);
    let params = QmatmulParams { column_groups, ..call.params(part) };
    call.gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(call.w.defines(), f16),
        buffers: &[&operands[..], &[factor, call.y]].concat(),
        params: bytemuck::bytes_of(&params),
        groups: u64::from(m.div_ceil(TILE)) * u64::from(column_groups),
        flops_per_group: call.flops(TILE.into(), TILE.into()),
    })
}
