//! A GPU: a wgpu device with its buffers, pipelines, recorder and tuned choices.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::buffer::{Buffer, Buffers};
use super::choices::Tuner;
use super::cooperative::{Cooperative, usable};
use super::ledger::Ledger;
use super::pipeline::Pipelines;
use super::pool::{MemoryCounters, Taken, size_class};
use super::raw::{GpuLimits, Raw, Wrap, device_name};
use super::recorder::Recorder;
use super::tier::Tier;
use crate::error::{Error, Result};

/// A GPU (or a software driver) opened through wgpu. Cheap to clone; all clones are one device.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
    /// The buffers of a planned GPU, see [`Gpu::planned`].
    plan: Option<Arc<Buffers>>,
}

struct Inner {
    raw: Raw,
    buffers: Arc<Buffers>,
    pipelines: Pipelines,
    recorder: Mutex<Recorder>,
    zeros: OnceLock<Buffer>,
    tuner: Tuner,
}

const STORAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

impl Gpu {
    /// Opens a GPU with every feature that a kernel of the tier can use. Installs handlers for
    /// errors and loss.
    pub(super) async fn open(adapter: &wgpu::Adapter, wrap: Wrap) -> Result<Gpu> {
        use wgpu::Features as F;
        let wanted =
            F::SUBGROUP | F::SHADER_F16 | F::IMMEDIATES | F::TIMESTAMP_QUERY | F::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let info = adapter.get_info();
        let required_features =
            usable(adapter.features(), wrap.cooperative.is_some()) & (wanted | wrap.tier.features());
        let experimental = required_features.intersects(F::all_experimental_mask());
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("qlora-wgpu"),
            required_features,
            experimental_features: if experimental {
                // SAFETY: cooperative matrices are the only experimental feature requested, and
                // only in the tier that uses them. Their loads and stores are not bounds-checked:
                // the kernels let them touch whole tiles in workgroup memory and, for loads, rows
                // that attention_pack has padded to whole tiles. All of a workgroup executes them
                // together, with subgroups of one size.
                unsafe { wgpu::ExperimentalFeatures::enabled() }
            } else {
                wgpu::ExperimentalFeatures::disabled()
            },
            required_limits: adapter.limits(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let (device, queue) = adapter.request_device(&descriptor).await.map_err(|error| Error::Device {
            device: device_name(&info),
            op: "opening the device".into(),
            message: error.to_string(),
        })?;
        let gpu = Gpu::wrap(info, device, queue, wrap)?;
        gpu.raw().watch();
        Ok(gpu)
    }

    /// Wraps a device that the caller made, and leaves its error and loss handlers alone.
    pub(super) fn wrap(info: wgpu::AdapterInfo, device: wgpu::Device, queue: wgpu::Queue, wrap: Wrap) -> Result<Gpu> {
        let raw = Raw::wrap(info, device, queue, &wrap)?;
        let (info, version) = (&raw.info, env!("CARGO_PKG_VERSION"));
        let tuned_for = format!("{}, {} {}, {}, {version}", raw.name, info.driver, info.driver_info, raw.tier);
        let inner = Inner {
            raw,
            buffers: Buffers::new(wrap.memory_limit, None),
            pipelines: Pipelines::default(),
            recorder: Mutex::default(),
            zeros: OnceLock::new(),
            tuner: Tuner::new(tuned_for, wrap.tune),
        };
        Ok(Gpu { inner: Arc::new(inner), plan: None })
    }

    /// This GPU without memory and work of its own: its buffers are only counted, in `ledger`,
    /// and nothing is dispatched. Tiers, limits and choices of kernels are the same.
    pub(super) fn planned(&self, ledger: &Ledger) -> Gpu {
        Gpu { inner: self.inner.clone(), plan: Some(Buffers::new(None, Some(ledger.clone()))) }
    }

    /// Whether this is a planned GPU.
    pub(super) fn is_planned(&self) -> bool {
        self.plan.is_some()
    }

    /// The ledger of a planned GPU.
    pub(super) fn ledger(&self) -> Option<&Ledger> {
        self.buffers().ledger.as_ref()
    }

    fn buffers(&self) -> &Arc<Buffers> {
        self.plan.as_ref().unwrap_or(&self.inner.buffers)
    }

    /// The GPU's name and backend, for example `AMD Radeon 780M (vulkan)`.
    pub(crate) fn name(&self) -> &str {
        &self.inner.raw.name
    }

    /// The capability tier, which chooses kernels.
    pub fn tier(&self) -> Tier {
        self.inner.raw.tier
    }

    /// The cooperative matrices of the kernels, or `None` in tiers without.
    pub(crate) fn cooperative(&self) -> Option<Cooperative> {
        self.inner.raw.cooperative
    }

    /// The limits that tensors and matrices must respect.
    pub(crate) fn limits(&self) -> GpuLimits {
        self.inner.raw.limits
    }

    /// wgpu's information about the GPU.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.inner.raw.info
    }

