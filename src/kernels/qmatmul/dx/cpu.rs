//! Fast [`qmatmul_dx`](crate::kernels::qmatmul::dx) on the CPU: tiles of W are decoded, each weight
//! once, and a GEMM crate multiplies them.

use gemm::Parallelism;
use rayon::prelude::*;

use super::call::HostLoraDx;
use crate::device::Cpu;
use crate::error::Result;
use crate::kernels::Scratch;
use crate::kernels::cpu::product::{Columns, View, panels};
use crate::quant::HostMatrix;

/// Maximum columns and rows of W that a task decodes at a time: 2 MiB of f32, so that they stay in
/// the cache, and the GEMM crate packs dY only once for all these columns.
const PANEL: (usize, usize) = (512, 1024);

/// Rows of W [N, K] that a task decodes at a time, with `width` columns.
fn depth(n: usize, k: usize, width: usize) -> usize {
    // With any number of threads, all tiles together take at most a quarter of W.
    let live = rayon::current_num_threads().min(k.div_ceil(width));
    (n * k / 4 / (live * width)).clamp(64, PANEL.1).min(n)
}

/// Memory that [`backward`] takes for W [N, K].
pub(crate) fn scratch(n: usize, k: usize) -> Scratch {
    let (width, cols_of) = panels(k, PANEL.0);
    let depth = depth(n, k, width);
    Scratch::tasks((0..k.div_ceil(width)).map(|index| depth * cols_of(index).len()))
}

/// Computes dX [M, K] for `dy` [M, N]. The caller has checked the shapes.
pub(crate) fn backward(
    cpu: &Cpu,
    dy: &[f32],
    w: &HostMatrix,
    lora: Option<HostLoraDx<'_>>,
    dx: &mut [f32],
) -> Result<()> {
    let (n, k) = (w.rows(), w.cols());
    let m = dy.len() / n;
    let (width, cols_of) = panels(k, PANEL.0);
    let depth = depth(n, k, width);
    Columns::new(dx, m, k).split(width).into_par_iter().enumerate().try_for_each(|(index, mut dx)| {
        let cols = cols_of(index);
        // The adapter comes first, because its mask must not affect the rest.
        if let Some(HostLoraDx { g, a, rank, dropout }) = lora {
            let left = View { data: g, row_stride: rank, col_stride: 1 };
            let right = View { data: &a[cols.start..], row_stride: k, col_stride: 1 };
            dx.product(left, right, rank, 1.0, false, Parallelism::None);
            if let Some(dropout) = dropout {
                for row in 0..m {
                    let first = (row * k + cols.start) as u32;
                    dx.row(row).iter_mut().zip(first..).for_each(|(value, i)| *value *= dropout.factor(i));
                }
            }
        }
        let mut tile = cpu.zeros(depth * cols.len())?;
        for start in (0..n).step_by(depth) {
            let rows = start..(start + depth).min(n);
            w.dequantize_tile(rows.clone(), cols.clone(), &mut tile);
            let left = View { data: &dy[start..], row_stride: n, col_stride: 1 };
            let right = View { data: &tile, row_stride: cols.len(), col_stride: 1 };
            dx.product(left, right, rows.len(), 1.0, start > 0 || lora.is_some(), Parallelism::None);
        }
        Ok(())
    })
}
