//! Products with the adapter's matrices, and DoRA's norms.

pub(crate) mod coop;
pub mod dh;
pub mod dora_norm;
pub mod down;
pub mod dw;
