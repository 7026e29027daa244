//! The optimizer's kernels: AdamW and the norm of the gradients.

pub mod adamw;
pub(crate) mod adamw_several;
pub mod grad_norm;
mod settings;
pub(crate) mod square_sums;
