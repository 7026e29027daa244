//! Layers: LoRA adapters, and linear layers that carry them on a dense or a 4-bit base.

mod adapter;
mod config;
mod linear;

pub use adapter::{LoraAdapter, LoraConfig, LoraInit, Scaling};
pub use config::{Architecture, ModelConfig, RopeParameters, RopeScaling};
pub use linear::{AdaptedLinear, DenseBase, LoraLinear, MemoryStats, QLoraLinear, QuantizedBase};
