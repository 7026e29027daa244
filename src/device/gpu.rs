//! A wgpu device with what the kernels need around it: limits, tier, buffers, errors as values.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::commands::Recorder;
use super::cooperative::{Cooperative, usable};
use super::pipeline::Pipelines;
use super::pool::{MemoryCounters, Pool, Taken, size_class};
use super::tier::Tier;
use super::tune::Tuner;
use crate::error::{Error, Result};

/// A GPU (or a software driver) opened through wgpu. Cheap to clone; all clones are one device.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

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
    /// The most bytes that one storage binding, and so one tensor or one part of a matrix, may have.
    pub max_binding_bytes: u64,
    /// The most workgroups in one dimension of a dispatch.
    pub max_workgroups: u32,
    /// Bytes of memory that a workgroup may share.
    pub workgroup_bytes: u32,
    /// The most invocations of a workgroup.
    pub workgroup_threads: u32,
    /// The most storage buffers of a kernel.
    pub max_storage_buffers: u32,
    /// Parameters travel as immediate data; otherwise in a uniform buffer.
    pub immediates: bool,
    /// Alignment of uniform offsets, in bytes.
    pub uniform_alignment: u32,
}

/// Options of [`Gpu::wrap`] that [`GpuOptions`](super::GpuOptions) passes on.
pub(super) struct Wrap {
    pub tier: Tier,
    /// What the adapter has of them.
    pub cooperative: Option<Cooperative>,
    pub max_binding_bytes: Option<u64>,
    pub memory_limit: Option<u64>,
    pub immediates: bool,
    /// The file of tuned choices.
    pub tune: Option<PathBuf>,
}

/// Set once the device is lost, or when wgpu reported an error outside every scope.
#[derive(Default)]
struct Fault {
    lost: OnceLock<String>,
    uncaptured: Mutex<Option<String>>,
}

/// The pool, and the buffers that are gone for good, whose bind groups can be forgotten.
struct Buffers {
    pool: Pool<(u32, wgpu::Buffer)>,
    next_id: AtomicU64,
    retired: Mutex<Vec<(u32, wgpu::Buffer)>>,
}

impl Buffers {
    fn retire(&self, buffers: impl IntoIterator<Item = (u32, wgpu::Buffer)>) {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).extend(buffers);
    }
}

/// A storage buffer; shared by its clones, back in the pool (or freed) when the last one is dropped.
#[derive(Clone)]
pub struct Buffer(Arc<BufferInner>);

struct BufferInner {
    raw: wgpu::Buffer,
    id: u32,
    bytes: u64,
    size: u64,
    pooled: bool,
    home: Arc<Buffers>,
}

impl Buffer {
    /// Bytes in use; the buffer behind may be larger.
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

    /// Tells live buffers apart; a later life of the same memory has the same id.
    pub(crate) fn id(&self) -> u32 {
        self.0.id
    }

    /// Whether there are other handles to this buffer.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    pub(super) fn binding(&self) -> wgpu::BindingResource<'_> {
        // The whole buffer: a cached bind group must fit every later life of it.
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
    /// Opens an adapter with every feature that a kernel of the tier can use. Installs handlers for errors and loss.
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
                // SAFETY: cooperative matrices are the only experimental feature asked for, and only in the tier that uses
                // them. Their loads and stores are not checked against bounds: the kernels let them touch whole tiles in
                // workgroup memory and, for loads, rows that attention_pack has padded to whole tiles. All of a workgroup runs them together, with subgroups of one size.
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

