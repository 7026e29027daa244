//! A wgpu device with everything that kernels need: limits, tier, buffers, errors as values.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::commands::Recorder;
use super::cooperative::{Cooperative, usable};
use super::ledger::{Charge, Ledger};
use super::pipeline::Pipelines;
use super::pool::{MemoryCounters, Pool, Taken, size_class};
use super::tier::Tier;
use super::tune::Tuner;
use crate::error::{Error, Result};

/// A GPU (or a software driver) opened through wgpu. Cheap to clone; all clones are one device. A
/// planned GPU ([`Gpu::planned`]) has buffers of its own.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>, Option<Arc<Buffers>>);

struct Inner {
    name: String,
    raw: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    tier: Tier,
    cooperative: Option<Cooperative>,
    limits: GpuLimits,
    fault: Arc<Fault>,
    buffers: Arc<Buffers>,
    pipelines: Pipelines,
    recorder: Mutex<Recorder>,
    /// See [`Gpu::turn`].
    turn: Option<Mutex<()>>,
    zeros: OnceLock<Buffer>,
    tuner: Tuner,
}

/// The limits that kernels and tensors respect.
#[derive(Clone, Copy, Debug)]
pub struct GpuLimits {
    /// Maximum bytes of one storage binding, and so of one tensor or one part of a matrix.
    pub max_binding_bytes: u64,
    /// Maximum workgroups in one dimension of a dispatch.
    pub max_workgroups: u32,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// Maximum invocations per workgroup.
    pub workgroup_threads: u32,
    /// Maximum storage buffers of a kernel.
    pub max_storage_buffers: u32,
    /// Whether parameters travel as immediate data; otherwise in a uniform buffer.
    pub immediates: bool,
    /// Alignment of uniform offsets, in bytes.
    pub uniform_alignment: u32,
}

/// Options of [`Gpu::wrap`], passed on from [`GpuOptions`](super::GpuOptions).
pub(super) struct Wrap {
    pub tier: Tier,
    /// The GPU's cooperative matrices, if it has any.
    pub cooperative: Option<Cooperative>,
    pub max_binding_bytes: Option<u64>,
    pub memory_limit: Option<u64>,
    pub immediates: bool,
    /// The file of tuned choices.
    pub tune: Option<PathBuf>,
}

/// Set once the device is lost, or when wgpu has reported an error outside every scope.
#[derive(Default)]
struct Fault {
    lost: OnceLock<String>,
    uncaptured: Mutex<Option<String>>,
}

/// The pool, and the buffers that have been freed for good, whose bind groups can be forgotten.
struct Buffers {
    pool: Pool<(u32, wgpu::Buffer)>,
    next_id: AtomicU64,
    retired: Mutex<Vec<(u32, wgpu::Buffer)>>,
    /// Set on a planned GPU.
    ledger: Option<Ledger>,
}

impl Buffers {
    fn new(memory_limit: Option<u64>, ledger: Option<Ledger>) -> Arc<Buffers> {
        let pool = Pool::new(memory_limit);
        Arc::new(Buffers { pool, next_id: AtomicU64::new(1), retired: Mutex::default(), ledger })
    }

