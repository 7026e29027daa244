//! Operands and parameters for every form of [`qmatmul_dx`](crate::kernels::qmatmul::dx), checked.

use std::ops::Range;

use crate::device::{Buffer, Gpu, Kernel};
use crate::error::Result;
use crate::kernels::elementwise::dropout::Dropout;
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::matrix::packing::{MatrixLayout, Part};
use crate::kernels::params;
use crate::kernels::qmatmul::tile::with_tile;
use crate::kernels::rows::pack_rows::PACKED;
use crate::tensor::Tensor;

pub(crate) const OP: &str = "qmatmul_dx";

/// The adapter's part of an input gradient: `mask * (G * A)`.
#[derive(Clone, Copy)]
pub struct LoraDx<'a> {
    /// G = s * dY * B, the gradient of H: [M, r].
    pub g: &'a Tensor,
    /// A, [r, K].
    pub a: &'a Tensor,
    /// Dropout of the forward pass.
    pub dropout: Option<Dropout>,
}

impl LoraDx<'_> {
    pub(crate) fn rank(&self) -> usize {
        self.a.shape()[0]
    }
}

/// An adapter's operands in host memory: G [M, rank], A [rank, K].
#[derive(Clone, Copy)]
pub(crate) struct HostLoraDx<'a> {
    pub g: &'a [f32],
    pub a: &'a [f32],
    pub rank: usize,
    pub dropout: Option<Dropout>,
}

/// Checked operands of a call on a GPU: the adapter's rank and the dropout's probability are above
/// 0.
#[derive(Clone, Copy)]
pub(crate) struct GpuDxCall<'a> {
    pub gpu: &'a Gpu,
    pub w: &'a DeviceMatrix,
    pub dy: &'a Buffer,
    pub m: usize,
    pub lora: Option<LoraDx<'a>>,
    /// Number of parts of N that are summed separately.
    pub splits: usize,
    /// dX, or with splits [splits, M, K].
    pub dx: &'a Buffer,
    /// Whether the first part of W also adds to dX.
    pub adds: bool,
}

params! {
    /// Parameters of every form of the kernel; `shaders/qmatmul/shared/backward.wgsl`.
    struct QmatmulDxParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
        /// Words of eight columns in a row of dX.
        words: u32,
        /// Rows of W in this part.
        n: u32,
        /// First row of dX.
        row: u32,
        /// Rows of dX from there on.
        rows: u32,
        /// Column of dY for the part's first row of W.
        column: u32,
        /// Columns of dY.
        dy_stride: u32,
        /// Number of parts of the contracted index that are summed separately.
        splits: u32,
        /// 0: no adapter, or an earlier part has added it.
        rank: u32,
        /// 1: add to dX.
        accumulate: u32,
        /// Lower half of the dropout's seed, then the upper half.
        seed_low: u32,
        seed_high: u32,
        /// Values with a hash below this are dropped.
        drop_below: u32,
        /// 1 / (1 - p).
        keep_scale: f32,
        m: MatrixLayout,
    }
}

/// Whether a part's columns in the packed rows of dY begin and end at whole stages. Only tiny
/// parts don't.
pub(crate) fn reads_packed(w: &DeviceMatrix, part: &Part) -> bool {
    let Range { start, end } = part.rows;
    start.is_multiple_of(PACKED) && (end.is_multiple_of(PACKED) || end == w.rows())
}

impl<'a> GpuDxCall<'a> {
    /// Returns the adapter, if this part adds it.
    fn adapter(&self, part: &Part) -> Option<LoraDx<'a>> {
        self.lora.filter(|_| part.rows.start == 0)
    }

    /// Returns the adapter's dropout, if this part adds the adapter.
    pub(crate) fn dropout(&self, part: &Part) -> Option<Dropout> {
        self.adapter(part).and_then(|lora| lora.dropout)
    }

    /// Parameters for all rows of dX and this part of W. Each form fills in how it divides the
    /// work.
    pub(crate) fn params(&self, part: &Part) -> QmatmulDxParams {
        let dropout = self.dropout(part);
        QmatmulDxParams {
            k: self.w.cols() as u32,
            words: self.w.cols().div_ceil(8) as u32,
            n: part.rows.len() as u32,
            rows: self.m as u32,
            column: part.rows.start as u32,
            dy_stride: self.w.rows() as u32,
            rank: self.adapter(part).map_or(0, |lora| lora.rank() as u32),
            accumulate: u32::from(self.accumulates(part)),
            seed_low: dropout.map_or(0, |dropout| dropout.seed as u32),
            seed_high: dropout.map_or(0, |dropout| (dropout.seed >> 32) as u32),
            drop_below: dropout.map_or(0, Dropout::drop_below),
            keep_scale: dropout.map_or(1.0, Dropout::keep_scale),
            splits: self.splits as u32,
            m: part.layout,
            ..Default::default()
        }
    }

    /// The read-only operands, in the order of their bindings: dy, w, g, a.
    pub(crate) fn operands<'b>(&'b self, part: &'b Part) -> Result<[&'b Buffer; 4]> {
        let (g, a) = match self.adapter(part) {
            Some(lora) => (lora.g.buffer(self.gpu, OP)?, lora.a.buffer(self.gpu, OP)?),
            None => (self.gpu.unused()?, self.gpu.unused()?),
        };
        Ok([self.dy, &part.buffer, g, a])
    }

    /// Whether a part adds to the values in dX.
    fn accumulates(&self, part: &Part) -> bool {
        self.adds || part.rows.start > 0
    }

    /// Runs a part with the fastest of these tiles.
    pub(crate) fn with_tile<T: Copy>(
        &self,
        kernel: &'static Kernel,
        part: &Part,
        tiles: &[T],
        run: impl Fn(&GpuDxCall<'_>, T) -> Result<()>,
    ) -> Result<()> {
        let try_out = |tile| self.try_out(part, |call| run(call, tile));
        with_tile(self.gpu, kernel, (self.m, self.w, part), tiles, try_out, |tile| run(self, tile))
    }

    /// Runs a measurement. If a part adds to dX, which must not happen twice, it writes to
    /// separate memory.
    pub(crate) fn try_out(&self, part: &Part, run: impl Fn(&GpuDxCall<'_>) -> Result<()>) -> Result<()> {
        if !self.accumulates(part) {
            return run(self);
        }
        let values = self.splits * self.m * self.w.cols();
        let dx = self.gpu.alloc("a measured product", 4 * values as u64)?;
        run(&GpuDxCall { dx: &dx, ..*self })
    }

    /// Whether the columns of dY that belong to a part begin and end at a multiple of 4 in every
    /// row.
    pub(crate) fn loads_quads(&self, part: &Part) -> bool {
        [self.w.rows(), part.rows.start, part.rows.len()].iter().all(|size| size.is_multiple_of(4))
    }

    /// Whether the rank is a multiple of 4, so that rows of G can be read as vec4.
    pub(crate) fn reads_rank_quads(&self, part: &Part) -> bool {
        self.adapter(part).is_none_or(|lora| lora.rank().is_multiple_of(4))
    }

    /// Floating-point operations for `rows` x `columns` of dX from this part.
    pub(crate) fn flops(&self, part: &Part, rows: u64, columns: u64) -> u64 {
        let rank = self.adapter(part).map_or(0, |lora| lora.rank());
        2 * rows * columns * (part.rows.len() + rank) as u64
    }
}
