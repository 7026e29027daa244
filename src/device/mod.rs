//! Devices: the CPU, and every GPU that wgpu reaches. Choice of GPU, capability tiers, buffers and
//! their pool, pipelines, command recording, readback, errors.

mod buffer;
mod capacity;
mod choices;
mod commands;
mod cooperative;
mod cpu;
#[cfg(test)]
pub(crate) mod dispatched;
mod gl;
mod gpu;
mod lanes;
pub(crate) mod ledger;
pub(crate) mod list;
mod options;
mod pipeline;
mod pool;
mod profile;
mod raw;
mod read;
mod recorder;
mod settle;
pub(crate) mod shader;
mod stamps;
mod tier;
mod tune;
pub(crate) mod variables;

use std::fmt;

pub(crate) use buffer::Buffer;
pub(crate) use commands::Dispatch;
pub(crate) use cooperative::Cooperative;
pub use cpu::Cpu;
pub(crate) use cpu::{Counted, HostBuffer};
pub use gpu::Gpu;
pub use list::{DeviceInfo, devices};
pub use options::{GpuOptions, Select};
pub use pool::MemoryCounters;
pub(crate) use profile::{KernelTime, Profile};
pub(crate) use raw::MAX_PARAMS_BYTES;
pub(crate) use read::Read;
pub(crate) use shader::{Access, Defines, Kernel};
pub use tier::Tier;

use self::ledger::{Ledger, Moment};
use crate::error::{Error, Result};

/// Where tensors live and kernels run. Cheap to clone; clones share one device.
#[derive(Clone)]
pub enum Device {
    /// The processor, using all cores.
    Cpu(Cpu),
    /// A GPU opened through wgpu.
    Gpu(Gpu),
}

impl Device {
    /// Opens the CPU device, with its own memory pool.
    pub fn cpu() -> Device {
        Device::Cpu(Cpu::default())
    }

    /// Name in messages and tables.
    pub fn name(&self) -> &str {
        match self {
            Device::Cpu(_) => "cpu",
            Device::Gpu(gpu) => gpu.name(),
        }
    }

    /// Driver and its version; for the CPU device its threads.
    pub fn driver(&self) -> String {
        match self {
            Device::Cpu(_) => format!("{} threads", rayon::current_num_threads()),
            Device::Gpu(gpu) => raw::driver_name(gpu.info()),
        }
    }

    /// Memory of this device's tensors and matrices.
    pub fn memory(&self) -> MemoryCounters {
        match self {
            Device::Cpu(cpu) => cpu.memory(),
            Device::Gpu(gpu) => gpu.memory(),
        }
    }

    /// Starts a new memory peak at the bytes that are live now.
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

    /// A device that has this one's tier and limits but neither memory nor values: a ledger counts
    /// what is allocated, and kernels compute nothing. For [plans](crate::train::plan) only.
    pub(crate) fn planned(&self, ledger: &Ledger) -> Device {
        match self {
            Device::Cpu(_) => Device::Cpu(Cpu::planned(ledger)),
            Device::Gpu(gpu) => Device::Gpu(gpu.planned(ledger)),
        }
    }

    /// The ledger of a planned device.
    fn ledger(&self) -> Option<&Ledger> {
        match self {
            Device::Cpu(cpu) => cpu.ledger(),
            Device::Gpu(gpu) => gpu.ledger(),
        }
    }

    /// Whether this is a planned device.
    pub(crate) fn is_planned(&self) -> bool {
        self.ledger().is_some()
    }

    /// Tells the ledger of a planned device that this phase of a step begins.
    pub(crate) fn begin(&self, moment: Moment) {
        if let Some(ledger) = self.ledger() {
            ledger.begin(moment);
        }
    }

    /// Whether both are the same device, so that their tensors can be combined.
    pub(crate) fn is(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Cpu(one), Device::Cpu(other)) => one.is(other),
            (Device::Gpu(one), Device::Gpu(other)) => one.is(other),
            _ => false,
        }
    }

    /// Returns an error unless both are the same device.
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
