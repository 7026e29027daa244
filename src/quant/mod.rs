//! Meaning of the bytes of a 4-bit matrix: codebooks, block quantizers, double quantization. Host
//! code only.
//!
//! Every 4-bit format here is the same matrix, over the flat row-major index `i`:
//!
//! ```text
//! w[i] = codebook[nibble(i)] * scale[i / block] (+ min[i / block])
//! ```
//!
//! Formats differ in their codebook, their block and the storage of their scales ([`Scales`]); a
//! [`QuantizedMatrix`] holds any of them. Matrices that stay in 8, 16 or 32 bits are a
//! [`DenseMatrix`].

mod codebook;
mod dense;
mod dtype;
mod dynamic_map;
mod encode;
mod host_matrix;
mod matrix;
pub(crate) mod matrix_spec;
#[cfg(test)]
mod properties;
mod scales;
mod source;

pub use codebook::{Codebook, Format};
pub use dense::{DenseData, DenseMatrix};
pub(crate) use dense::{Q8_BLOCK, encode_q8_0};
pub use dtype::Dtype;
pub use encode::{DoubleQuant, QuantOptions};
pub use host_matrix::HostMatrix;
pub(crate) use matrix::Parts;
pub use matrix::QuantizedMatrix;
pub(crate) use matrix_spec::{MatrixKind, MatrixSpec, ScaleKind};
pub use scales::{DoubleScales, Scales};
pub use source::Source;
