//! Matrices in the form that kernels read: on the CPU as on the host, on a GPU packed into one
//! buffer per part.
//!
//! On a GPU, rows of codes (element e of a word in bits 4e) are padded to 32 weights. Everything
//! else that decodes them follows in the same buffer: scales, super-scales, tables, minima. A
//! matrix over the binding limit is split by rows into parts. Forward and backward read the same
//! single copy.

mod bytes;
pub mod dequantize;
mod device_matrix;
pub(crate) mod packing;
pub(crate) mod variants;

pub use self::device_matrix::DeviceMatrix;
pub(crate) use self::device_matrix::is_ragged;