    /// Wraps a device that the caller made; leaves its error and loss handlers as they are.
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
        // A storage binding's size is a multiple of 4, and vec4 views want 16.
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
        let buffers =
            Buffers { pool: Pool::new(wrap.memory_limit), next_id: AtomicU64::new(1), retired: Mutex::default() };
        Ok(Gpu(Arc::new(Inner {
            name,
            raw,
            queue,
            info,
            tier: wrap.tier,
            cooperative: wrap.cooperative.filter(|_| wrap.tier.cooperative()),
            limits,
            fault: Arc::default(),
            buffers: Arc::new(buffers),
            pipelines: Pipelines::default(),
            recorder: Mutex::default(),
            zeros: OnceLock::new(),
            tuner: Tuner::new(tuned_for, wrap.tune),
            turn,
        })))
    }

    /// The adapter's name and backend, as in `AMD Radeon 780M (vulkan)`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The capability tier that chooses kernels.
    pub fn tier(&self) -> Tier {
        self.0.tier
    }

    /// The cooperative matrices of its kernels; none in tiers that use none.
    pub(crate) fn cooperative(&self) -> Option<Cooperative> {
        self.0.cooperative
    }

    /// The limits that tensors and matrices must respect.
    pub fn limits(&self) -> GpuLimits {
        self.0.limits
    }

    /// What wgpu says of the adapter.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.0.info
    }

    /// The wgpu device, to share it.
    pub fn wgpu_device(&self) -> &wgpu::Device {
        &self.0.raw
    }

    /// The wgpu queue, to share it.
    pub fn wgpu_queue(&self) -> &wgpu::Queue {
        &self.0.queue
    }

    /// Memory of this device's tensors and matrices.
    pub fn memory(&self) -> MemoryCounters {
        self.0.buffers.pool.counters()
    }

    /// Starts a new memory peak at what is live now.
    pub fn reset_peak(&self) {
        self.0.buffers.pool.reset_peak();
    }

    /// Gives pooled buffers back to the driver.
    pub fn trim(&self) {
        self.0.buffers.retire(self.0.buffers.pool.trim());
        self.forget_retired();
    }

    /// How many kernel variants have been compiled.
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

    /// The same device, not only an equal one.
    pub(crate) fn is(&self, other: &Gpu) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// wgpu's messages have several lines.
    pub(super) fn error(&self, op: &str, message: String) -> Error {
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        Error::Device { device: self.0.name.clone(), op: op.to_owned(), message }
    }

    /// An error if the device is lost or has reported one since the last check.
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

    /// Keeps an error for the next caller too.
    pub(super) fn remember(&self, error: &Error) {
        self.0.fault.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
    }

    /// Marks the device as lost, so that every later call says so.
    pub(super) fn mark_lost(&self, reason: &str) -> Error {
        self.lost(self.0.fault.lost.get_or_init(|| reason.to_owned()))
    }

    /// Runs `f` and turns what wgpu reports meanwhile into an `Error`.
    pub(super) fn scoped<T>(&self, op: &str, f: impl FnOnce(&wgpu::Device) -> T) -> Result<T> {
        self.scoped_alloc(op, 0, f)
    }

    /// As [`Gpu::scoped`], for an `f` that allocates so many bytes.
    pub(super) fn scoped_alloc<T>(&self, op: &str, bytes: u64, f: impl FnOnce(&wgpu::Device) -> T) -> Result<T> {
        self.check()?;
        let _turn = self.turn();
        let raw = &self.0.raw;
        let validation = raw.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = raw.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = raw.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let value = f(raw);
        // Scopes are a stack: innermost first. Native scopes answer at once.
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

    /// After something has failed: an error if the reason is that the device is gone. wgpu reports nothing on a lost
    /// device, it makes objects that are invalid, and a device of the caller has no callback of ours.
    fn check_lost(&self) -> Result<()> {
        let raw = &self.0.raw;
        // Runs the loss callback of our own devices; its answer does not matter here.
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

    /// Bytes that a buffer of `bytes` from the pool takes.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if they are over the binding limit.
    pub(crate) fn pooled_bytes(&self, what: &str, bytes: u64) -> Result<u64> {
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

    /// Bytes that a buffer of so many words outside the pool takes.
    pub(crate) fn exact_bytes(words: usize) -> u64 {
        (words as u64 * 4).max(16).next_multiple_of(16)
    }

    /// An uninitialized buffer of at least `bytes` (a multiple of 4) from the pool, for `what`.
    pub(crate) fn alloc(&self, what: &str, bytes: u64) -> Result<Buffer> {
        self.create(what, bytes, self.pooled_bytes(what, bytes)?, true, |_| ())
    }

    /// A buffer of exactly these words, outside the pool: for what stays, such as weights.
    pub(crate) fn alloc_exact(&self, what: &str, words: &[u32]) -> Result<Buffer> {
        let bytes = Gpu::exact_bytes(words.len());
        self.check_binding(what, bytes)?;
        self.create(what, bytes, bytes, false, |buffer| {
            // A buffer that could not be created has no mapping; its scope reports the reason.
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
        let home = self.0.buffers.clone();
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
                    return Err(
                        self.error(what, "the device has made 2^32 buffers, and there are no more numbers".into())
                    );
                };
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
                    // The pool's free buffers may be the room that is missing.
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
        Ok(Buffer(Arc::new(BufferInner { raw, id, bytes, size, pooled, home })))
    }

    /// Drops buffers that are gone, and their bind groups, which would keep the memory alive.
    pub(super) fn forget_retired(&self) {
        let retired = std::mem::take(&mut *self.0.buffers.retired.lock().unwrap_or_else(PoisonError::into_inner));
        if !retired.is_empty() {
            let ids: Vec<u32> = retired.iter().map(|(id, _)| *id).collect();
            let groups = self.0.pipelines.forget_buffers(&ids);
            // Not before: who compiles a kernel holds the list of kernels and waits for its turn.
            let _turn = self.turn();
            drop((groups, retired));
        }
    }

    /// Held while wgpu works, where only one thread may use a device at a time: wgpu's GL backend panics when a thread waits
    /// some seconds for another, and a driver may well compile a shader for so long.
    pub(super) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.0.turn.as_ref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A buffer from the pool that holds these bytes (a multiple of 4).
    pub(crate) fn upload(&self, what: &str, data: &[u8]) -> Result<Buffer> {
        let buffer = self.alloc(what, data.len() as u64)?;
        self.write(&buffer, data)?;
        Ok(buffer)
    }

    /// Overwrites the start of a buffer, after everything recorded so far.
    pub(crate) fn write(&self, buffer: &Buffer, data: &[u8]) -> Result<()> {
        // A queue write runs before commands that are only recorded yet, and those may use the buffer's last life.
        self.flush()?;
        self.scoped("writing a buffer", |_| self.0.queue.write_buffer(buffer.raw(), 0, data))
    }

    /// A few zero bytes to bind where a kernel has an operand that this call does not use.
    pub(crate) fn unused(&self) -> Result<&Buffer> {
        if let Some(zeros) = self.0.zeros.get() {
            return Ok(zeros);
        }
        let buffer = self.alloc_exact("unused operand", &[0; 4])?;
        Ok(self.0.zeros.get_or_init(|| buffer))
    }
}

/// The most bytes of a kernel's `Params`; every native backend carries this many as immediate data.
pub(crate) const MAX_PARAMS_BYTES: u32 = 128;

/// How errors, listings and `--device` name an adapter.
pub(super) fn device_name(info: &wgpu::AdapterInfo) -> String {
    format!("{} ({})", info.name.trim(), info.backend)
}

/// An adapter's driver and its version.
pub(super) fn driver_name(info: &wgpu::AdapterInfo) -> String {
    format!("{} {}", info.driver, info.driver_info).trim().to_owned()
}
