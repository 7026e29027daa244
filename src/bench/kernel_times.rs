//! Time of each kernel in a case.

use serde::Serialize;

use crate::device::{Device, KernelTime, Profile};
use crate::error::{Error, Result};

/// Time of each kernel in one run.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTimes {
    /// Time of the whole run in milliseconds, from its first command on the host until the device
    /// finished.
    pub ms: f64,
    /// Share of the run spent between kernels, including time in which the device waited for the
    /// host.
    pub outside_kernels: f64,
    /// Kernels, slowest first.
    pub kernels: Vec<KernelRow>,
}

/// A kernel of a run.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    /// Name of the kernel and of its shader.
    pub kernel: &'static str,
    /// Number of dispatches.
    pub dispatches: usize,
    /// Total time of its dispatches, in milliseconds.
    pub ms: f64,
    /// Its share of the run.
    pub share: f64,
}

impl KernelTimes {
    /// Measures the kernels that `work` records. Run `work` once before, because a first run also
    /// compiles and tunes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for the CPU device, and for GPUs without timestamp queries; errors
    /// of `work`.
    pub fn measure(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<KernelTimes> {
        match device {
            Device::Gpu(gpu) => Ok(gpu.profile(work)?.into()),
            Device::Cpu(_) => Err(Error::Unsupported {
                device: device.name().to_owned(),
                what: "time of each kernel".into(),
                hint: "use a system profiler such as perf".into(),
            }),
        }
    }
}

impl From<Profile> for KernelTimes {
    fn from(profile: Profile) -> KernelTimes {
        let wall = profile.wall.as_secs_f64();
        let row = |kernel: &KernelTime| KernelRow {
            kernel: kernel.kernel,
            dispatches: kernel.dispatches,
            ms: kernel.time.as_secs_f64() * 1e3,
            share: kernel.time.as_secs_f64() / wall,
        };
        KernelTimes {
            ms: wall * 1e3,
            outside_kernels: 1.0 - profile.in_kernels().as_secs_f64() / wall,
            kernels: profile.kernels.iter().map(row).collect(),
        }
    }
}
