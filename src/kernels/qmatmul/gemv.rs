//! [`qmatmul`](crate::kernels::qmatmul) for up to eight rows of X on hardware. It is bound by
//! reading W, so it reads W once. Groups of threads share a few rows of W and stage X in workgroup
//! memory.

use super::call::{GEMV_ROWS, GpuCall, QmatmulParams};
use crate::device::{Defines, Dispatch, Tier};
use crate::error::Result;
use crate::kernels::kernel;
use crate::kernels::matrix::packing::Part;
use crate::kernels::matrix::variants::wide_matrices;

kernel! {
    KERNEL = "qmatmul_gemv" in "qmatmul/gemv.wgsl", QmatmulParams,
        [x: Read, w: Read, bias: Read, h: Read, b: Read, w4: Read, y: Write],
    variants: variants,
    twin: super::tests::twin_of_few_rows,
}

/// Threads per workgroup, and the rows of W that a group of threads has at a time. Which shape is
/// fastest is measured.
const SHAPES: [(u32, u32); 4] = [(128, 4), (64, 2), (128, 2), (256, 4)];
/// Threads that share rows of W, times rows of X. The product is fixed, so that staged X takes the
/// same memory for any number of rows.
const LANES: u32 = 64;
/// Maximum sums of one row of W that fit in workgroup memory beside the staged X.
const SUMS: u32 = 1024;

/// The shapes for this many rows of X.
fn shapes(tokens: u32) -> impl Iterator<Item = (u32, u32)> {
    // Small workgroups that stage as much as large ones would leave processors idle.
    SHAPES.into_iter().filter(move |(threads, _)| (16 * tokens..=SUMS / tokens).contains(threads))
}

/// Adds text constants to those of the matrix.
pub(crate) fn defines(matrix: Defines, tokens: u32, (threads, rows): (u32, u32)) -> Defines {
    matrix
        .with("tokens", tokens)
        .with("lanes", LANES / tokens)
        .with("threads", threads)
        .with("rows", rows)
        .with("share", false)
}

/// Text constants of every variant.
fn variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software {
        return Vec::new();
    }
    let matrices = wide_matrices();
    let mut all = Vec::new();
    for tokens in [1, 2, 4, 8] {
        for (index, shape) in shapes(tokens).enumerate() {
            // Sizes only repeat text, so one matrix represents the others.
            let matrices = if index == 0 { &matrices[..] } else { &matrices[..1] };
            all.extend(matrices.iter().map(|matrix| defines(matrix.clone(), tokens, shape)));
        }
    }
    all
}

pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part) -> Result<()> {
    let tokens = call.m.next_power_of_two().min(GEMV_ROWS) as u32;
    let (n, k) = (part.rows.len(), call.w.cols());
    let case = || format!("qmatmul_gemv {} m={tokens} n={n} k={k}", call.w.wide_defines().label());
    let shapes: Vec<_> = shapes(tokens).collect();
    let run = |(threads, rows): (u32, u32)| {
        let operands = call.operands(part)?;
        let params = call.params(part);
        let group_rows = threads * tokens / LANES * rows;
        call.gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(call.w.wide_defines(), tokens, (threads, rows)),
            buffers: &[&operands[..], &[&part.buffer, call.y]].concat(),
            params: bytemuck::bytes_of(&params),
            groups: n.div_ceil(group_rows as usize) as u64,
            flops_per_group: call.flops(tokens.into(), group_rows.into()),
        })
    };
    let key = (KERNEL.name, call.w.variant(), tokens, n, k);
    run(shapes[call.gpu.tuned(key, case, shapes.len(), |variant| run(shapes[variant]))?])
}
