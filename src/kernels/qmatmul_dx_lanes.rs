//! [`qmatmul_dx`](super::qmatmul_dx) for software drivers: no workgroup memory, no barriers; lanes along K, and one
//! invocation owns a two-dimensional piece of dX in registers, so that decoded words feed many rows.

use super::kernel;
use super::matrix::is_ragged;
use super::packing::Part;
use super::qmatmul_dx_operands::{GpuDxCall, QmatmulDxParams};
use super::qmatmul_lanes::{THREADS, fitting, one_subgroup, shapes, tuned};
use crate::device::{Defines, Dispatch};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_dx_lanes.wgsl`
    KERNEL = "qmatmul_dx_lanes", QmatmulDxParams, [dy: Read, w: Read, g: Read, a: Read, dx: Write]
}

/// Rows by words of eight columns of dX that one invocation owns, most rows first; from measurements on Mesa 22.3
/// (benches/NOTES.md). The largest pay where lanes share dY; elsewhere they would only take long to compile.
const SHAPES: [(u32, u32); 6] = [(32, 2), (16, 2), (8, 2), (4, 2), (2, 2), (1, 2)];
/// What may be faster than the first of them, for many rows: they differ in how much is decoded twice, and in what is left over
/// at the end of K.
const LARGEST: [(u32, u32); 3] = [SHAPES[0], (64, 1), (32, 1)];

/// How many scales the eight words of a workgroup's lanes have between them, if they are few enough to be shared.
fn scale_sets(words_per_scale: u32) -> u32 {
    if words_per_scale >= THREADS / 2 { THREADS / words_per_scale } else { 0 }
}

/// What a variant's text depends on beside the matrix and the shape.
#[derive(Clone, Copy)]
struct Form {
    /// Lanes share what they load.
    share: bool,
    /// See [`scale_sets`].
    scale_sets: u32,
    dropout: bool,
    /// Adds to dX. A variant, as drivers compile for seconds what most matrices never need.
    accumulate: bool,
}

/// Text constants beside the matrix's.
fn defines(matrix: Defines, (tokens, words): (u32, u32), form: Form) -> Defines {
    matrix
        .with("threads", THREADS)
        .with("tokens", tokens)
        .with("words", words)
        .with("share", form.share)
        .with("scale_sets", form.scale_sets)
        .with("dropout", form.dropout)
        .with("accumulate", form.accumulate)
}

/// Every variant's text constants, for the registry test. Sizes only repeat text: of most shapes there is one matrix.
pub(crate) fn variants(matrices: &[Defines]) -> Vec<Defines> {
    let mut all = Vec::new();
    for share in [false, true] {
        let larger = LARGEST[1..].iter().copied().filter(|_| share);
        for shape in shapes(SHAPES, share).chain(larger) {
            for matrix in if shape.0 == 2 { matrices } else { &matrices[..1] } {
                for scale_sets in if share && !matrix.flag("ragged") { 0..3 } else { 0..1 } {
                    for (dropout, accumulate) in [(false, false), (true, false), (false, true)] {
                        let form = Form { share, scale_sets, dropout, accumulate };
                        all.push(defines(matrix.clone(), shape, form));
                    }
                }
            }
        }
    }
    all
}

pub(crate) fn dispatch(call: &GpuDxCall<'_>, part: &Part) -> Result<()> {
    let k = call.w.cols();
    let share = one_subgroup(call.gpu);
    let form = Form {
        share,
        scale_sets: if share && !is_ragged(k) { scale_sets(call.w.words_per_scale()) } else { 0 },
        dropout: call.dropout(part).is_some(),
        accumulate: call.params(part).accumulate != 0,
    };
    let run = |largest| dispatch_as(call, part, largest, form);
    // A kernel that adds to dX cannot be run again.
    let tunable = share && !form.accumulate;
    let largest = if tunable { tuned(call.gpu, &KERNEL, LARGEST, (call.m, call.w, part), run)? } else { LARGEST[0] };
    run(largest)
}

/// With the shape `largest` for as many rows as it takes in whole.
fn dispatch_as(call: &GpuDxCall<'_>, part: &Part, largest: (u32, u32), form: Form) -> Result<()> {
    let operands = call.operands(part)?;
    let (mut row, m) = (0, call.m as u32);
    while row < m {
        // As many rows as the largest shape takes in whole, then a smaller shape for what is left.
        let left = m - row;
        let (tokens, words) = fitting(SHAPES, form.share, largest, left);
        let rows = left / tokens * tokens;
        let params = call.params(part);
        let column_groups = params.words.div_ceil(THREADS * words);
        let params = QmatmulDxParams { row, rows, ..params };
        call.gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(call.w.defines(), (tokens, words), form),
            buffers: &[&operands[..], &[call.dx]].concat(),
            params: bytemuck::bytes_of(&params),
            groups: u64::from(rows / tokens) * u64::from(column_groups),
            flops_per_group: call.flops(part, tokens.into(), (8 * THREADS * words).into()),
        })?;
        row += rows;
    }
    Ok(())
}
