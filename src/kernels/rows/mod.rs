//! Kernels that go along the rows of a matrix: norms, lookups, sums, and factors for f16 staging.

pub mod column_sum;
pub mod embedding;
pub(crate) mod factors;
pub(crate) mod pack_rows;
pub mod rms_norm;
pub mod rms_norm_backward;
pub(crate) mod row_factor;
pub mod sum;
pub(crate) mod teams;
