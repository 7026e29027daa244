//! Options for opening a GPU.

use std::path::PathBuf;

use super::choices::default_file;
use super::tier::Tier;

/// Selects the GPU that [`Device::gpu`](super::Device::gpu) opens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Select {
    /// Prefers discrete, then integrated GPUs, then others; software drivers last.
    #[default]
    HighPerformance,
    /// Prefers integrated, then discrete GPUs, then others; software drivers last.
    LowPower,
    /// Index in [`devices`](super::devices).
    Index(usize),
    /// Part of `NAME (BACKEND)`, in any case, for example `radeon`, `vulkan` or `llvmpipe (LLVM
    /// 15`.
    Name(String),
}

/// Options for opening a GPU.
#[derive(Clone, Debug)]
pub struct GpuOptions {
    /// Which GPU to open.
    pub select: Select,
    /// Tier of the kernels. By default the one that `QLORA_TIER` names, else the best.
    pub tier: Option<Tier>,
    /// Maximum bytes of one binding, if less than the device's own limit. Larger matrices are
    /// split by rows.
    pub max_binding_bytes: Option<u64>,
    /// Maximum bytes of live and pooled buffers. More is an
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub memory_limit: Option<u64>,
    /// Pass parameters as immediate data if the device supports it; browsers don't.
    pub immediates: bool,
    /// File that remembers the fastest variant of each kernel for a GPU and driver. Without a file
    /// nothing is measured and the first variant is used; all variants give the same bits. By
    /// default the file is in the folder `QLORA_CACHE`, or in `qlora-wgpu` in the user's cache
    /// folder. If `QLORA_TUNE` is 0 there is none.
    pub tune: Option<PathBuf>,
}

impl Default for GpuOptions {
    fn default() -> Self {
        GpuOptions {
            select: Select::default(),
            tier: None,
            max_binding_bytes: None,
            memory_limit: None,
            immediates: true,
            tune: default_file(),
        }
    }
}
