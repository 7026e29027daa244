//! [`qmatmul`](super::qmatmul) for up to eight rows of X on hardware: bound by reading W, so W is read once. A team (a
//! subgroup, or 32 threads) owns a row of W at a time, its lanes stride K.

use super::kernel;
use super::packing::Part;
use super::qmatmul_operands::{GEMV_ROWS, GpuCall, QmatmulParams};
use crate::device::{Defines, Dispatch};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_gemv.wgsl`
    KERNEL = "qmatmul_gemv", QmatmulParams, [x: Read, w: Read, bias: Read, h: Read, b: Read, y: Write]
}

/// Invocations a workgroup.
const THREADS: u32 = 128;
/// Rows of W a workgroup: one a team of 32, twice over.
const ROWS: u32 = 8;
/// Threads a team where there are no subgroups.
const TEAM: u32 = 32;

/// Text constants beside the matrix's.
pub(crate) fn defines(matrix: Defines, tokens: u32, subgroups: bool) -> Defines {
    matrix
        .with("tokens", tokens)
        .with("group_rows", ROWS)
        .with("threads", THREADS)
        .with("team", TEAM)
        .with("subgroups", subgroups)
        .with("share", false)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines], subgroups: bool) -> Vec<Defines> {
    let tokens = [1, 2, 4, 8].into_iter();
    tokens.flat_map(|tokens| matrices.iter().map(move |m| defines(m.clone(), tokens, subgroups))).collect()
}

pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part) -> Result<()> {
    let operands = call.operands(part)?;
    let tokens = call.m.next_power_of_two().min(GEMV_ROWS) as u32;
    let n = part.rows.len() as u32;
    let params = QmatmulParams { ..call.params(part) };
    call.gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(call.w.defines(), tokens, call.gpu.tier().subgroups()),
        buffers: &[&operands[..], &[call.y]].concat(),
        params: bytemuck::bytes_of(&params),
        groups: n.div_ceil(ROWS).into(),
        flops_per_group: call.flops(tokens.into(), ROWS.into()),
    })
}
