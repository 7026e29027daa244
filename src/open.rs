//! How a device is opened: found by [`device`](crate::device), and compared with the CPU by the kernels before it is used.

use crate::device::{Device, GpuOptions, Select, list};
use crate::error::{Error, Result};
use crate::kernels::disagreement;

impl Device {
    /// An adapter, software drivers included. Where `options` names none (`Select::HighPerformance` or
    /// `Select::LowPower`), `QLORA_DEVICE` may: a part of its name, its backend, or its index in [`devices`](crate::device::devices).
    ///
    /// # Errors
    /// [`Error::NoDevice`] if nothing matches, with what was found; [`Error::Unsupported`] if the adapter cannot run
    /// the tier asked for.
    pub fn gpu(options: &GpuOptions) -> Result<Device> {
        list::open(options, disagreement).map(Device::Gpu)
    }

    /// A hardware GPU if there is one, else the CPU: software drivers are slower than the CPU device.
    /// `QLORA_DEVICE` (`cpu`, `gpu`, a part of a name, or an index in [`devices`](crate::device::devices)) overrides.
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

    /// The device that a command-line word means: `cpu`, `gpu` (any adapter), `best`, an index in [`devices`](crate::device::devices), or a
    /// part of an adapter's name or backend.
    pub fn named(name: &str) -> Result<Device> {
        match name.to_ascii_lowercase().as_str() {
            "cpu" | "0" => Ok(Device::chosen_cpu()),
            "best" => Device::best(),
            // Said in so many words: QLORA_DEVICE does not count.
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

    /// Shares a device that the caller made. Its error and loss handlers stay the caller's; features that it was
    /// opened with decide the tier, unless `options` or `QLORA_TIER` forces one; for `cooperative-matrix` they must include
    /// `EXPERIMENTAL_COOPERATIVE_MATRIX`. `options.select` is not used.
    pub fn from_wgpu(
        adapter: &wgpu::Adapter,
        device: wgpu::Device,
        queue: wgpu::Queue,
        options: &GpuOptions,
    ) -> Result<Device> {
        list::wrap(adapter, &device, &queue, options, disagreement).map(Device::Gpu)
    }
}
