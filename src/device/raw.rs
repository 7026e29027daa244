//! A wgpu device: its limits, and errors as values.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::cooperative::{Cooperative, usable};
use super::tier::Tier;
use crate::error::{Error, Result};

/// A wgpu device with its tier and limits, below the pipelines and the recorder of a
/// [`Gpu`](super::Gpu).
pub(super) struct Raw {
    pub name: String,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub info: wgpu::AdapterInfo,
    pub tier: Tier,
    /// The cooperative matrices of the kernels, or `None` in tiers without.
    pub cooperative: Option<Cooperative>,
    pub limits: GpuLimits,
    fault: Arc<Fault>,
    /// See [`Raw::turn`].
    turn: Option<Mutex<()>>,
}

/// Options for opening a device, passed on from [`GpuOptions`](super::GpuOptions).
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

/// Maximum bytes of a kernel's `Params`. Every native backend supports this much immediate data.
pub(crate) const MAX_PARAMS_BYTES: u32 = 128;

/// Set once the device is lost, or when wgpu has reported an error outside every scope.
#[derive(Default)]
struct Fault {
    lost: OnceLock<String>,
    uncaptured: Mutex<Option<String>>,
}

impl Raw {
    /// Wraps a device that the caller made, and leaves its error and loss handlers alone.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device can't run the tier.
    pub fn wrap(info: wgpu::AdapterInfo, device: wgpu::Device, queue: wgpu::Queue, wrap: &Wrap) -> Result<Raw> {
        let name = device_name(&info);
        let features = usable(device.features(), wrap.cooperative.is_some());
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
        let device_limits = device.limits();
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
        let turn = (info.backend == wgpu::Backend::Gl).then(Mutex::default);
        let (tier, cooperative) = (wrap.tier, wrap.cooperative.filter(|_| wrap.tier.cooperative()));
        Ok(Raw { name, device, queue, info, tier, cooperative, limits, fault: Arc::default(), turn })
    }

    /// Installs handlers for errors and loss.
    pub fn watch(&self) {
        let fault = self.fault.clone();
        self.device.set_device_lost_callback(move |reason, message| {
            let _first_reason_stays = fault.lost.set(match reason {
                wgpu::DeviceLostReason::Destroyed => format!("{message} (destroyed)"),
                wgpu::DeviceLostReason::Unknown => message,
            });
        });
        let fault = self.fault.clone();
        self.device.on_uncaptured_error(Arc::new(move |error| {
            fault.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
        }));
    }

    /// wgpu's messages have several lines.
    pub fn error(&self, op: &str, message: String) -> Error {
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        Error::Device { device: self.name.clone(), op: op.to_owned(), message }
    }

    /// Returns an error if the device is lost or has reported an error since the last check.
    pub fn check(&self) -> Result<()> {
        if let Some(reason) = self.fault.lost.get() {
            return Err(self.lost(reason));
        }
        match self.fault.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(message) => Err(self.error("an earlier operation", message)),
            None => Ok(()),
        }
    }

    fn lost(&self, reason: &str) -> Error {
        Error::DeviceLost { device: self.name.clone(), reason: reason.to_owned() }
    }

    /// Keeps an error for the next caller, too.
    pub fn remember(&self, error: &Error) {
        self.fault.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
    }

    /// Marks the device as lost; every later call reports this.
    fn mark_lost(&self, reason: &str) -> Error {
        self.lost(self.fault.lost.get_or_init(|| reason.to_owned()))
    }

    /// Runs `f` and turns errors that wgpu reports meanwhile into an `Error`.
    pub fn scoped<T>(&self, op: &str, f: impl FnOnce(&wgpu::Device) -> T) -> Result<T> {
        self.scoped_alloc(op, 0, f)
    }

    /// Like [`Raw::scoped`], for an `f` that allocates this many bytes.
    pub fn scoped_alloc<T>(&self, op: &str, bytes: u64, f: impl FnOnce(&wgpu::Device) -> T) -> Result<T> {
        self.check()?;
        let _turn = self.turn();
        let device = &self.device;
        let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let value = f(device);
        // Scopes are a stack, innermost first. Native scopes answer at once.
        let memory = pollster::block_on(memory.pop());
        let internal = pollster::block_on(internal.pop());
        let validation = pollster::block_on(validation.pop());
        match memory.or(internal).or(validation) {
            None => Ok(value),
            Some(wgpu::Error::OutOfMemory { .. }) => {
                Err(Error::OutOfMemory { device: self.name.clone(), what: op.to_owned(), bytes })
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
        let device = &self.device;
        // Runs the loss callback of devices that we opened; the result doesn't matter here.
        let _ = device.poll(wgpu::PollType::Poll);
        self.check()?;
        let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let probe = device.create_buffer(&wgpu::BufferDescriptor {
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

    /// Held while wgpu works on devices that only one thread may use at a time. wgpu's GL backend
    /// panics when a thread waits a few seconds for another, and a driver can take that long to
    /// compile a shader.
    pub fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.as_ref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The name of a GPU in errors, listings and `--device`.
pub(super) fn device_name(info: &wgpu::AdapterInfo) -> String {
    format!("{} ({})", info.name.trim(), info.backend)
}

/// Driver and driver version of a GPU.
pub(super) fn driver_name(info: &wgpu::AdapterInfo) -> String {
    format!("{} {}", info.driver, info.driver_info).trim().to_owned()
}
