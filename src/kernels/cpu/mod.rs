//! Shared code of the CPU device: products, SIMD, exp, and scratch memory for plans.

pub(crate) mod exp;
pub(crate) mod product;
pub(crate) mod scratch;
pub(crate) mod simd;
