//! u32 values on a device: token ids, labels, positions, ranges.

use std::sync::Arc;

use crate::device::{Buffer, Counted, Cpu, Device, Gpu};
use crate::error::{Error, Result};

/// A list of u32 values on a device. Clones share them.
#[derive(Clone)]
pub struct Indices {
    len: usize,
    storage: Storage,
}

#[derive(Clone)]
enum Storage {
    Cpu { cpu: Cpu, values: Arc<[u32]>, _counted: Arc<Counted> },
    Gpu { gpu: Gpu, buffer: Buffer },
}

impl std::fmt::Debug for Indices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Indices({} on {})", self.len, self.device().name())
    }
}

impl Indices {
    /// These values.
    ///
    /// # Errors
    /// [`Error::TooLarge`] and [`Error::OutOfMemory`] from the device.
    pub fn from_slice(device: &Device, values: &[u32]) -> Result<Indices> {
        let storage = match device {
            Device::Cpu(cpu) => {
                let counted = Arc::new(cpu.count(size_of_val(values) as u64));
                Storage::Cpu { cpu: cpu.clone(), values: values.into(), _counted: counted }
            }
            Device::Gpu(gpu) => {
                let buffer = gpu.upload("indices", bytemuck::cast_slice(values))?;
                Storage::Gpu { gpu: gpu.clone(), buffer }
            }
        };
        Ok(Indices { len: values.len(), storage })
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the values are.
    pub fn device(&self) -> Device {
        match &self.storage {
            Storage::Cpu { cpu, .. } => Device::Cpu(cpu.clone()),
            Storage::Gpu { gpu, .. } => Device::Gpu(gpu.clone()),
        }
    }

    /// The host values, for kernels that have made sure that they run on the CPU device.
    pub(crate) fn host(&self, op: &'static str) -> Result<&[u32]> {
        match &self.storage {
            Storage::Cpu { values, .. } => Ok(values),
            Storage::Gpu { gpu, .. } => {
                Err(Error::DeviceMismatch { op, left: "cpu".into(), right: gpu.name().to_owned() })
            }
        }
    }

    /// The GPU buffer, for kernels that run on `gpu`.
    pub(crate) fn buffer(&self, gpu: &Gpu, op: &'static str) -> Result<&Buffer> {
        match &self.storage {
            Storage::Gpu { gpu: home, buffer } if home.is(gpu) => Ok(buffer),
            _ => Err(Error::DeviceMismatch { op, left: gpu.name().to_owned(), right: self.device().name().to_owned() }),
        }
    }

    /// An error unless there are `expected` values.
    pub(crate) fn expect_len(&self, op: &'static str, what: &'static str, expected: usize) -> Result<()> {
        if self.len == expected {
            return Ok(());
        }
        Err(Error::Shape { op, what, expected: format!("{expected} values"), got: self.len.to_string() })
    }
}
