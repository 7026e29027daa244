//! The CPU as a device. Host memory comes from a pool and is counted like a GPU's.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::pool::{MemoryCounters, Pool, Taken, size_class};
use crate::error::{Error, Result};

/// The CPU device; clones share one pool.
#[derive(Clone)]
pub struct Cpu(Arc<Pool<Vec<f32>>>);

impl Default for Cpu {
    fn default() -> Self {
        Cpu(Arc::new(Pool::new(None)))
    }
}

/// `len` f32 values of host memory, returned to the pool when dropped.
pub struct HostBuffer {
    values: Vec<f32>,
    size: u64,
    pool: Arc<Pool<Vec<f32>>>,
}

impl Cpu {
    /// Memory of this device's tensors and matrices.
    pub fn memory(&self) -> MemoryCounters {
        self.0.counters()
    }

    /// Starts a new memory peak at the bytes that are live now.
    pub fn reset_peak(&self) {
        self.0.reset_peak();
    }

    /// Returns `len` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system has no room.
    pub(crate) fn zeros(&self, len: usize) -> Result<HostBuffer> {
        let size = size_class(len as u64 * 4);
        let values = match self.0.take(size, true) {
            Taken::Reused(mut values) => {
                values.clear();
                values.resize(len, 0.0);
                values
            }
            // There is no limit, so it can't be exceeded.
            Taken::Allocate { .. } | Taken::OverLimit { .. } => {
                let mut values = Vec::new();
                if values.try_reserve_exact(size as usize / 4).is_err() {
                    self.0.forget(size);
                    return Err(Error::OutOfMemory { device: "cpu".into(), what: "a tensor".into(), bytes: size });
                }
                values.resize(len, 0.0);
                self.0.tell_growth("cpu");
                values
            }
        };
        Ok(HostBuffer { values, size, pool: self.0.clone() })
    }

    /// Returns a copy of these values, counted as this device's memory until dropped.
    pub(crate) fn adopt(&self, values: &[f32]) -> Result<HostBuffer> {
        let mut buffer = self.zeros(values.len())?;
        buffer.copy_from_slice(values);
        Ok(buffer)
    }

    /// Counts memory held elsewhere, such as packed weights, as long as the result lives.
    pub(crate) fn count(&self, bytes: u64) -> Counted {
        self.0.count(bytes);
        self.0.tell_growth("cpu");
        Counted { bytes, pool: self.0.clone() }
    }
}

/// Keeps bytes counted as live.
pub(crate) struct Counted {
    bytes: u64,
    pool: Arc<Pool<Vec<f32>>>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.pool.forget(self.bytes);
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        self.pool.put(self.size, 0, std::mem::take(&mut self.values));
    }
}

impl Deref for HostBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl DerefMut for HostBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostBuffer({} values)", self.values.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_zeroed_and_counted() {
        let cpu = Cpu::default();
        let mut first = cpu.zeros(1000).unwrap();
        first.fill(7.0);
        drop(first);
        let second = cpu.zeros(990).unwrap();
        assert!(second.iter().all(|&value| value == 0.0));
        let packed = cpu.count(1 << 20);
        let counters = cpu.memory();
        assert_eq!(counters.reuses, 1);
        assert_eq!(counters.live_bytes, size_class(4000) + (1 << 20));
        drop((second, packed));
        let error = cpu.zeros(usize::MAX / 8).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { bytes, .. } if bytes > 1 << 60), "{error}");
        assert_eq!(cpu.memory().live_bytes, 0);
    }
}
