//! u32 values on a device: token ids, labels, positions, ranges.

use std::sync::Arc;

use crate::device::ledger::no_values;
use crate::device::{Buffer, Counted, Cpu, Device, Gpu, Read};
use crate::error::{Error, Result};

/// A list of u32 values on a device. Clones share them.
#[derive(Clone)]
pub struct Indices {
    len: usize,
    storage: Storage,
}

/// `Planned` is on a planned CPU: a size without values.
#[derive(Clone)]
enum Storage {
    Cpu { cpu: Cpu, values: Arc<[u32]>, _counted: Arc<Counted> },
    Gpu { gpu: Gpu, buffer: Buffer },
    Planned { cpu: Cpu, _counted: Arc<Counted> },
}

/// Values on their way to the host.
pub(crate) enum Reading {
    Known(Arc<[u32]>),
    UnderWay(Gpu, Read),
}

impl Reading {
    /// Returns the values. Waits only for work recorded before [`Indices::start_read`].
    pub(crate) fn finish(self) -> Result<Vec<u32>> {
        match self {
            Reading::Known(values) => Ok(values.to_vec()),
            Reading::UnderWay(gpu, read) => Ok(bytemuck::pod_collect_to_vec(&gpu.finish_read(read)?)),
        }
    }
}

impl std::fmt::Debug for Indices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Indices({} on {})", self.len, self.device().name())
    }
}

impl Indices {
    /// Copies these values to a device.
    ///
    /// # Errors
    /// [`Error::TooLarge`] and [`Error::OutOfMemory`] from the device.
    pub fn from_slice(device: &Device, values: &[u32]) -> Result<Indices> {
        let storage = match device {
            Device::Cpu(cpu) => {
                let counted = Arc::new(cpu.count(size_of_val(values) as u64));
                if device.is_planned() {
                    let storage = Storage::Planned { cpu: cpu.clone(), _counted: counted };
                    return Ok(Indices { len: values.len(), storage });
                }
                Storage::Cpu { cpu: cpu.clone(), values: values.into(), _counted: counted }
            }
            Device::Gpu(gpu) => {
                let buffer = gpu.upload("indices", bytemuck::cast_slice(values))?;
                Storage::Gpu { gpu: gpu.clone(), buffer }
            }
        };
        Ok(Indices { len: values.len(), storage })
    }

    /// Allocates room for values that a kernel will write; contents are unspecified.
    pub(crate) fn uninit(gpu: &Gpu, what: &str, len: usize) -> Result<Indices> {
        let buffer = gpu.alloc(what, 4 * len as u64)?;
        Ok(Indices { len, storage: Storage::Gpu { gpu: gpu.clone(), buffer } })
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device that holds the values.
    pub(crate) fn device(&self) -> Device {
        match &self.storage {
            Storage::Cpu { cpu, .. } | Storage::Planned { cpu, .. } => Device::Cpu(cpu.clone()),
            Storage::Gpu { gpu, .. } => Device::Gpu(gpu.clone()),
        }
    }

    /// Submits recorded work and starts copying the values to the host, without waiting.
    pub(crate) fn start_read(&self) -> Result<Reading> {
        match &self.storage {
            Storage::Cpu { values, .. } => Ok(Reading::Known(values.clone())),
            Storage::Gpu { gpu, buffer } => {
                Ok(Reading::UnderWay(gpu.clone(), gpu.start_read(buffer, 4 * self.len as u64)?))
            }
            Storage::Planned { .. } => Err(no_values("cpu")),
        }
    }

    /// Returns the values; waits for the device.
    pub fn to_vec(&self) -> Result<Vec<u32>> {
        self.start_read()?.finish()
    }

    /// The host values, for CPU kernels. An error if the values are on a GPU.
    pub(crate) fn host(&self, op: &'static str) -> Result<&[u32]> {
        match &self.storage {
            Storage::Cpu { values, .. } => Ok(values),
            Storage::Gpu { gpu, .. } => {
                Err(Error::DeviceMismatch { op, left: "cpu".into(), right: gpu.name().to_owned() })
            }
            Storage::Planned { .. } => Err(no_values("cpu")),
        }
    }

    /// The GPU buffer, for kernels on `gpu`. An error if the values are elsewhere.
    pub(crate) fn buffer(&self, gpu: &Gpu, op: &'static str) -> Result<&Buffer> {
        match &self.storage {
            Storage::Gpu { gpu: home, buffer } if home.is(gpu) => Ok(buffer),
            _ => Err(Error::DeviceMismatch { op, left: gpu.name().to_owned(), right: self.device().name().to_owned() }),
        }
    }

    /// Returns an error unless there are `expected` values.
    pub(crate) fn expect_len(&self, op: &'static str, what: &'static str, expected: usize) -> Result<()> {
        if self.len == expected {
            return Ok(());
        }
        Err(Error::shape(op, what, format!("{expected} values"), self.len))
    }
}
