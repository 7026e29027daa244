//! QLoRA for every GPU.

pub mod bench;
#[cfg(feature = "cli")]
pub mod cli;
pub mod device;
pub mod error;
pub mod formats;
pub mod kernels;
pub mod nn;
pub mod quant;
pub mod tensor;
#[cfg(test)]
mod testing;

pub use device::{Device, DeviceInfo, GpuOptions, Select, Tier, devices};
pub use error::{Error, Result};
pub use tensor::Tensor;
pub use wgpu;
