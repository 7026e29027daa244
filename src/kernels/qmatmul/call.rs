//! Operands and parameters for every form of [`qmatmul`](crate::kernels::qmatmul), checked.

use crate::device::{Buffer, Gpu};
use crate::error::Result;
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::matrix::packing::{MatrixLayout, Part};
use crate::kernels::{LoraUp, params};
use crate::tensor::Tensor;

pub(crate) const OP: &str = "qmatmul";

/// Maximum rows of X for which W is read once and multiplied directly. With more rows, tiles are
/// faster.
pub(crate) const GEMV_ROWS: usize = 8;

/// An adapter's operands in host memory: H [M, rank], B [N, rank].
#[derive(Clone, Copy)]
pub(crate) struct HostLora<'a> {
    pub h: &'a [f32],
    pub b: &'a [f32],
    pub rank: usize,
    pub scale: f32,
}

/// Checked operands of a call on a GPU.
pub(crate) struct GpuCall<'a> {
    pub gpu: &'a Gpu,
    pub w: &'a DeviceMatrix,
    pub x: &'a Buffer,
    pub m: usize,
    pub bias: Option<&'a Tensor>,
    pub lora: Option<LoraUp<'a>>,
    /// Number of parts of K that are summed separately.
    pub splits: usize,
    /// Y, or with splits [splits, M, N].
    pub y: &'a Buffer,
}

params! {
    /// Parameters of every form of the kernel; `shaders/qmatmul/shared/forward.wgsl`.
    struct QmatmulParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
        /// Rows of W in this part.
        n: u32,
        /// First row of X.
        row: u32,
        /// Rows of X from there on.
        rows: u32,
        /// Column of Y for the part's first row of W.
        column: u32,
        /// Columns of Y.
        y_stride: u32,
        /// Number of parts of the contracted index that are summed separately.
        splits: u32,
        /// 0: no adapter.
        rank: u32,
        /// Rows of the bias: 0 without a bias, 1 if all rows of Y share it, else one for each.
        bias_rows: u32,
        lora_scale: f32,
        m: MatrixLayout,
    }
}

impl<'a> GpuCall<'a> {
    /// Returns the adapter, unless its rank is 0 and it adds nothing.
    fn adapter(&self) -> Option<LoraUp<'a>> {
        self.lora.filter(|lora| lora.b.shape()[1] > 0)
    }

    /// Parameters for all rows of X and this part of W. Each form fills in how it divides the
    /// work.
    pub(crate) fn params(&self, part: &Part) -> QmatmulParams {
        let adapter = self.adapter();
        QmatmulParams {
            k: self.w.cols() as u32,
            n: part.rows.len() as u32,
            rows: self.m as u32,
            column: part.rows.start as u32,
            y_stride: self.w.rows() as u32,
            rank: adapter.map_or(0, |lora| lora.b.shape()[1] as u32),
            bias_rows: self.bias.map_or(0, |bias| if bias.shape().len() == 1 { 1 } else { self.m as u32 }),
            lora_scale: adapter.map_or(0.0, |lora| lora.scale),
            splits: self.splits as u32,
            m: part.layout,
            ..Default::default()
        }
    }

    /// The read-only operands, in the order of their bindings: x, w, bias, h, b.
    pub(crate) fn operands<'b>(&'b self, part: &'b Part) -> Result<[&'b Buffer; 5]> {
        let unused = self.gpu.unused()?;
        let or_unused = |tensor: Option<&'b Tensor>| tensor.map_or(Ok(unused), |tensor| tensor.buffer(self.gpu, OP));
        let adapter = self.adapter();
        Ok([
            self.x,
            &part.buffer,
            or_unused(self.bias)?,
            or_unused(adapter.map(|lora| lora.h))?,
            or_unused(adapter.map(|lora| lora.b))?,
        ])
    }

    /// Whether the columns of Y that belong to a part begin and end at a multiple of 4 in every
    /// row.
    pub(crate) fn stores_quads(&self, part: &Part) -> bool {
        [self.w.rows(), part.rows.start, part.rows.len()].iter().all(|size| size.is_multiple_of(4))
    }

    /// Whether the rank is a multiple of 4, so that rows of H and B can be read as vec4.
    pub(crate) fn reads_rank_quads(&self) -> bool {
        self.adapter().is_none_or(|lora| lora.b.shape()[1].is_multiple_of(4))
    }

    /// Floating-point operations for `rows` x `columns` of Y.
    pub(crate) fn flops(&self, rows: u64, columns: u64) -> u64 {
        let rank = self.lora.map_or(0, |lora| lora.b.shape()[1]);
        2 * rows * columns * (self.w.cols() + rank) as u64
    }
}
