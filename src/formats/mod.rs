//! File formats: what matrices, checkpoints and adapters look like on disk.

pub mod bitsandbytes;
pub(crate) mod json;
pub mod safetensors;
