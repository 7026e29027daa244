//! Where the time of a case goes.

use serde::Serialize;

use crate::device::{Device, KernelTime, Profile};
use crate::error::{Error, Result};

/// Where the time of one run went.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTimes {
    /// The whole run, in milliseconds, from its first command on the host until the device had done it.
    pub ms: f64,
    /// Between kernels, and while the device waited for the host, as a share of the run.
    pub outside_kernels: f64,
    /// Kernels, the one that took longest first.
    pub kernels: Vec<KernelRow>,
}

/// A kernel of a run.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    /// Its name, which is its shader's.
    pub kernel: &'static str,
    /// Its number of dispatches.
    pub dispatches: usize,
    /// All of its dispatches together, in milliseconds.
    pub ms: f64,
    /// Its share of the run.
    pub share: f64,
}

impl KernelTimes {
    /// Those of what `work` records, which has run before: a first run also compiles and tunes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for the CPU device, and for GPUs without timestamp queries; those of `work`.
    pub fn measure(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<KernelTimes> {
        match device {
            Device::Gpu(gpu) => Ok(gpu.profile(work)?.into()),
            Device::Cpu(_) => Err(Error::Unsupported {
                device: device.name().to_owned(),
                what: "time of each kernel".into(),
                hint: "a system's profiler, such as perf, shows it".into(),
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