    /// The wgpu device, for sharing.
    pub fn wgpu_device(&self) -> &wgpu::Device {
        &self.inner.raw.device
    }

    /// The wgpu queue, for sharing.
    pub fn wgpu_queue(&self) -> &wgpu::Queue {
        &self.inner.raw.queue
    }

    /// Memory of this device's tensors and matrices.
    pub(crate) fn memory(&self) -> MemoryCounters {
        self.buffers().pool.counters()
    }

    /// Starts a new memory peak at the bytes that are live now.
    pub(crate) fn reset_peak(&self) {
        self.buffers().pool.reset_peak();
    }

    /// Returns pooled buffers to the driver.
    pub fn trim(&self) {
        self.buffers().retire(self.buffers().pool.trim());
        self.forget_retired();
    }

    /// Number of kernel variants compiled so far.
    pub fn pipeline_count(&self) -> usize {
        self.inner.pipelines.len()
    }

    /// The wgpu device with its limits and errors.
    pub(super) fn raw(&self) -> &Raw {
        &self.inner.raw
    }

    pub(super) fn pipelines(&self) -> &Pipelines {
        &self.inner.pipelines
    }

    pub(super) fn tuner(&self) -> &Tuner {
        &self.inner.tuner
    }

    pub(super) fn recorder(&self) -> MutexGuard<'_, Recorder> {
        self.inner.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both are the same device, not only equal ones.
    pub(crate) fn is(&self, other: &Gpu) -> bool {
        Arc::ptr_eq(self.buffers(), other.buffers())
    }

    /// Bytes that a pooled buffer of `bytes` takes.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if they exceed the binding limit.
    fn pooled_bytes(&self, what: &str, bytes: u64) -> Result<u64> {
        self.check_binding(what, bytes)?;
        Ok(size_class(bytes).min(self.inner.raw.limits.max_binding_bytes))
    }

    fn check_binding(&self, what: &str, bytes: u64) -> Result<()> {
        let limit = self.inner.raw.limits.max_binding_bytes;
        if bytes > limit {
            return Err(Error::TooLarge { device: self.inner.raw.name.clone(), what: what.to_owned(), bytes, limit });
        }
        Ok(())
    }

    /// Bytes that a buffer of this many words takes outside the pool.
    pub(crate) fn exact_bytes(words: usize) -> u64 {
        (words as u64 * 4).max(16).next_multiple_of(16)
    }

    /// Allocates an uninitialized buffer of at least `bytes` (a multiple of 4) from the pool.
    /// Errors name it `what`.
    pub(crate) fn alloc(&self, what: &str, bytes: u64) -> Result<Buffer> {
        self.create(what, bytes, self.pooled_bytes(what, bytes)?, true, |_| ())
    }

    /// Counts a buffer of exactly this many words outside the pool, on a planned GPU.
    pub(crate) fn reserve_exact(&self, what: &str, words: usize) -> Result<Buffer> {
        let bytes = Gpu::exact_bytes(words);
        self.check_binding(what, bytes)?;
        self.create(what, bytes, bytes, false, |_| ())
    }

    /// Allocates a buffer of exactly these words outside the pool, for data that stays, such as
    /// weights.
    pub(crate) fn alloc_exact(&self, what: &str, words: &[u32]) -> Result<Buffer> {
        let bytes = Gpu::exact_bytes(words.len());
        self.check_binding(what, bytes)?;
        self.create(what, bytes, bytes, false, |buffer| {
            // If the buffer couldn't be created it has no mapping; its scope reports the reason.
            if let Ok(mut view) = buffer.get_mapped_range_mut(..) {
                let words: &[u8] = bytemuck::cast_slice(words);
                view.slice(..words.len()).copy_from_slice(words);
                drop(view);
                buffer.unmap();
            }
        })
    }

