//! Sums of squares of many tensors, for [`grad_norm`](crate::kernels::optim::grad_norm): a fixed
//! number of runs per tensor, a dozen tensors per dispatch. A model has hundreds of gradients, and
//! each dispatch costs the host the same.

use crate::device::{Buffer, Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::rows::teams::RowTeams;
use crate::kernels::{kernel, params, takes_several};

params! {
    struct SquareSumsParams {
        first_group: u32,
        groups: u32,
        /// Runs of all tensors in the dispatch.
        rows: u32,
        /// Place of the first sum in y.
        slot: u32,
        /// Number of values of the first four tensors, of the next four, and of the last four.
        lens0: [u32; 4],
        lens1: [u32; 4],
        lens2: [u32; 4],
    }
}

kernel! {
    KERNEL = "square_sums" in "optim/square_sums.wgsl", SquareSumsParams, [
        x0: Read, x1: Read, x2: Read, x3: Read, x4: Read, x5: Read, x6: Read, x7: Read, x8: Read, x9: Read, x10: Read, x11: Read,
        y: Write,
    ],
    variants: |tier| if tier == Tier::Software { Vec::new() } else { vec![defines(tier)] },
    twin: super::grad_norm::tests::twin,
}

/// Tensors per dispatch.
const TENSORS: usize = 12;
/// Runs per tensor, long or short.
pub(crate) const RUNS: usize = 16;

fn defines(tier: Tier) -> Defines {
    RowTeams::long(tier).defines().with("runs", RUNS as u32)
}

/// Whether a device takes several tensors at a time.
pub(crate) fn fits(gpu: &Gpu) -> bool {
    takes_several(gpu, &KERNEL)
}

/// Records y[RUNS * i + run] = the sum of squares of a run of tensor i. `tensors` are pairs of a
/// buffer and its number of values.
pub(crate) fn dispatch(gpu: &Gpu, tensors: &[(&Buffer, usize)], y: &Buffer) -> Result<()> {
    let teams = RowTeams::long(gpu.tier());
    for (index, tensors) in tensors.chunks(TENSORS).enumerate() {
        let mut buffers = [gpu.unused()?; TENSORS + 1];
        let mut lens = [0; TENSORS];
        for (slot, (buffer, len)) in tensors.iter().enumerate() {
            (buffers[slot], lens[slot]) = (buffer, *len as u32);
        }
        buffers[TENSORS] = y;
        let rows = tensors.len() * RUNS;
        let [lens0, lens1, lens2] = *lens.as_chunks::<4>().0 else { unreachable!("a dozen is three fours") };
        let params = SquareSumsParams {
            rows: rows as u32,
            slot: (index * TENSORS * RUNS) as u32,
            lens0,
            lens1,
            lens2,
            ..Default::default()
        };
        let longest = tensors.iter().map(|(_, len)| *len).max().unwrap_or(0);
        gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(gpu.tier()),
            buffers: &buffers,
            params: bytemuck::bytes_of(&params),
            groups: teams.groups(rows),
            flops_per_group: 2 * (longest / RUNS) as u64 * teams.group_rows(),
        })?;
    }
    Ok(())
}
