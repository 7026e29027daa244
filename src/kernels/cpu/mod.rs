//! Shared code of the CPU device: products, SIMD and exp.

pub(crate) mod exp;
pub(crate) mod product;
pub(crate) mod simd;
