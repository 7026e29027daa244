//! Kernels that compute each value, or each pair or four of them, alone.

pub mod add;
pub mod add_assign;
pub mod append;
pub mod dropout;
pub mod dropout_mix;
pub(crate) mod quads;
pub mod rope;
pub mod rope_append;
pub mod scale_columns;
pub mod silu_mul;
pub mod silu_mul_backward;
