//! factor[m] = the power of two that brings the largest |X[m, :]| into [2^13, 2^14), for f16
//! staging: neither activations of 1e5 nor gradients of 1e-8 are lost. A row of zeros gets the
//! largest possible factor, 2^126, so that it is never the smallest factor among several rows.

use crate::device::{Buffer, Defines, Dispatch, Gpu, Kernel};
use crate::error::Result;
use crate::kernels::{kernel, params};

params! {
    struct RowFactorParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
        /// M.
        rows: u32,
    }
}

kernel! {
    KERNEL = "row_factor" in "rows/row_factor.wgsl", RowFactorParams, [x: Read, factor: Write],
    variants: |_| variants(),
    twin: super::factors::tests::twin,
}

/// Minimum invocations per workgroup; a power of two.
const THREADS: u32 = 64;
/// Minimum and maximum invocations that own a row; powers of two.
const TEAMS: [u32; 2] = [4, 256];
/// Approximate number of values that one invocation reads at a time.
const EACH: usize = 16;

/// Number of invocations that own a row of `k` values.
fn team(k: usize) -> u32 {
    let [fewest, most] = TEAMS;
    k.div_ceil(EACH).next_power_of_two().clamp(fewest as usize, most as usize) as u32
}

/// Text constants. `quads`: rows have a multiple of 4 values, and are read four values at a time.
fn defines(team: u32, quads: bool) -> Defines {
    Defines::new().with("threads", THREADS.max(team)).with("team", team).with("quads", quads)
}

/// Text constants of every variant.
pub(crate) fn variants() -> Vec<Defines> {
    let [fewest, most] = TEAMS.map(u32::trailing_zeros);
    (fewest..=most).flat_map(|log| [false, true].map(|quads| defines(1 << log, quads))).collect()
}

/// Computes the factors of `rows` rows of `k` values.
pub(crate) fn dispatch(gpu: &Gpu, x: &Buffer, factor: &Buffer, [rows, k]: [usize; 2]) -> Result<()> {
    run(gpu, &KERNEL, &[x, factor], [rows, k], |defines| defines)
}

/// The same, for a kernel that does more with the factors and has more text constants.
pub(crate) fn run(
    gpu: &Gpu,
    kernel: &'static Kernel,
    buffers: &[&Buffer],
    [rows, k]: [usize; 2],
    more: fn(Defines) -> Defines,
) -> Result<()> {
    let team = team(k);
    let group_rows = THREADS.max(team) / team;
    let params = RowFactorParams { k: k as u32, rows: rows as u32, ..Default::default() };
    gpu.dispatch(Dispatch {
        kernel,
        defines: &more(defines(team, k.is_multiple_of(4))),
        buffers,
        params: bytemuck::bytes_of(&params),
        groups: rows.div_ceil(group_rows as usize) as u64,
        flops_per_group: 2 * u64::from(group_rows) * k as u64,
    })
}

/// The formula for one row.
#[cfg(test)]
pub(crate) fn reference(row: &[f32]) -> f32 {
    let largest = row.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let exponent = (largest.to_bits() >> 23) as i32;
    f32::from_bits(((127 + 13 + 127 - exponent).clamp(1, 253) as u32) << 23)
}
