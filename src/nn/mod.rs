//! Layers and models: LoRA adapters, linear layers that combine them with a dense or 4-bit base,
//! and the decoder.

mod adapter;
pub(crate) mod attach;
mod batch;
mod cache;
pub(crate) mod config;
mod decoder;
mod fingerprint;
pub(crate) mod gguf;
mod linear;
mod load;
mod source;
mod spec;

pub use adapter::{LoraAdapter, LoraConfig, LoraInit, Scaling};
pub use batch::{Batch, IGNORE_LABEL, PADDING, Tokens, shifted_labels};
pub use cache::KvCache;
pub use config::{Architecture, ModelConfig};
pub use decoder::{Decoder, Pass};
pub(crate) use fingerprint::Fingerprint;
pub use linear::{
    AdaptedLinear, AnyBase, DenseBase, Linear, LinearGrads, LoraLinear, MemoryStats, QLoraLinear, QuantizedBase, Saved,
};
pub use source::WeightSource;
pub use spec::ModelSpec;

pub use crate::kernels::elementwise::dropout::Dropout;
pub use crate::kernels::elementwise::rope::{RopeConfig, RopeLayout, RopeScaling};
