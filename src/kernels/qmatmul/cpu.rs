//! Fast [`qmatmul`](crate::kernels::qmatmul) on the CPU. For few rows of X, a SIMD product straight
//! from the packed codes; for many, tiles of W are decoded and a GEMM crate multiplies them.

use gemm::Parallelism;
use rayon::prelude::*;

use super::call::{GEMV_ROWS, HostLora};
use crate::device::Cpu;
use crate::error::Result;
use crate::kernels::Scratch;
use crate::kernels::cpu::product::{Columns, View, panels};
use crate::kernels::cpu::simd::{self, FewRows};
use crate::quant::HostMatrix;

/// Computes Y [M, N] for `x` [M, K]. The caller has checked the shapes. `bias` is `[N]` or [M, N].
pub(crate) fn forward(
    cpu: &Cpu,
    x: &[f32],
    w: &HostMatrix,
    bias: Option<&[f32]>,
    lora: Option<HostLora<'_>>,
    y: &mut [f32],
) -> Result<()> {
    let m = x.len() / w.cols();
    let lora = lora.filter(|lora| lora.rank > 0);
    match m {
        0 => Ok(()),
        1..=GEMV_ROWS => few_rows(cpu, x, w, bias, lora, y),
        _ => many_rows(cpu, x, w, bias, lora, y),
    }
}

/// Returns the part of `bias` that is added to a row of Y of `n` values.
fn bias_row(bias: &[f32], row: usize, n: usize) -> &[f32] {
    if bias.len() == n { bias } else { &bias[row * n..][..n] }
}

/// Rows of W per task.
const GEMV_TASK: usize = 32;

fn few_rows(
    cpu: &Cpu,
    x: &[f32],
    w: &HostMatrix,
    bias: Option<&[f32]>,
    lora: Option<HostLora<'_>>,
    y: &mut [f32],
) -> Result<()> {
    let (n, k) = (w.rows(), w.cols());
    let m = x.len() / k;
    let few = FewRows::new(w, x);
    let fill = |by_row: &mut [f32]| {
        by_row.par_chunks_mut(GEMV_TASK * m).enumerate().for_each(|(task, out)| {
            let first = task * GEMV_TASK;
            few.times(w, first..first + out.len() / m, out);
            for (row, out) in (first..).zip(out.chunks_mut(m)) {
                for (t, out) in out.iter_mut().enumerate() {
                    if let Some(HostLora { h, b, rank, scale }) = lora {
                        *out += scale * simd::dot(&h[t * rank..][..rank], &b[row * rank..][..rank]);
                    }
                    *out += bias.map_or(0.0, |bias| bias_row(bias, t, n)[row]);
                }
            }
        })
    };
    if m == 1 {
        fill(y);
        return Ok(());
    }
    // [N, M], so that a task's results are contiguous.
    let mut by_row = cpu.zeros(n * m)?;
    fill(&mut by_row);
    for (row, values) in by_row.chunks(m).enumerate() {
        for (t, &value) in values.iter().enumerate() {
            y[t * n + row] = value;
        }
    }
    Ok(())
}

/// Maximum rows and columns of W that a task decodes at a time: 2 MiB of f32, so that they stay in
/// the cache, and the GEMM crate packs X only once for all these rows.
const PANEL: (usize, usize) = (512, 1024);

/// Columns of W [N, K] that a task decodes at a time, with `width` rows.
fn depth(n: usize, k: usize, width: usize) -> usize {
    // With any number of threads, all tiles together take at most a quarter of W.
    let live = rayon::current_num_threads().min(n.div_ceil(width));
    (n * k / 4 / (live * width)).clamp(64, PANEL.1).min(k)
}

/// Memory that [`forward`] takes for `m` rows of X and W [N, K].
pub(crate) fn scratch(m: usize, n: usize, k: usize) -> Scratch {
    if m <= GEMV_ROWS {
        return Scratch::kept((m > 1).then_some(n * m));
    }
    let (width, rows_of) = panels(n, PANEL.0);
    let depth = depth(n, k, width);
    Scratch::tasks((0..n.div_ceil(width)).map(|index| rows_of(index).len() * depth))
}

fn many_rows(
    cpu: &Cpu,
    x: &[f32],
    w: &HostMatrix,
    bias: Option<&[f32]>,
    lora: Option<HostLora<'_>>,
    y: &mut [f32],
) -> Result<()> {
    let (n, k) = (w.rows(), w.cols());
    let m = x.len() / k;
    let (width, rows_of) = panels(n, PANEL.0);
    let depth = depth(n, k, width);
    Columns::new(y, m, n).split(width).into_par_iter().enumerate().try_for_each(|(index, mut y)| {
        let rows = rows_of(index);
        let mut tile = cpu.zeros(rows.len() * depth)?;
        for start in (0..k).step_by(depth) {
            let cols = start..(start + depth).min(k);
            w.dequantize_tile(rows.clone(), cols.clone(), &mut tile);
            let left = View { data: &x[start..], row_stride: k, col_stride: 1 };
            let right = View { data: &tile, row_stride: 1, col_stride: cols.len() };
            y.product(left, right, cols.len(), 1.0, start > 0, Parallelism::None);
        }
        if let Some(HostLora { h, b, rank, scale }) = lora {
            let left = View { data: h, row_stride: rank, col_stride: 1 };
            let right = View { data: &b[rows.start * rank..], row_stride: 1, col_stride: rank };
            y.product(left, right, rank, scale, true, Parallelism::None);
        }
        if let Some(bias) = bias {
            for row in 0..m {
                let bias = &bias_row(bias, row, n)[rows.clone()];
                y.row(row).iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
        Ok(())
    })
}
