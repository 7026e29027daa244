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

/// Invocations a workgroup, and its rows of W: at first one a team of 32, twice over. Which is the fastest is measured.
const SHAPES: [(u32, u32); 4] = [(128, 8), (64, 4), (256, 8), (128, 32)];
/// Threads a team where there are no subgroups.
const TEAM: u32 = 32;

/// Text constants beside the matrix's.
pub(crate) fn defines(matrix: Defines, tokens: u32, subgroups: bool, (threads, rows): (u32, u32)) -> Defines {
    matrix
        .with("tokens", tokens)
        .with("group_rows", rows)
        .with("threads", threads)
        .with("team", TEAM)
        .with("subgroups", subgroups)
        .with("share", false)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines], subgroups: bool) -> Vec<Defines> {
    let mut all = Vec::new();
    for tokens in [1, 2, 4, 8] {
        // Sizes only repeat text: of the others there is one matrix.
        for (shape, matrices) in SHAPES.iter().zip([matrices, &matrices[..1], &matrices[..1], &matrices[..1]]) {
            all.extend(matrices.iter().map(|matrix| defines(matrix.clone(), tokens, subgroups, *shape)));
        }
    }
    all
}

pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part) -> Result<()> {
    let (m, n, k) = (call.m.next_power_of_two(), part.rows.len(), call.w.cols());
    let case = || format!("qmatmul_gemv {} m={m} n={n} k={k}", call.w.defines().label());
    let shape = call.gpu.tuned(case, SHAPES.len(), |variant| dispatch_as(call, part, SHAPES[variant]))?;
    dispatch_as(call, part, SHAPES[shape])
}

fn dispatch_as(call: &GpuCall<'_>, part: &Part, shape: (u32, u32)) -> Result<()> {
    let operands = call.operands(part)?;
    let tokens = call.m.next_power_of_two().min(GEMV_ROWS) as u32;
    let n = part.rows.len() as u32;
    let params = QmatmulParams { ..call.params(part) };
    call.gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(call.w.defines(), tokens, call.gpu.tier().subgroups(), shape),
        buffers: &[&operands[..], &[call.y]].concat(),
        params: bytemuck::bytes_of(&params),
        groups: n.div_ceil(shape.1).into(),
        flops_per_group: call.flops(tokens.into(), shape.1.into()),
    })
}
