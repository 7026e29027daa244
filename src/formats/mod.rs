//! File formats: what the matrices of [`quant`](crate::quant) look like on disk.

pub mod bitsandbytes;
pub mod safetensors;