    fn create(&self, what: &str, bytes: u64, size: u64, pooled: bool, init: impl Fn(&wgpu::Buffer)) -> Result<Buffer> {
        self.raw().check()?;
        let home = self.buffers().clone();
        let charge = home.ledger.as_ref().map(|ledger| ledger.charge(size));
        // The real buffer that stands for all planned ones.
        let stand_in = if charge.is_some() { Some(self.unused()?.raw().clone()) } else { None };
        let out_of_memory =
            || Error::OutOfMemory { device: self.inner.raw.name.clone(), what: what.to_owned(), bytes: size };
        let item = match home.pool.take(size, pooled) {
            Taken::Reused(item) => item,
            Taken::OverLimit { trimmed } => {
                home.retire(trimmed);
                self.forget_retired();
                return Err(out_of_memory());
            }
            Taken::Allocate { trimmed } => {
                home.retire(trimmed);
                self.forget_retired();
                let Some(id) = home.next_id() else {
                    home.pool.forget(size);
                    return Err(self.raw().error(what, "no buffer ids are left after 2^32 buffers".into()));
                };
                if let Some(raw) = stand_in {
                    return Ok(Buffer::new((id, raw), [bytes, size], pooled, home, charge));
                }
                let descriptor =
                    wgpu::BufferDescriptor { label: Some(what), size, usage: STORAGE, mapped_at_creation: !pooled };
                let create = || {
                    self.raw().scoped_alloc(what, size, |device| {
                        let buffer = device.create_buffer(&descriptor);
                        init(&buffer);
                        buffer
                    })
                };
                let created = match create() {
                    // Freeing the pool's buffers may make enough room.
                    Err(Error::OutOfMemory { .. }) => {
                        self.trim();
                        self.wait().and_then(|()| create())
                    }
                    other => other,
                };
                match created {
                    Ok(raw) => {
                        home.pool.tell_growth(&self.inner.raw.name);
                        (id, raw)
                    }
                    Err(error) => {
                        home.pool.forget(size);
                        return Err(error);
                    }
                }
            }
        };
        Ok(Buffer::new(item, [bytes, size], pooled, home, charge))
    }

    /// Drops freed buffers and their bind groups, which would keep the memory alive.
    pub(super) fn forget_retired(&self) {
        let retired = self.inner.buffers.take_retired();
        if !retired.is_empty() {
            let ids: Vec<u32> = retired.iter().map(|(id, _)| *id).collect();
            let groups = self.inner.pipelines.forget_buffers(&ids);
            // Not earlier: a thread that compiles a kernel holds the list of kernels and waits for
            // its turn.
            let _turn = self.raw().turn();
            drop((groups, retired));
        }
    }

    /// Allocates a buffer from the pool with these bytes (a multiple of 4).
    pub(crate) fn upload(&self, what: &str, data: &[u8]) -> Result<Buffer> {
        let buffer = self.alloc(what, data.len() as u64)?;
        self.write(&buffer, data)?;
        Ok(buffer)
    }

    /// Overwrites the start of a buffer, after everything recorded so far.
    pub(crate) fn write(&self, buffer: &Buffer, data: &[u8]) -> Result<()> {
        if self.is_planned() {
            return Ok(());
        }
        // A queue write runs before commands that are only recorded, and these may still use the
        // buffer's previous contents.
        self.flush()?;
        self.raw().scoped("writing a buffer", |_| self.raw().queue.write_buffer(buffer.raw(), 0, data))
    }

    /// A few zero bytes to bind for operands that a call doesn't use.
    pub(crate) fn unused(&self) -> Result<&Buffer> {
        if let Some(zeros) = self.inner.zeros.get() {
            return Ok(zeros);
        }
        // A real buffer for a planned GPU, too.
        let real = Gpu { inner: self.inner.clone(), plan: None };
        let buffer = real.alloc_exact("unused operand", &[0; 4])?;
        Ok(self.inner.zeros.get_or_init(|| buffer))
    }
}
