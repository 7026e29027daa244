//! Storage buffers of a GPU.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::ledger::{Charge, Ledger};
use super::pool::Pool;

/// The pool, and the buffers that have been freed for good, whose bind groups can be forgotten.
pub(super) struct Buffers {
    pub pool: Pool<(u32, wgpu::Buffer)>,
    next_id: AtomicU64,
    retired: Mutex<Vec<(u32, wgpu::Buffer)>>,
    /// Set on a planned GPU.
    pub ledger: Option<Ledger>,
}

impl Buffers {
    pub fn new(memory_limit: Option<u64>, ledger: Option<Ledger>) -> Arc<Buffers> {
        let pool = Pool::new(memory_limit);
        Arc::new(Buffers { pool, next_id: AtomicU64::new(1), retired: Mutex::default(), ledger })
    }

    /// An id for the next buffer; `None` after 2^32 of them.
    pub fn next_id(&self) -> Option<u32> {
        u32::try_from(self.next_id.fetch_add(1, Ordering::Relaxed)).ok()
    }

    /// Takes note of freed buffers.
    pub fn retire(&self, buffers: impl IntoIterator<Item = (u32, wgpu::Buffer)>) {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).extend(buffers);
    }

    /// Returns what was freed since the last call.
    pub fn take_retired(&self) -> Vec<(u32, wgpu::Buffer)> {
        std::mem::take(&mut *self.retired.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A storage buffer, shared by its clones. When the last one is dropped it returns to the pool or
/// is freed.
#[derive(Clone)]
pub struct Buffer(Arc<BufferInner>);

struct BufferInner {
    raw: wgpu::Buffer,
    id: u32,
    bytes: u64,
    size: u64,
    pooled: bool,
    home: Arc<Buffers>,
    /// On a planned GPU.
    charge: Option<Charge>,
}

impl Buffer {
    /// A buffer of `bytes` that takes `size` on the device and returns to `home`.
    pub(super) fn new(
        (id, raw): (u32, wgpu::Buffer),
        [bytes, size]: [u64; 2],
        pooled: bool,
        home: Arc<Buffers>,
        charge: Option<Charge>,
    ) -> Buffer {
        Buffer(Arc::new(BufferInner { raw, id, bytes, size, pooled, home, charge }))
    }

    /// Bytes in use; the allocation may be larger.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Bytes that this buffer takes on the device.
    pub fn resident_bytes(&self) -> u64 {
        self.0.size
    }

    pub(super) fn raw(&self) -> &wgpu::Buffer {
        &self.0.raw
    }

    /// Distinguishes live buffers. When the pool reuses the memory, the id stays the same.
    pub(crate) fn id(&self) -> u32 {
        self.0.id
    }

    /// Whether there are other handles to this buffer.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Its entry in the ledger of a planned GPU.
    pub(crate) fn charge(&self) -> Option<&Charge> {
        self.0.charge.as_ref()
    }

    pub(super) fn binding(&self) -> wgpu::BindingResource<'_> {
        // The whole buffer, because a cached bind group must fit every reuse of it.
        self.0.raw.as_entire_binding()
    }
}

impl Drop for BufferInner {
    fn drop(&mut self) {
        if self.pooled {
            self.home.pool.put(self.size, self.id.into(), (self.id, self.raw.clone()));
        } else {
            self.home.pool.forget(self.size);
            self.home.retire([(self.id, self.raw.clone())]);
        }
    }
}
