//! Shape and storage format of a matrix, without its values. They determine the bytes on a device,
//! so a file's header is enough to know them.

use super::{Codebook, DenseData, DoubleQuant, DoubleScales, HostMatrix, Q8_BLOCK, QuantOptions, Scales};

/// Storage format of the scales (or the minima) of a 4-bit matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleKind {
    /// One f32 per block.
    Plain,
    /// One byte per block, and one f32 for every `super_block` of them.
    Double {
        /// Codes per super-scale.
        super_block: usize,
    },
}

/// Storage format of a matrix's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixKind {
    /// The canonical 4-bit matrix.
    Quantized {
        /// Weights per scale.
        block: usize,
        /// One scale per block.
        scales: ScaleKind,
        /// One minimum per block, if the format has minima.
        mins: Option<ScaleKind>,
    },
    /// 32-bit values.
    F32,
    /// 16-bit values, f16 or bf16.
    Half,
    /// One byte per weight, and an f16 scale for every 32 weights of a row.
    Q8_0,
}

/// A matrix W [N, K] without its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixSpec {
    /// N, number of rows.
    pub rows: usize,
    /// K, number of columns.
    pub cols: usize,
    /// Storage format of the weights.
    pub kind: MatrixKind,
}

impl ScaleKind {
    /// The kind of some scales.
    pub(crate) fn of(scales: &Scales) -> ScaleKind {
        match scales {
            Scales::Plain(_) => ScaleKind::Plain,
            Scales::Double(double) => ScaleKind::Double { super_block: double.super_block },
        }
    }

    /// Bytes in host memory for this many blocks.
    pub(crate) fn host_bytes(self, blocks: usize) -> usize {
        match self {
            ScaleKind::Plain => 4 * blocks,
            // Includes the offset and the table.
            ScaleKind::Double { super_block } => blocks + 4 * (blocks.div_ceil(super_block) + 1 + 256),
        }
    }
}

impl MatrixKind {
    /// The kind that a quantizer makes with these options.
    pub fn quantized(options: &QuantOptions) -> MatrixKind {
        let scales = match options.double {
            DoubleQuant::None => ScaleKind::Plain,
            DoubleQuant::Dynamic | DoubleQuant::Linear => ScaleKind::Double { super_block: DoubleScales::SUPER_BLOCK },
        };
        MatrixKind::Quantized { block: options.block, scales, mins: None }
    }

    pub(crate) fn all_scales(self) -> impl Iterator<Item = ScaleKind> {
        let (scales, mins) = match self {
            MatrixKind::Quantized { scales, mins, .. } => (Some(scales), mins),
            _ => (None, None),
        };
        scales.into_iter().chain(mins)
    }
}

impl MatrixSpec {
    /// The spec of a matrix.
    pub(crate) fn of(matrix: &HostMatrix) -> MatrixSpec {
        let kind = match matrix {
            HostMatrix::Quantized(matrix) => MatrixKind::Quantized {
                block: matrix.block(),
                scales: ScaleKind::of(matrix.scales()),
                mins: matrix.mins().map(ScaleKind::of),
            },
            HostMatrix::Dense(matrix) => match matrix.data() {
                DenseData::F32(_) => MatrixKind::F32,
                DenseData::F16(_) | DenseData::Bf16(_) => MatrixKind::Half,
                DenseData::Q8_0 { .. } => MatrixKind::Q8_0,
            },
        };
        MatrixSpec { rows: matrix.rows(), cols: matrix.cols(), kind }
    }

    /// Bytes in host memory. Equals [`HostMatrix::bytes`].
    pub(crate) fn host_bytes(&self) -> usize {
        let n = self.rows * self.cols;
        match self.kind {
            MatrixKind::Quantized { block, .. } => {
                let scales: usize = self.kind.all_scales().map(|kind| kind.host_bytes(n.div_ceil(block))).sum();
                // Includes the codebook, and a table of both values for every byte.
                n.div_ceil(2) + scales + size_of::<Codebook>() + 256 * size_of::<[f32; 2]>()
            }
            MatrixKind::F32 => 4 * n,
            MatrixKind::Half => 2 * n,
            MatrixKind::Q8_0 => n + 2 * (n / Q8_BLOCK),
        }
    }
}
