//! [`qmatmul`](super::qmatmul) for software drivers: no workgroup memory, no barriers; lanes along N, and one
//! invocation owns a two-dimensional piece of Y in registers, so that a decoded word feeds many rows.

use super::kernel;
use super::matrix::is_ragged;
use super::packing::Part;
use super::qmatmul::{GpuCall, QmatmulParams};
use crate::device::{Defines, Dispatch};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_lanes.wgsl`
    KERNEL = "qmatmul_lanes", QmatmulParams, [x: Read, w: Read, bias: Read, h: Read, b: Read, y: Write]
}

/// Invocations a workgroup: one register of the drivers' eight lanes.
const THREADS: u32 = 8;

/// Rows by columns of Y that one invocation owns, most rows first. From measurements on Mesa 22.3 (see README).
const SHAPES: [(u32, u32); 5] = [(16, 8), (8, 8), (4, 8), (2, 8), (1, 8)];

/// Text constants beside the matrix's.
pub(crate) fn defines(matrix: Defines, words_per_scale: u32, tokens: u32, columns: u32) -> Defines {
    matrix
        .with("threads", THREADS)
        .with("tokens", tokens)
        .with("columns", columns)
        .with("words_per_scale", words_per_scale)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines]) -> Vec<Defines> {
    let shapes = SHAPES.into_iter();
    shapes.flat_map(|(tokens, columns)| matrices.iter().map(move |m| defines(m.clone(), 2, tokens, columns))).collect()
}

pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part) -> Result<()> {
    let operands = call.operands(part)?;
    let n = part.rows.len() as u32;
    let k = call.w.cols();
    let words_per_scale = if is_ragged(k) { 1 } else { call.w.words_per_scale() };
    let (mut row, m) = (0, call.m as u32);
    while row < m {
        // As many rows as the largest shape takes in whole, then a smaller shape for what is left.
        let left = m - row;
        let (tokens, columns) = SHAPES.into_iter().find(|(tokens, _)| *tokens <= left).unwrap_or((1, 8));
        let rows = left / tokens * tokens;
        let column_groups = n.div_ceil(THREADS * columns);
        let params = QmatmulParams { row, rows, column_groups, ..call.params(part) };
        call.gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(call.w.defines(), words_per_scale, tokens, columns),
            buffers: &[&operands[..], &[call.y]].concat(),
            params: bytemuck::bytes_of(&params),
            groups: u64::from(rows / tokens) * u64::from(column_groups),
            flops_per_group: call.flops(tokens.into(), (THREADS * columns).into()),
        })?;
        row += rows;
    }
    Ok(())
}
