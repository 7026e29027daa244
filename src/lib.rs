//! QLoRA for every GPU: a frozen 4-bit base plus LoRA adapters, run and trained through wgpu (Vulkan, Metal, DX12, GL) and
//! on the CPU.
//!
//! The base stays packed. A forward pass reads its 4-bit codes and the scales beside them, decodes on the way into the
//! product, and adds the adapter in the same kernel: y = x Wᵀ + bias + s (x Aᵀ) Bᵀ. There is one copy of the weights, on
//! the device that computes, and no dequantized matrix anywhere.
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
//! A program that has a wgpu device already shares it with [`Device::from_wgpu`]; [`wgpu`] is re-exported so that both
//! mean the same version.
//!
//! # Where to begin
//!
//! | you have | begin with | example |
//! |---|---|---|
//! | a model and a text | [`Run`](train::run::Run): batches, evaluation, checkpoints, the adapter as PEFT has it | `examples/finetune.rs` |
//! | a model and a loop of your own | [`Trainer`](train::Trainer): one update from micro-batches | the one in [`train`] |
//! | layers and a loss of your own | [`QLoraLinear`](nn::QLoraLinear): `forward_train`, `backward`, then [`Optimizer`](optim::Optimizer) | `examples/training_loop.rs` |
//! | a wgpu device of your own | [`Device::from_wgpu`] | `examples/own_device.rs` |
//!
//! `cargo run --example finetune` trains a small model that comes with the crate.
//!
//! # Who calls what
//!
//! A [`Run`](train::run::Run) turns a [`Dataset`](train::data::Dataset) into [`Batches`](train::batches::Batches) and gives each
//! step's to a [`Trainer`](train::Trainer). That runs the [`Decoder`](nn::Decoder) on a [`Tape`](autograd::Tape), which records
//! fused ops and, backwards, adds up [`Gradients`](autograd::Gradients) of the adapters alone; the
//! [`Optimizer`](optim::Optimizer) updates them in place. Every op is one of the [`kernels`], which take a [`Tensor`] and packed
//! matrices on one [`Device`] and choose the CPU's or a shader of its [`Tier`]. Nothing is global: what shares a device shares
//! a clone of it.
//!
//! | module | what it is |
//! |---|---|
//! | [`train`] | runs, steps, data and metrics |
//! | [`eval`] | the loss of a model on given tokens |
//! | [`export`] | files for other programs: merged models, adapters in GGUF |
//! | [`generate`] | text from a model, a token at a time |
//! | [`optim`] | AdamW, schedules |
//! | [`nn`] | [`LoraLinear`](nn::LoraLinear) and [`QLoraLinear`](nn::QLoraLinear): layers with named adapters; model configs |
//! | [`autograd`] | the tape that records fused ops and their backward |
//! | [`kernels`] | the fused kernels, one file each, with their CPU twins |
//! | [`tensor`], [`indices`] | f32 tensors and u32 values on a device |
//! | [`device`] | the CPU and GPUs: choice, capability tiers, memory, errors as values |
//! | [`quant`] | what the bytes of a 4-bit matrix mean: NF4, FP4, int4, double quantization |
//! | [`text`] | tokenizers and chat templates |
//! | [`formats`] | files: safetensors with bitsandbytes' serialization, Hugging Face checkpoints, GGUF, PEFT adapters |
//!
//! What a subscriber of [`tracing`] hears, under the target `qlora_wgpu`: at info the device with its tier and limits, models
//! with sizes and times, chosen micro-batches, checkpoints; at debug compiled pipelines and growing memory; at trace, spans
//! `compiling kernels` and `tuning kernels` around what a device's first use waits for.
//!
//! Functions do not panic on bad input: they return an [`Error`] that names the operation and the shapes, file or key.

pub mod autograd;
pub mod bench;
#[cfg(feature = "cli")]
pub mod cli;
pub mod device;
pub mod error;
pub mod eval;
pub mod export;
pub mod formats;
pub mod generate;
mod hash;
pub mod indices;
pub mod kernels;
mod memory;
pub mod nn;
mod open;
pub mod optim;
mod printable;
pub mod quant;
mod seed;
pub mod tensor;
#[cfg(test)]
mod testing;
pub mod text;
pub mod train;

pub use device::{Device, DeviceInfo, GpuOptions, Select, Tier, devices};
pub use error::{Error, Result};
pub use indices::Indices;
pub use tensor::Tensor;
pub use wgpu;
