//! Devices: the CPU, and whatever wgpu reaches. Choice of adapter, capability tiers, buffers and their pool,
//! pipelines, command recording, readback, errors.

mod capacity;
mod commands;
mod cooperative;
mod cpu;
mod gpu;
mod list;
mod pipeline;
mod pool;
mod profile;
mod shader;
mod tier;
mod tune;

use std::fmt;

pub(crate) use commands::{Dispatch, Read};
pub(crate) use cooperative::Cooperative;
pub(crate) use cpu::Counted;
pub use cpu::{Cpu, HostBuffer};
pub(crate) use gpu::{Buffer, MAX_PARAMS_BYTES};
pub use gpu::{Gpu, GpuLimits};
#[cfg(feature = "cli")]
pub(crate) use list::check_environment;
pub use list::{DeviceInfo, GpuOptions, Select, devices};
pub use pool::MemoryCounters;
pub(crate) use pool::{Pool, size_class};
pub use profile::{KernelTime, Profile};
pub use shader::{Access, Define, Defines, Kernel, compose};
pub use tier::Tier;

use crate::error::{Error, Result};

/// Where tensors live and kernels run. Cheap to clone; clones share one device.
#[derive(Clone)]
pub enum Device {
    /// The processor, on every core.
    Cpu(Cpu),
    /// An adapter opened through wgpu.
    Gpu(Gpu),
}

impl Device {
    /// The CPU device, with a memory pool of its own.
    pub fn cpu() -> Device {
        Device::Cpu(Cpu::default())
    }

    /// An adapter, software drivers included. Where `options` names none (`Select::HighPerformance` or
    /// `Select::LowPower`), `QLORA_DEVICE` may: a part of its name, its backend, or its index in [`devices`].
    ///
    /// # Errors
    /// [`Error::NoDevice`] if nothing matches, with what was found; [`Error::Unsupported`] if the adapter cannot run
    /// the tier asked for.
    pub fn gpu(options: &GpuOptions) -> Result<Device> {
        list::open(options).map(Device::Gpu)
    }

    /// A hardware GPU if there is one, else the CPU: software drivers are slower than the CPU device.
    /// `QLORA_DEVICE` (`cpu`, `gpu`, a part of a name, or an index in [`devices`]) overrides.
    pub fn best() -> Result<Device> {
        match std::env::var("QLORA_DEVICE") {
            Ok(name) if !name.is_empty() && name != "best" => Device::named(&name).map_err(|error| match error {
                Error::NoDevice { wanted, found, hint } => {
                    Error::NoDevice { wanted: format!("QLORA_DEVICE={wanted}"), found, hint }
                }
                error => error,
            }),
            _ => match list::hardware()? {
                Some(gpu) => Ok(Device::Gpu(gpu)),
                None => Ok(Device::chosen_cpu()),
            },
        }
    }

    /// The device that a command-line word means: `cpu`, `gpu` (any adapter), `best`, an index in [`devices`], or a
    /// part of an adapter's name or backend.
    pub fn named(name: &str) -> Result<Device> {
        match name.to_ascii_lowercase().as_str() {
            "cpu" | "0" => Ok(Device::chosen_cpu()),
            "best" => Device::best(),
            // Said in so many words: QLORA_DEVICE does not count.
            "gpu" => list::open_selected(&GpuOptions::default(), Select::HighPerformance).map(Device::Gpu),
            _ => {
                let select = name.parse().map_or_else(|_| Select::Name(name.to_owned()), Select::Index);
                Device::gpu(&GpuOptions { select, ..GpuOptions::default() })
            }
        }
    }

    fn chosen_cpu() -> Device {
        tracing::info!(threads = rayon::current_num_threads(), "device: cpu");
        Device::cpu()
    }

    /// Shares a device that the caller made. Its error and loss handlers stay the caller's; features that it was
    /// opened with decide the tier, unless `options` or `QLORA_TIER` forces one; for `cooperative-matrix` they must include
    /// `EXPERIMENTAL_COOPERATIVE_MATRIX`. `options.select` is not used.
    pub fn from_wgpu(
        adapter: &wgpu::Adapter,
        device: wgpu::Device,
        queue: wgpu::Queue,
        options: &GpuOptions,
    ) -> Result<Device> {
        list::wrap(adapter, device, queue, options).map(Device::Gpu)
    }

    /// What messages and tables call it.
    pub fn name(&self) -> &str {
        match self {
            Device::Cpu(_) => "cpu",
            Device::Gpu(gpu) => gpu.name(),
        }
    }

    /// Its driver and version; of the CPU device its threads.
    pub fn driver(&self) -> String {
        match self {
            Device::Cpu(_) => format!("{} threads", rayon::current_num_threads()),
            Device::Gpu(gpu) => gpu::driver_name(gpu.info()),
        }
    }

    /// Memory of this device's tensors and matrices.
    pub fn memory(&self) -> MemoryCounters {
        match self {
            Device::Cpu(cpu) => cpu.memory(),
            Device::Gpu(gpu) => gpu.memory(),
        }
    }

    /// Starts a new memory peak at what is live now.
    pub fn reset_peak(&self) {
        match self {
            Device::Cpu(cpu) => cpu.reset_peak(),
            Device::Gpu(gpu) => gpu.reset_peak(),
        }
    }

    /// Waits until everything recorded on this device is done.
    pub fn wait(&self) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Gpu(gpu) => gpu.wait(),
        }
    }

    /// Whether tensors of both can meet in one operation.
    pub(crate) fn is(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Cpu(_), Device::Cpu(_)) => true,
            (Device::Gpu(one), Device::Gpu(other)) => one.is(other),
            _ => false,
        }
    }

    /// An error unless both are one device.
    pub(crate) fn same(&self, other: &Device, op: &'static str) -> Result<()> {
        if self.is(other) {
            return Ok(());
        }
        Err(Error::DeviceMismatch { op, left: self.name().to_owned(), right: other.name().to_owned() })
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}
