//! y = scale * sum of x (or of x^2). Runs are summed, then the runs' sums, until one value is
//! left. The order is fixed, so reruns are equal to the bit. Partial sums are short, so the error
//! stays near one rounding.

use rayon::prelude::*;

use super::teams::RowTeams;
use crate::device::{Buffer, Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::elementwise::quads::CPU_CHUNK;
use crate::kernels::{kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "sum";

params! {
    struct SumParams {
        first_group: u32,
        groups: u32,
        /// Values of x.
        len: u32,
        /// Number of runs.
        rows: u32,
        /// Place of the first run's sum in y, in values.
        slot: u32,
        scale: f32,
    }
}

kernel! {
    KERNEL = "sum" in "rows/sum.wgsl", SumParams, [x: Read, y: Write],
    variants: |tier| [false, true].map(|squares| defines(tier, squares)).to_vec(),
    twin: tests::twin,
}

/// Values per run / 4.
fn run_quads(tier: Tier) -> u32 {
    match tier {
        Tier::Software => 256,
        _ => 4096,
    }
}

fn defines(tier: Tier, squares: bool) -> Defines {
    RowTeams::long(tier).defines().with("run_quads", run_quads(tier)).with("squares", squares)
}

/// Returns scale * the sum of all values, `[1]`.
///
/// # Errors
/// Device errors.
pub fn sum(x: &Tensor, scale: f32) -> Result<Tensor> {
    match x.storage() {
        Storage::Cpu(cpu, values) => {
            let mut y = cpu.zeros(1)?;
            y[0] = (f64::from(scale) * on_cpu(values, |value| value)) as f32;
            Ok(Tensor::from_host(cpu, &[1], y))
        }
        Storage::Gpu(gpu, buffer) => {
            let y = Tensor::uninit(gpu, OP, &[1])?;
            on_gpu(gpu, buffer, x.len(), false, scale, y.buffer(gpu, OP)?, 0)?;
            Ok(y)
        }
        Storage::Planned(cpu, _) => Tensor::planned(cpu, &[1]),
    }
}

/// Returns the sum of `f` of all values, in f64.
pub(crate) fn on_cpu(values: &[f32], f: impl Fn(f64) -> f64 + Sync) -> f64 {
    let of_chunk = |chunk: &[f32]| {
        let (eights, tail) = chunk.as_chunks::<8>();
        let mut sums = [0.0f64; 8];
        for eight in eights {
            for lane in 0..8 {
                sums[lane] += f(f64::from(eight[lane]));
            }
        }
        sums.iter().sum::<f64>() + tail.iter().map(|&value| f(f64::from(value))).sum::<f64>()
    };
    // Collected first: the order of the sum must not depend on thread timing.
    values.par_chunks(CPU_CHUNK).map(of_chunk).collect::<Vec<f64>>().iter().sum()
}

/// Records y[slot] = scale * the sum of the first `len` values of `x`, or of their squares.
pub(crate) fn on_gpu(
    gpu: &Gpu,
    x: &Buffer,
    len: usize,
    squares: bool,
    scale: f32,
    y: &Buffer,
    slot: usize,
) -> Result<()> {
    // A sum over no values is still written: zero.
    let runs = len.div_ceil(4 * run_quads(gpu.tier()) as usize).max(1);
    if runs == 1 {
        return pass(gpu, x, len, squares, SumParams { rows: 1, slot: slot as u32, scale, ..Default::default() }, y);
    }
    let partial = gpu.alloc("partial sums", 4 * runs as u64)?;
    pass(gpu, x, len, squares, SumParams { rows: runs as u32, slot: 0, scale: 1.0, ..Default::default() }, &partial)?;
    on_gpu(gpu, &partial, runs, false, scale, y, slot)
}

fn pass(gpu: &Gpu, x: &Buffer, len: usize, squares: bool, params: SumParams, y: &Buffer) -> Result<()> {
    let teams = RowTeams::long(gpu.tier());
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(gpu.tier(), squares),
        buffers: &[x, y],
        params: bytemuck::bytes_of(&SumParams { len: len as u32, ..params }),
        groups: teams.groups(params.rows as usize),
        flops_per_group: 8 * teams.group_rows() * u64::from(run_quads(gpu.tier())),
    })
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(x: &[T], scale: T) -> T {
    scale * x.iter().copied().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::testing::tolerances::SUM;
    use crate::testing::{self, wide};

    pub fn twin(device: &Device) {
        for len in [0, 1, 2, 3, 5, 1023, 1024, 1025, 16_385, 2_100_000] {
            let x = testing::values(len as u64, len, 1.0);
            let wanted = reference(&wide(&x), 0.5);
            let terms = wide(&x).iter().map(|value| value.abs()).sum::<f64>();
            let tensor = Tensor::from_slice(device, &[len], &x).unwrap();
            let [first, again] = [(); 2].map(|()| sum(&tensor, 0.5).unwrap().to_vec().unwrap());
            let context = format!("{} {len} values", testing::name(device));
            testing::assert_close(&context, &first, &[wanted], &SUM.f32.bounds(&[terms]));
            assert_eq!(first, again, "{context}: the same again");
        }
    }
}
