//! Linear layers with LoRA or DoRA adapters on a frozen base: y = x Wᵀ + bias + s dropout(x) Aᵀ Bᵀ.

mod dora;
mod layer;
mod merge;
mod pass;
mod record;

pub use layer::{AdaptedLinear, AnyBase, DenseBase, Linear, LoraLinear, MemoryStats, QLoraLinear, QuantizedBase};
pub use pass::{LinearGrads, Saved};
pub(super) use record::record_all;
