//! File formats: how matrices, checkpoints and adapters are stored on disk.

pub(crate) mod bitsandbytes;
pub mod checkpoint;
#[cfg(test)]
mod fuzz_seeds;
pub(crate) mod gguf;
pub(crate) mod input;
pub(crate) mod json;
mod mapped;
pub mod peft;
pub(crate) mod safetensors;
pub(crate) mod staged;
pub(crate) mod temporary;
