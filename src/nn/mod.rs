//! Layers: LoRA adapters, and linear layers that carry them on a dense or a 4-bit base.

mod adapter;
mod linear;
mod merge;
mod train;

pub use adapter::{LoraAdapter, LoraConfig, LoraInit, Scaling};
pub use linear::{AdaptedLinear, AnyBase, DenseBase, Linear, LoraLinear, MemoryStats, QLoraLinear, QuantizedBase};
pub use train::{LinearGrads, Saved};
