//! [`qmatmul`](crate::kernels::qmatmul) for many rows of X on hardware: square tiles of Y, operands
//! staged in workgroup memory (in tiers with f16 as f16, with powers of two that keep their range),
//! 8 x 8 values of Y per invocation.

use super::call::{GpuCall, QmatmulParams};
use crate::device::{Buffer, Defines, Dispatch, Gpu, Kernel, Tier};
use crate::error::Result;
use crate::kernels::kernel;
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::matrix::packing::Part;
use crate::kernels::matrix::variants::wide_matrices;

kernel! {
    KERNEL = "qmatmul_tile" in "qmatmul/tile.wgsl", QmatmulParams,
        [x: Read, w: Read, bias: Read, h: Read, b: Read, row_factor: Read, w4: Read, y: Write],
    variants: variants,
    twin: super::tests::twin_of_many_rows,
}

/// Rows and columns of a tile. A large tile decodes each weight for twice as many rows; which one
/// is faster is measured.
const SIDES: [u32; 2] = [64, 128];
/// Maximum workgroup memory of a tile with the largest side, in bytes.
const LARGE_BYTES: u32 = 32 << 10;
/// Threads of the largest tile.
const LARGE_THREADS: u32 = 256;

/// The sides that fit a device and that `m` rows fill.
pub(crate) fn sides(gpu: &Gpu, m: usize) -> &'static [u32] {
    if m > SIDES[0] as usize && has_room(gpu, LARGE_THREADS, LARGE_BYTES) { &SIDES } else { &SIDES[..1] }
}

/// Whether a device supports workgroups with this many threads and this much memory.
pub(crate) fn has_room(gpu: &Gpu, threads: u32, bytes: u32) -> bool {
    let limits = gpu.limits();
    limits.workgroup_bytes >= bytes && limits.workgroup_threads >= threads
}

/// Runs a product of `m` rows with the fastest of several tiles, listed smallest first. `try_out`
/// runs a tile for a measurement, and is called many times.
pub(crate) fn with_tile<T: Copy>(
    gpu: &Gpu,
    kernel: &Kernel,
    (m, w, part): (usize, &DeviceMatrix, &Part),
    tiles: &[T],
    try_out: impl Fn(T) -> Result<()>,
    run: impl Fn(T) -> Result<()>,
) -> Result<()> {
    let (rows, n, k) = (m.next_power_of_two(), part.rows.len(), w.cols());
    let case = || format!("{} {} m={rows} n={n} k={k}", kernel.name, w.wide_defines().label());
    let key = (kernel.name, w.variant(), rows, n, k);
    run(tiles[gpu.tuned(key, case, tiles.len(), |variant| try_out(tiles[variant]))?])
}

/// Properties of a variant's text besides the matrix.
#[derive(Clone, Copy)]
struct Form {
    /// Operands are staged as f16.
    f16: bool,
    /// Rows and columns of a tile.
    side: u32,
    /// Results are stored four at a time.
    quads: bool,
    /// H and B are read four ranks at a time.
    rank_quads: bool,
}

/// Adds text constants to those of the matrix.
fn defines(matrix: Defines, form: Form) -> Defines {
    let matrix = matrix.with("f16", form.f16).with("side", form.side).with("quads", form.quads);
    matrix.with("rank_quads", form.rank_quads).with("share", false)
}

/// Text constants of every variant. Devices with cooperative matrices have
/// [`coop`](super::coop) instead.
fn variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software || tier.cooperative() {
        return Vec::new();
    }
    let matrices = wide_matrices();
    let f16 = tier.f16();
    let of = |matrix: &Defines, side, quads, rank_quads| defines(matrix.clone(), Form { f16, side, quads, rank_quads });
    let mut all: Vec<_> = matrices.iter().map(|matrix| of(matrix, 64, true, true)).collect();
    let sizes = [(64, false, false), (128, true, true), (128, false, false)];
    all.extend(sizes.map(|(side, quads, rank_quads)| of(&matrices[0], side, quads, rank_quads)));
    all
}

/// `factor`: factors of the rows of X, for f16 staging
/// ([`row_factor`](crate::kernels::rows::row_factor)).
pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part, factor: &Buffer) -> Result<()> {
    let run = |side| dispatch_as(call, part, factor, side);
    with_tile(call.gpu, &KERNEL, (call.m, call.w, part), sides(call.gpu, call.m), run, run)
}

fn dispatch_as(call: &GpuCall<'_>, part: &Part, factor: &Buffer, side: u32) -> Result<()> {
    let operands = call.operands(part)?;
    let n = part.rows.len() as u32;
    let column_groups = n.div_ceil(side);
    let form =
        Form { f16: call.gpu.tier().f16(), side, quads: call.stores_quads(part), rank_quads: call.reads_rank_quads() };
    call.gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(call.w.wide_defines(), form),
        buffers: &[&operands[..], &[factor, &part.buffer, call.y]].concat(),
        params: bytemuck::bytes_of(&call.params(part)),
        groups: u64::from((call.m as u32).div_ceil(side)) * u64::from(column_groups),
        flops_per_group: call.flops(side.into(), side.into()),
    })
}