    fn retire(&self, buffers: impl IntoIterator<Item = (u32, wgpu::Buffer)>) {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).extend(buffers);
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
        let (raw, queue) = adapter.request_device(&descriptor).await.map_err(|error| Error::Device {
            device: device_name(&info),
            op: "opening the device".into(),
            message: error.to_string(),
        })?;
        let gpu = Gpu::wrap(info, raw, queue, wrap)?;
        let fault = gpu.0.fault.clone();
        gpu.0.raw.set_device_lost_callback(move |reason, message| {
            let _first_reason_stays = fault.lost.set(match reason {
                wgpu::DeviceLostReason::Destroyed => format!("{message} (destroyed)"),
                wgpu::DeviceLostReason::Unknown => message,
            });
        });
        let fault = gpu.0.fault.clone();
        gpu.0.raw.on_uncaptured_error(Arc::new(move |error| {
            fault.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
        }));
        Ok(gpu)
    }

    /// Wraps a device that the caller made, and leaves its error and loss handlers alone.
    pub(super) fn wrap(info: wgpu::AdapterInfo, raw: wgpu::Device, queue: wgpu::Queue, wrap: Wrap) -> Result<Gpu> {
        let name = device_name(&info);
        let features = usable(raw.features(), wrap.cooperative.is_some());
        if !features.contains(wrap.tier.features()) {
            return Err(Error::Unsupported {
                device: name,
                what: format!("tier {}", wrap.tier),
                hint: format!(
                    "it can run: {}",
                    Tier::runnable(features).map(|tier| tier.to_string()).collect::<Vec<_>>().join(", ")
                ),
            });
        }
        let device_limits = raw.limits();
        // A storage binding's size must be a multiple of 4, and for vec4 views a multiple of 16.
        let max_binding = device_limits.max_storage_buffer_binding_size.min(device_limits.max_buffer_size) & !15;
        let limits = GpuLimits {
            max_binding_bytes: wrap.max_binding_bytes.map_or(max_binding, |bytes| bytes.min(max_binding) & !15),
            max_workgroups: device_limits.max_compute_workgroups_per_dimension,
            workgroup_bytes: device_limits.max_compute_workgroup_storage_size,
            workgroup_threads: device_limits.max_compute_invocations_per_workgroup,
            max_storage_buffers: device_limits.max_storage_buffers_per_shader_stage,
            immediates: wrap.immediates
                && features.contains(wgpu::Features::IMMEDIATES)
                && device_limits.max_immediate_size >= MAX_PARAMS_BYTES,
            uniform_alignment: device_limits.min_uniform_buffer_offset_alignment.max(MAX_PARAMS_BYTES),
        };
        tracing::info!(
            tier = %wrap.tier,
            max_binding_bytes = limits.max_binding_bytes,
            max_workgroups = limits.max_workgroups,
            immediates = limits.immediates,
            "device: {name}"
        );
        let version = env!("CARGO_PKG_VERSION");
        let tuned_for = format!("{name}, {} {}, {}, {version}", info.driver, info.driver_info, wrap.tier);
        let turn = (info.backend == wgpu::Backend::Gl).then(Mutex::default);
        let inner = Inner {
            name,
            raw,
            queue,
            info,
            tier: wrap.tier,
            cooperative: wrap.cooperative.filter(|_| wrap.tier.cooperative()),
            limits,
            fault: Arc::default(),
            buffers: Buffers::new(wrap.memory_limit, None),
            pipelines: Pipelines::default(),
            recorder: Mutex::default(),
            zeros: OnceLock::new(),
            tuner: Tuner::new(tuned_for, wrap.tune),
            turn,
        };
        Ok(Gpu(Arc::new(inner), None))
    }

    /// This GPU without memory and work of its own: its buffers are only counted, in `ledger`,
    /// and nothing is dispatched. Tiers, limits and choices of kernels are the same.
    pub(super) fn planned(&self, ledger: &Ledger) -> Gpu {
        Gpu(self.0.clone(), Some(Buffers::new(None, Some(ledger.clone()))))
    }

    /// Whether this is a planned GPU.
    pub(super) fn is_planned(&self) -> bool {
        self.1.is_some()
    }

    /// The ledger of a planned GPU.
    pub(super) fn ledger(&self) -> Option<&Ledger> {
        self.buffers().ledger.as_ref()
    }

    fn buffers(&self) -> &Arc<Buffers> {
        self.1.as_ref().unwrap_or(&self.0.buffers)
    }

    /// The GPU's name and backend, for example `AMD Radeon 780M (vulkan)`.
    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// The capability tier, which chooses kernels.
    pub fn tier(&self) -> Tier {
        self.0.tier
    }

    /// The cooperative matrices of the kernels, or `None` in tiers without.
    pub(crate) fn cooperative(&self) -> Option<Cooperative> {
        self.0.cooperative
    }

    /// The limits that tensors and matrices must respect.
    pub(crate) fn limits(&self) -> GpuLimits {
        self.0.limits
    }

    /// wgpu's information about the GPU.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.0.info
    }

    /// The wgpu device, for sharing.
    pub fn wgpu_device(&self) -> &wgpu::Device {
        &self.0.raw
    }

    /// The wgpu queue, for sharing.
    pub fn wgpu_queue(&self) -> &wgpu::Queue {
        &self.0.queue
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
        self.0.pipelines.len()
    }

    pub(super) fn immediates(&self) -> bool {
        self.0.limits.immediates
    }

    pub(super) fn pipelines(&self) -> &Pipelines {
        &self.0.pipelines
    }

    pub(super) fn tuner(&self) -> &Tuner {
        &self.0.tuner
    }

    pub(super) fn recorder(&self) -> &Mutex<Recorder> {
        &self.0.recorder
    }

    /// Whether both are the same device, not only equal ones.
    pub(crate) fn is(&self, other: &Gpu) -> bool {
        Arc::ptr_eq(self.buffers(), other.buffers())
    }

    /// wgpu's messages have several lines.
    pub(super) fn error(&self, op: &str, message: String) -> Error {
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        Error::Device { device: self.0.name.clone(), op: op.to_owned(), message }
    }

    /// Returns an error if the device is lost or has reported an error since the last check.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(reason) = self.0.fault.lost.get() {
            return Err(self.lost(reason));
        }
        match self.0.fault.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(message) => Err(self.error("an earlier operation", message)),
            None => Ok(()),
        }
    }

    fn lost(&self, reason: &str) -> Error {
        Error::DeviceLost { device: self.0.name.clone(), reason: reason.to_owned() }
    }

    /// Keeps an error for the next caller, too.
    pub(super) fn remember(&self, error: &Error) {
        self.0.fault.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
    }

    /// Marks the device as lost; every later call reports this.
    pub(super) fn mark_lost(&self, reason: &str) -> Error {
        self.lost(self.0.fault.lost.get_or_init(|| reason.to_owned()))
    }

    /// Runs `f` and turns errors that wgpu reports meanwhile into an `Error`.
    pub(super) fn scoped<T>(&self, op: &str, f: impl FnOnce(&wgpu::Device) -> T) -> Result<T> {
        self.scoped_alloc(op, 0, f)
    }

    /// Like [`Gpu::scoped`], for an `f` that allocates this many bytes.
    pub(super) fn scoped_alloc<T>(&self, op: &str, bytes: u64, f: impl FnOnce(&wgpu::Device) -> T) -> Result<T> {
        self.check()?;
        let _turn = self.turn();
        let raw = &self.0.raw;
        let validation = raw.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = raw.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = raw.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let value = f(raw);
        // Scopes are a stack, innermost first. Native scopes answer at once.
        let memory = pollster::block_on(memory.pop());
        let internal = pollster::block_on(internal.pop());
        let validation = pollster::block_on(validation.pop());
        match memory.or(internal).or(validation) {
            None => Ok(value),
            Some(wgpu::Error::OutOfMemory { .. }) => {
                Err(Error::OutOfMemory { device: self.0.name.clone(), what: op.to_owned(), bytes })
            }
            Some(error) => {
                self.check_lost()?;
                Err(self.error(op, error.to_string()))
            }
        }
    }

    /// After a failure, returns an error if its reason is a lost device. On a lost device wgpu
    /// reports nothing and makes invalid objects, and a device that the caller made lacks our
    /// callback.
    fn check_lost(&self) -> Result<()> {
        let raw = &self.0.raw;
        // Runs the loss callback of devices that we opened; the result doesn't matter here.
        let _ = raw.poll(wgpu::PollType::Poll);
        self.check()?;
        let validation = raw.push_error_scope(wgpu::ErrorFilter::Validation);
        let memory = raw.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let probe = raw.create_buffer(&wgpu::BufferDescriptor {
            label: Some("probe"),
            size: 16,
            usage: wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        });
        let alive = probe.get_mapped_range_mut(..).is_ok();
        let starved = pollster::block_on(memory.pop()).is_some();
        let _ = pollster::block_on(validation.pop());
        if alive || starved {
            Ok(())
        } else {
            Err(self.mark_lost("it was destroyed or reset and refuses every operation"))
        }
    }

    /// Bytes that a pooled buffer of `bytes` takes.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if they exceed the binding limit.
    fn pooled_bytes(&self, what: &str, bytes: u64) -> Result<u64> {
        self.check_binding(what, bytes)?;
        Ok(size_class(bytes).min(self.0.limits.max_binding_bytes))
    }

    fn check_binding(&self, what: &str, bytes: u64) -> Result<()> {
        let limit = self.0.limits.max_binding_bytes;
        if bytes > limit {
            return Err(Error::TooLarge { device: self.0.name.clone(), what: what.to_owned(), bytes, limit });
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
        self.check()?;
        let home = self.buffers().clone();
        let charge = home.ledger.as_ref().map(|ledger| ledger.charge(size));
        let out_of_memory = || Error::OutOfMemory { device: self.0.name.clone(), what: what.to_owned(), bytes: size };
        let (id, raw) = match home.pool.take(size, pooled) {
            Taken::Reused(item) => item,
            Taken::OverLimit { trimmed } => {
                home.retire(trimmed);
                self.forget_retired();
                return Err(out_of_memory());
            }
            Taken::Allocate { trimmed } => {
                home.retire(trimmed);
                self.forget_retired();
                let Ok(id) = u32::try_from(home.next_id.fetch_add(1, Ordering::Relaxed)) else {
                    home.pool.forget(size);
                    return Err(self.error(what, "no buffer ids are left after 2^32 buffers".into()));
                };
                if charge.is_some() {
                    let raw = self.unused()?.raw().clone();
                    return Ok(Buffer(Arc::new(BufferInner { raw, id, bytes, size, pooled, home, charge })));
                }
                let descriptor =
                    wgpu::BufferDescriptor { label: Some(what), size, usage: STORAGE, mapped_at_creation: !pooled };
                let create = || {
                    self.scoped_alloc(what, size, |device| {
                        let buffer = device.create_buffer(&descriptor);
                        init(&buffer);
                        buffer
                    })
                };
                let created = match create() {
                    // Freeing the pool's buffers may make enough room.
                    Err(Error::OutOfMemory { .. }) => {
                        self.trim();
                        self.wait()?;
                        create()
                    }
                    other => other,
                };
                match created {
                    Ok(raw) => {
                        home.pool.tell_growth(&self.0.name);
                        (id, raw)
                    }
                    Err(error) => {
                        home.pool.forget(size);
                        return Err(error);
                    }
                }
            }
        };
        Ok(Buffer(Arc::new(BufferInner { raw, id, bytes, size, pooled, home, charge })))
    }

    /// Drops freed buffers and their bind groups, which would keep the memory alive.
    pub(super) fn forget_retired(&self) {
        let retired = std::mem::take(&mut *self.0.buffers.retired.lock().unwrap_or_else(PoisonError::into_inner));
        if !retired.is_empty() {
            let ids: Vec<u32> = retired.iter().map(|(id, _)| *id).collect();
            let groups = self.0.pipelines.forget_buffers(&ids);
            // Not earlier: a thread that compiles a kernel holds the list of kernels and waits for
            // its turn.
            let _turn = self.turn();
            drop((groups, retired));
        }
    }

    /// Held while wgpu works on devices that only one thread may use at a time. wgpu's GL backend
    /// panics when a thread waits a few seconds for another, and a driver can take that long to
    /// compile a shader.
    pub(super) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.0.turn.as_ref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner))
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
        self.scoped("writing a buffer", |_| self.0.queue.write_buffer(buffer.raw(), 0, data))
    }

    /// A few zero bytes to bind for operands that a call doesn't use.
    pub(crate) fn unused(&self) -> Result<&Buffer> {
        if let Some(zeros) = self.0.zeros.get() {
            return Ok(zeros);
        }
        // A real buffer for a planned GPU, too.
        let real = Gpu(self.0.clone(), None);
        let buffer = real.alloc_exact("unused operand", &[0; 4])?;
        Ok(self.0.zeros.get_or_init(|| buffer))
    }
}

/// Maximum bytes of a kernel's `Params`. Every native backend supports this much immediate data.
pub(crate) const MAX_PARAMS_BYTES: u32 = 128;

/// The name of a GPU in errors, listings and `--device`.
pub(super) fn device_name(info: &wgpu::AdapterInfo) -> String {
    format!("{} ({})", info.name.trim(), info.backend)
}

/// Driver and driver version of a GPU.
pub(super) fn driver_name(info: &wgpu::AdapterInfo) -> String {
    format!("{} {}", info.driver, info.driver_info).trim().to_owned()
}
