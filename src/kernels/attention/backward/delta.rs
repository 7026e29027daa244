//! stats[m, h] = (lse[m, h], delta[m, h]), with delta the sum over d of dO * O. The backward of
//! [`attention`](crate::kernels::attention) reads it for each query and head. O and dO are [M, H *
//! D].

use rayon::prelude::*;

use crate::device::{Buffer, Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::cpu::simd;
use crate::kernels::{kernel, params};
use crate::tensor::Tensor;

const OP: &str = "attention delta";

params! {
    struct AttentionDeltaParams {
        first_group: u32,
        groups: u32,
        /// M * H.
        rows: u32,
        /// D / 4.
        quads: u32,
    }
}

kernel! {
    KERNEL = "attention_delta" in "attention/backward/delta.wgsl", AttentionDeltaParams, [d_o: Read, o: Read, lse: Read, stats: Write],
    variants: |tier| vec![defines(tier)],
    twin: super::tests::twin,
}

/// Invocations per workgroup.
const THREADS: u32 = 64;

/// Threads that share a row. On hardware, enough to read whole lines of memory; on software
/// drivers one, because several would have to meet at a barrier.
fn team(tier: Tier) -> u32 {
    if tier == Tier::Software { 1 } else { 8 }
}

/// Text constants of the variant.
pub(crate) fn defines(tier: Tier) -> Defines {
    Defines::new().with("threads", THREADS).with("team", team(tier))
}

/// Returns pairs of log-sum-exp and delta for every query and head.
pub(crate) fn dispatch(gpu: &Gpu, d_o: &Tensor, o: &Tensor, lse: &Tensor, head_dim: usize) -> Result<Buffer> {
    let stats = gpu.alloc("attention stats", lse.len() as u64 * 8)?;
    let rows = (THREADS / team(gpu.tier())) as usize;
    let params = AttentionDeltaParams { rows: lse.len() as u32, quads: (head_dim / 4) as u32, ..Default::default() };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(gpu.tier()),
        buffers: &[d_o.buffer(gpu, OP)?, o.buffer(gpu, OP)?, lse.buffer(gpu, OP)?, &stats],
        params: bytemuck::bytes_of(&params),
        groups: lse.len().div_ceil(rows) as u64,
        flops_per_group: (2 * rows * head_dim) as u64,
    })?;
    Ok(stats)
}

/// Computes delta for every query and head, on the CPU.
pub(crate) fn deltas(d_o: &[f32], o: &[f32], head_dim: usize, deltas: &mut [f32]) {
    let rows = d_o.par_chunks_exact(head_dim).zip(o.par_chunks_exact(head_dim));
    deltas.par_iter_mut().zip(rows).with_min_len(256).for_each(|(delta, (d_o, o))| *delta = simd::dot(d_o, o));
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(d_o: &[T], o: &[T], head_dim: usize) -> Vec<T> {
    let dot = |(d_o, o): (&[T], &[T])| d_o.iter().zip(o).map(|(&d_o, &o)| d_o * o).sum();
    d_o.chunks(head_dim).zip(o.chunks(head_dim)).map(dot).collect()
}
