//! The CPU as a device. Host memory comes from a pool and is counted like a GPU's.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::ledger::{Charge, Ledger, no_values};
use super::pool::{MemoryCounters, Pool, Taken, size_class};
use crate::error::{Error, Result};

/// The CPU device; clones share one pool.
#[derive(Clone, Default)]
pub struct Cpu {
    pool: Arc<Pool<Vec<f32>>>,
    /// Set on a planned CPU, whose memory is only counted.
    ledger: Option<Ledger>,
}

/// `len` f32 values of host memory, returned to the pool when dropped.
pub struct HostBuffer {
    values: Vec<f32>,
    size: u64,
    pool: Arc<Pool<Vec<f32>>>,
    /// On a planned CPU, which has no values.
    charge: Option<Charge>,
}

impl Cpu {
    /// Memory of this device's tensors and matrices.
    pub(crate) fn memory(&self) -> MemoryCounters {
        self.pool.counters()
    }

    /// Starts a new memory peak at the bytes that are live now.
    pub(crate) fn reset_peak(&self) {
        self.pool.reset_peak();
    }

    /// A CPU without memory of its own: what it allocates is only counted, in `ledger`.
    pub(super) fn planned(ledger: &Ledger) -> Cpu {
        Cpu { ledger: Some(ledger.clone()), ..Cpu::default() }
    }

    /// The ledger of a planned CPU.
    pub(super) fn ledger(&self) -> Option<&Ledger> {
        self.ledger.as_ref()
    }

    /// Whether both are the same device. All CPU devices but planned ones are.
    pub(super) fn is(&self, other: &Cpu) -> bool {
        match (&self.ledger, &other.ledger) {
            (None, None) => true,
            (Some(one), Some(other)) => one.is(other),
            _ => false,
        }
    }

    /// Counts `len` values, on a planned CPU.
    pub(crate) fn reserve(&self, len: usize) -> HostBuffer {
        let size = size_class(len as u64 * 4);
        let charge = self.ledger.as_ref().map(|ledger| ledger.charge(size));
        // There is no limit, and there are no values to reuse.
        self.pool.take(size, true);
        HostBuffer { values: Vec::new(), size, pool: self.pool.clone(), charge }
    }

    /// Returns `len` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system has no room, [`Error::Invalid`] on a planned CPU.
    pub(crate) fn zeros(&self, len: usize) -> Result<HostBuffer> {
        if self.ledger.is_some() {
            return Err(no_values("cpu"));
        }
        let size = size_class(len as u64 * 4);
        let values = match self.pool.take(size, true) {
            Taken::Reused(mut values) => {
                values.clear();
                values.resize(len, 0.0);
                values
            }
            // There is no limit, so it can't be exceeded.
            Taken::Allocate { .. } | Taken::OverLimit { .. } => {
                let mut values = Vec::new();
                if values.try_reserve_exact(size as usize / 4).is_err() {
                    self.pool.forget(size);
                    return Err(Error::OutOfMemory { device: "cpu".into(), what: "a tensor".into(), bytes: size });
                }
                values.resize(len, 0.0);
                self.pool.tell_growth("cpu");
                values
            }
        };
        Ok(HostBuffer { values, size, pool: self.pool.clone(), charge: None })
    }

    /// Returns a copy of these values, counted as this device's memory until dropped.
    pub(crate) fn adopt(&self, values: &[f32]) -> Result<HostBuffer> {
        let mut buffer = self.zeros(values.len())?;
        buffer.copy_from_slice(values);
        Ok(buffer)
    }

    /// Counts memory held elsewhere, such as packed weights, as long as the result lives.
    pub(crate) fn count(&self, bytes: u64) -> Counted {
        self.pool.count(bytes);
        let charge = self.ledger.as_ref().map(|ledger| ledger.charge(bytes));
        if charge.is_none() {
            self.pool.tell_growth("cpu");
        }
        Counted { bytes, pool: self.pool.clone(), _charge: charge }
    }
}

impl Counted {
    /// The number of bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Keeps bytes counted as live.
pub(crate) struct Counted {
    bytes: u64,
    pool: Arc<Pool<Vec<f32>>>,
    _charge: Option<Charge>,
}

impl HostBuffer {
    /// Its entry in the ledger of a planned CPU.
    pub(crate) fn charge(&self) -> Option<&Charge> {
        self.charge.as_ref()
    }
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
