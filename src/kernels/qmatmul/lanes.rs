//! [`qmatmul`](crate::kernels::qmatmul) for software drivers: no workgroup memory, no barriers.
//! Lanes run along N, and one invocation owns a two-dimensional piece of Y in registers, so that a
//! decoded word serves many rows.

use super::call::{GpuCall, QmatmulParams};
use crate::device::{Defines, Dispatch, Gpu, Kernel, Tier};
use crate::error::Result;
use crate::kernels::kernel;
use crate::kernels::matrix::packing::Part;
use crate::kernels::matrix::variants::matrices;
use crate::kernels::matrix::{DeviceMatrix, is_ragged};

kernel! {
    KERNEL = "qmatmul_lanes" in "qmatmul/lanes.wgsl", QmatmulParams, [x: Read, w: Read, bias: Read, h: Read, b: Read, y: Write],
    variants: variants,
    twin: super::tests::twin,
}

/// Invocations per workgroup: the eight lanes of a driver's register.
pub(crate) const THREADS: u32 = 8;

/// Piece of Y that one invocation owns: rows x columns, most rows first; from measurements on Mesa
/// 22.3 (benches/NOTES.md). The largest pay off where lanes share x; elsewhere they would only
/// take long to compile.
const SHAPES: [(u32, u32); 6] = [(32, 16), (16, 16), (8, 16), (4, 8), (2, 8), (1, 8)];
/// Candidates for many rows, the default first. They differ in how much is decoded twice, and in
/// the remainder at the end of N.
const LARGEST: [(u32, u32); 3] = [SHAPES[0], (64, 8), (32, 8)];

/// Selects the shapes that a kernel is compiled for.
pub(crate) fn shapes(all: [(u32, u32); 6], share: bool) -> impl Iterator<Item = (u32, u32)> {
    all.into_iter().filter(move |(tokens, _)| share || *tokens <= 8)
}

/// Chooses the shape for `left` rows, at least one: `largest` if it has no more rows than that,
/// else the first shape that has no more. The last shape has one row.
pub(crate) fn fitting(all: [(u32, u32); 6], share: bool, largest: (u32, u32), left: u32) -> (u32, u32) {
    let mut usable = Some(largest).into_iter().filter(|_| share).chain(shapes(all, share));
    usable.find(|(tokens, _)| *tokens <= left).unwrap_or(all[5])
}

/// Adds text constants to those of the matrix.
pub(crate) fn defines(matrix: Defines, words_per_scale: u32, (tokens, columns): (u32, u32), share: bool) -> Defines {
    matrix
        .with("threads", THREADS)
        .with("tokens", tokens)
        .with("columns", columns)
        .with("words_per_scale", words_per_scale)
        .with("share", share)
}

/// Text constants of every variant.
fn variants(tier: Tier) -> Vec<Defines> {
    if tier != Tier::Software {
        return Vec::new();
    }
    let matrices = matrices();
    let shapes = [false, true].into_iter().flat_map(|share| shapes(SHAPES, share).map(move |shape| (shape, share)));
    let shapes = shapes.chain(LARGEST[1..].iter().map(|shape| (*shape, true)));
    let variant = |(shape, share): ((u32, u32), bool)| {
        let fits = move |matrix: &&Defines| !share || !matrix.flag("ragged");
        matrices.iter().filter(fits).map(move |matrix| defines(matrix.clone(), 2, shape, share))
    };
    shapes.flat_map(variant).collect()
}

/// Whether a workgroup is exactly one subgroup, so that its lanes can share what they load.
pub(crate) fn one_subgroup(gpu: &Gpu) -> bool {
    let info = gpu.info();
    gpu.wgpu_device().features().contains(wgpu::Features::SUBGROUP)
        && (info.subgroup_min_size, info.subgroup_max_size) == (THREADS, THREADS)
}

/// Returns the fastest of `shapes` for `m` rows and a part of W. With fewer rows than the largest
/// shape needs, returns the first one.
pub(crate) fn tuned<const N: usize>(
    gpu: &Gpu,
    kernel: &Kernel,
    shapes: [(u32, u32); N],
    (m, w, part): (usize, &DeviceMatrix, &Part),
    run: impl Fn((u32, u32)) -> Result<()>,
) -> Result<(u32, u32)> {
    let most = shapes.iter().map(|(tokens, _)| *tokens).max().unwrap_or_default();
    if m < most as usize {
        return Ok(shapes[0]);
    }
    let (n, k) = (part.rows.len(), w.cols());
    let case = || format!("{} {} n={n} k={k}", kernel.name, w.defines().label());
    let key = (kernel.name, w.variant(), n, k);
    Ok(shapes[gpu.tuned(key, case, N, |variant| run(shapes[variant]))?])
}

pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part) -> Result<()> {
    let share = !is_ragged(call.w.cols()) && one_subgroup(call.gpu);
    let run = |largest| dispatch_as(call, part, largest, share);
    let largest = if share { tuned(call.gpu, &KERNEL, LARGEST, (call.m, call.w, part), run)? } else { LARGEST[0] };
    run(largest)
}

/// Runs the shape `largest` for as many whole groups of rows as fit, then smaller shapes.
fn dispatch_as(call: &GpuCall<'_>, part: &Part, largest: (u32, u32), share: bool) -> Result<()> {
    let operands = call.operands(part)?;
    let n = part.rows.len() as u32;
    let k = call.w.cols();
    let words_per_scale = if is_ragged(k) { 1 } else { call.w.words_per_scale() };
    let (mut row, m) = (0, call.m as u32);
    while row < m {
        // First all whole groups of the shape's rows, then a smaller shape for the remainder.
        let left = m - row;
        let (tokens, columns) = fitting(SHAPES, share, largest, left);
        let rows = left / tokens * tokens;
        let column_groups = n.div_ceil(THREADS * columns);
        let params = QmatmulParams { row, rows, ..call.params(part) };
        call.gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(call.w.defines(), words_per_scale, (tokens, columns), share),
            buffers: &[&operands[..], &[call.y]].concat(),
            params: bytemuck::bytes_of(&params),
            groups: u64::from(rows / tokens) * u64::from(column_groups),
            flops_per_group: call.flops(tokens.into(), (THREADS * columns).into()),
        })?;
        row += rows;
    }
    Ok(())
}
