//! QLoRA for every GPU: a frozen 4-bit base with LoRA adapters, for inference and training through
//! wgpu (Vulkan, Metal, DX12, GL) and on the CPU.
//!
//! The base stays packed. A forward pass reads the 4-bit codes and their scales, decodes them as
//! it multiplies, and adds the adapter in the same kernel: y = x Wᵀ + bias + s (x Aᵀ) Bᵀ. The
//! weights exist once, on the device that computes, and no dequantized matrix is ever stored.
//!
//! ```
//! use ndarray::Array2;
//! use qlora_wgpu::nn::{LoraAdapter, LoraConfig, QLoraLinear};
//! use qlora_wgpu::quant::QuantOptions;
//! use qlora_wgpu::{Device, Tensor};
//!
//! # fn main() -> qlora_wgpu::Result<()> {
//! let device = Device::best()?; // a hardware GPU, or else the CPU
//! let weight = Array2::from_shape_fn((64, 128), |(i, j)| ((i * 31 + j * 17) % 101) as f32 / 101.0 - 0.5);
//!
//! let adapter = LoraAdapter::new(&device, 64, 128, &LoraConfig::new(16, 32.0))?;
//! let layer = QLoraLinear::quantize(&device, weight.view(), &QuantOptions::nf4().double_quant())?
//!     .with_adapter("default", adapter)?;
//!
//! let x = Tensor::zeros(&device, &[8, 128])?; // eight tokens
//! let y = layer.forward(&x)?.to_array2()?;
//! assert_eq!(y.dim(), (8, 64));
//! # Ok(())
//! # }
//! ```
//!
//! A program that already has a wgpu device shares it with [`Device::from_wgpu`]. [`wgpu`] is
//! re-exported so that both use the same version.
//!
//! # Where to start
//!
//! | you have | start with | example |
//! |---|---|---|
//! | a model and a text | [`Run`](train::run::Run): batches, evaluation, checkpoints, a PEFT adapter | `examples/finetune.rs` |
//! | a model and a loop of your own | [`Trainer`](train::Trainer): one update from micro-batches | in [`train`] |
//! | layers and a loss of your own | [`QLoraLinear`](nn::QLoraLinear): `forward_train`, `backward`, then [`Optimizer`](optim::Optimizer) | `examples/training_loop.rs` |
//! | a wgpu device of your own | [`Device::from_wgpu`] | `examples/own_device.rs` |
//!
//! `cargo run --example finetune` trains a small model that comes with the repository.
//!
//! # How the parts fit together
//!
//! A [`Run`](train::run::Run) turns a [`Dataset`](train::data::Dataset) into
//! [`Batches`](train::batches::Batches) and passes those of each step to a
//! [`Trainer`](train::Trainer). The trainer runs the [`Decoder`](nn::Decoder) on a
//! [`Tape`](autograd::Tape). The tape records fused ops; its backward pass adds up
//! [`Gradients`](autograd::Gradients) for the adapters only, and the
//! [`Optimizer`](optim::Optimizer) updates these in place. Every op is a kernel ([`ops`]). A kernel
//! takes [`Tensor`]s and packed matrices on one [`Device`] and runs on the CPU, or as a shader for
//! the device's [`Tier`]. Nothing is global: whatever shares a device holds a clone of
//! it.
//!
//! | module | contents |
//! |---|---|
//! | [`ModelFiles`] | the files of a model, opened once: configuration, tokenizer, weights |
//! | [`train`] | runs, steps, data and metrics |
//! | [`eval`] | the loss of a model on given tokens |
//! | [`export`] | files for other programs: merged models, adapters in GGUF |
//! | [`generate`] | text generation, token by token |
//! | [`optim`] | AdamW, schedules |
//! | [`nn`] | [`LoraLinear`](nn::LoraLinear) and [`QLoraLinear`](nn::QLoraLinear): layers with named adapters; model configs |
//! | [`autograd`] | the tape, which records fused ops for the backward pass |
//! | [`ops`] | the fused kernels, as operations on tensors |
//! | [`tensor`], [`indices`] | f32 tensors and u32 values on a device |
//! | [`device`] | the CPU and GPUs: selection, capability tiers, memory |
//! | [`quant`] | 4-bit formats: NF4, FP4, int4, double quantization |
//! | [`text`] | tokenizers and chat templates |
//! | [`formats`] | Hugging Face checkpoints, with the formats that base weights are loaded in, and PEFT adapters |
//!
//! [`tracing`] subscribers get events with the target `qlora_wgpu`. At info: the device with its
//! tier and limits, models with sizes and times, chosen micro-batches, checkpoints. At debug:
//! compiled pipelines and growing memory. At trace: the spans `compiling kernels` and `tuning
//! kernels`, around what the first use of a device waits for.
//!
//! Functions don't panic on bad input. They return an [`Error`] that names the operation and the
//! shapes, file or key.

#![warn(missing_docs)]

// The path by which files that unit and integration tests share name this crate.
#[cfg(test)]
extern crate self as qlora_wgpu;

pub mod autograd;
mod bench;
pub mod device;
pub mod error;
pub mod eval;
pub mod export;
pub mod formats;
pub mod generate;
mod hash;
pub mod indices;
mod kernels;
mod memory;
mod model_files;
pub mod nn;
mod open;
pub mod ops;
pub mod optim;
mod printable;
pub mod quant;
mod seed;
pub mod tensor;
#[cfg(test)]
mod testing;
pub mod text;
pub mod train;

/// The command, the benchmarks and tests of whole files share this with the library beyond its
/// public face. It changes without notice, like every hidden item.
#[doc(hidden)]
pub mod internal {
    pub use crate::device::variables::check_environment;
    pub use crate::formats::input::{MAX_SMALL, read_small, read_small_text};
    pub use crate::formats::staged::{StagedFile, is_same, is_standard_output};
    pub use crate::memory::check as check_memory;
    pub use crate::model_files::Weights;
    pub use crate::printable::{is_hidden, lines, one_line};
    pub use crate::quant::matrix_spec::{MatrixKind, MatrixSpec};
    pub use crate::train::settings::Setting;

    /// Measurements of layers, steps and copies.
    pub mod bench {
        pub use crate::bench::*;
    }

    /// Weights as bitsandbytes serializes them.
    pub mod bitsandbytes {
        pub use crate::formats::bitsandbytes::*;
    }

    /// GGUF files.
    pub mod gguf {
        pub use crate::formats::gguf::write::*;
        pub use crate::formats::gguf::*;
    }

    /// Safetensors files.
    pub mod safetensors {
        pub use crate::formats::safetensors::*;
    }
}

pub use device::{Device, DeviceInfo, GpuOptions, Select, Tier, devices};
pub use error::{Error, Result};
pub use indices::Indices;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub use kernels::registry;
pub use model_files::ModelFiles;
pub use tensor::Tensor;
pub use wgpu;
