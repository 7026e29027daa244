//! [`qmatmul_dx`](crate::kernels::qmatmul::dx) for software drivers: no workgroup memory, no
//! barriers. Lanes run along K, and one invocation owns a two-dimensional piece of dX in registers,
//! so that decoded words serve many rows.

use super::call::{GpuDxCall, QmatmulDxParams};
use crate::device::{Defines, Dispatch, Tier};
use crate::error::Result;
use crate::kernels::kernel;
use crate::kernels::matrix::is_ragged;
use crate::kernels::matrix::packing::Part;
use crate::kernels::matrix::variants::matrices;
use crate::kernels::qmatmul::lanes::{THREADS, fitting, one_subgroup, shapes, tuned};

kernel! {
    KERNEL = "qmatmul_dx_lanes" in "qmatmul/dx/lanes.wgsl", QmatmulDxParams, [dy: Read, w: Read, g: Read, a: Read, dx: Write],
    variants: variants,
    twin: super::tests::twin,
}

/// Piece of dX that one invocation owns: rows x words of eight columns, most rows first; from
/// measurements on Mesa 22.3 (benches/NOTES.md). The largest pay off where lanes share dY;
/// elsewhere they would only take long to compile.
const SHAPES: [(u32, u32); 6] = [(32, 2), (16, 2), (8, 2), (4, 2), (2, 2), (1, 2)];
/// Candidates for many rows, the default first. They differ in how much is decoded twice, and in
/// the remainder at the end of K.
const LARGEST: [(u32, u32); 3] = [SHAPES[0], (64, 1), (32, 1)];

/// Number of scales that the eight words of a workgroup's lanes use together, if there are few
/// enough to share.
fn scale_sets(words_per_scale: u32) -> u32 {
    if words_per_scale >= THREADS / 2 { THREADS / words_per_scale } else { 0 }
}

/// Properties of a variant's text besides the matrix and the shape.
#[derive(Clone, Copy)]
struct Form {
    /// Whether lanes share what they load.
    share: bool,
    /// See [`scale_sets`].
    scale_sets: u32,
    dropout: bool,
    /// Whether it adds to dX. A separate variant, because drivers would spend seconds compiling
    /// what most matrices never need.
    accumulate: bool,
}

/// Adds text constants to those of the matrix.
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

/// Text constants of every variant. Sizes only repeat text, so most shapes come with one matrix.
fn variants(tier: Tier) -> Vec<Defines> {
    if tier != Tier::Software {
        return Vec::new();
    }
    let matrices = matrices();
    let mut all = Vec::new();
    for share in [false, true] {
        let larger = LARGEST[1..].iter().copied().filter(|_| share);
        for shape in shapes(SHAPES, share).chain(larger) {
            for matrix in if shape.0 == 2 { &matrices[..] } else { &matrices[..1] } {
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
    // A kernel that adds to dX can't be run again.
    let tunable = share && !form.accumulate;
    let largest = if tunable { tuned(call.gpu, &KERNEL, LARGEST, (call.m, call.w, part), run)? } else { LARGEST[0] };
    run(largest)
}

/// Runs the shape `largest` for as many whole groups of rows as fit, then smaller shapes.
fn dispatch_as(call: &GpuDxCall<'_>, part: &Part, largest: (u32, u32), form: Form) -> Result<()> {
    let operands = call.operands(part)?;
    let (mut row, m) = (0, call.m as u32);
    while row < m {
        // First all whole groups of the shape's rows, then a smaller shape for the remainder.
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
