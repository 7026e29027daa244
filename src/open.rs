//! Opening devices. [`device`](crate::device) finds them; the kernels compare each with the CPU
//! before it is used.

use crate::device::{Device, GpuOptions, Select, list};
use crate::error::{Error, Result};
use crate::kernels::disagreement;

impl Device {
    /// Opens a GPU or a software driver. If `options` doesn't name one (`Select::HighPerformance`
    /// or `Select::LowPower`), `QLORA_DEVICE` may: part of a name, a backend, or an index in
    /// [`devices`](crate::device::devices).
    ///
    /// # Errors
    /// [`Error::NoDevice`] if nothing matches; it lists the devices found. [`Error::Unsupported`]
    /// if the GPU can't run the requested tier.
    pub fn gpu(options: &GpuOptions) -> Result<Device> {
        list::open(options, disagreement).map(Device::Gpu)
    }

    /// Opens a hardware GPU if there is one, otherwise the CPU: software drivers are slower than
    /// the CPU device. `QLORA_DEVICE` overrides the choice: `cpu`, `gpu`, part of a name, or an
    /// index in [`devices`](crate::device::devices).
    pub fn best() -> Result<Device> {
        match std::env::var("QLORA_DEVICE") {
            Ok(name) if !name.is_empty() && name != "best" => Device::named(&name).map_err(|error| match error {
                Error::NoDevice { wanted, found, hint } => {
                    Error::NoDevice { wanted: format!("QLORA_DEVICE={wanted}"), found, hint }
                }
                error => error,
            }),
            _ => match list::hardware(disagreement)? {
                Some(gpu) => Ok(Device::Gpu(gpu)),
                None => Ok(Device::chosen_cpu()),
            },
        }
    }

    /// Opens the device for a command-line word: `cpu`, `gpu` (any GPU driver), `best`, an index
    /// in [`devices`](crate::device::devices), or part of a name or backend.
    pub fn named(name: &str) -> Result<Device> {
        match name.to_ascii_lowercase().as_str() {
            "cpu" | "0" => Ok(Device::chosen_cpu()),
            "best" => Device::best(),
            // An explicit `gpu` overrides QLORA_DEVICE.
            "gpu" => {
                list::open_selected(&GpuOptions::default(), Select::HighPerformance, disagreement).map(Device::Gpu)
            }
            _ => {
                let select = name.parse().map_or_else(|_| Select::Name(name.to_owned()), Select::Index);
                Device::gpu(&GpuOptions { select, ..GpuOptions::default() })
            }
        }
    }

    fn chosen_cpu() -> Device {
        tracing::info!(threads = rayon::current_num_threads(), "device: cpu");
        Device::cpu()
    }

    /// Shares a device that the caller made. The caller keeps its error and loss handlers. The
    /// tier follows from the features that the device was opened with, unless `options` or
    /// `QLORA_TIER` forces one. The tier `cooperative-matrix` needs
    /// `EXPERIMENTAL_COOPERATIVE_MATRIX` among them. `options.select` is ignored.
    pub fn from_wgpu(
        adapter: &wgpu::Adapter,
        device: wgpu::Device,
        queue: wgpu::Queue,
        options: &GpuOptions,
    ) -> Result<Device> {
        list::wrap(adapter, &device, &queue, options, disagreement).map(Device::Gpu)
    }
}
