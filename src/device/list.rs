//! Device enumeration and selection.

use serde::Serialize;

use super::Device;
use super::cooperative::{Cooperative, usable};
use super::gl;
use super::gpu::Gpu;
use super::options::{GpuOptions, Select};
use super::raw::{device_name, driver_name};
use super::settle::{Ability, Check, Wanted, settle};
use super::tier::Tier;
use super::variables::{check_variables, tier_variable};
use crate::error::{Error, Result};

/// A device listed by [`devices`].
#[derive(Clone, Debug, Serialize)]
pub struct DeviceInfo {
    /// Place in the list; `--device` and `QLORA_DEVICE` accept it.
    pub index: usize,
    /// Name and backend, for example `llvmpipe (LLVM 15.0.6, 256 bits) (vulkan)`.
    pub name: String,
    /// `cpu`, `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// wgpu's backend; `none` for the CPU device.
    pub backend: String,
    /// Driver and its version.
    pub driver: String,
    /// Default tier, used if its results agree with the CPU's; empty for the CPU device.
    pub tier: String,
    /// Every tier that the device can run.
    pub tiers: Vec<String>,
    /// Maximum bytes of one binding; 0 for the CPU device, which has no such limit.
    pub max_binding_bytes: u64,
    /// Smallest and largest subgroup size; 0 for the CPU device.
    pub subgroup_sizes: [u32; 2],
    /// Whether it supports cooperative matrices of any shape. If their shapes are the tier's, it
    /// can run `cooperative-matrix`.
    pub cooperative_matrix: bool,
}

/// Lists every device: the CPU first, then the GPUs of every backend in wgpu's order.
pub fn devices() -> Vec<DeviceInfo> {
    let cpu = DeviceInfo {
        index: 0,
        name: "cpu".into(),
        kind: "cpu",
        backend: "none".into(),
        driver: Device::cpu().driver(),
        tier: String::new(),
        tiers: Vec::new(),
        max_binding_bytes: 0,
        subgroup_sizes: [0; 2],
        cooperative_matrix: false,
    };
    let adapters = adapters();
    let found = (1..).zip(&adapters).map(|(index, adapter)| describe(index, adapter));
    std::iter::once(cpu).chain(found).collect()
}

fn describe(index: usize, adapter: &wgpu::Adapter) -> DeviceInfo {
    let info = adapter.get_info();
    let features = adapter.features();
    let runnable = usable(features, !Cooperative::candidates(adapter).is_empty());
    DeviceInfo {
        index,
        name: device_name(&info),
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        },
        backend: info.backend.to_string(),
        driver: driver_name(&info),
        tier: Tier::best(info.device_type, runnable).to_string(),
        tiers: Tier::runnable(runnable).map(|tier| tier.to_string()).collect(),
        max_binding_bytes: adapter.limits().max_storage_buffer_binding_size,
        subgroup_sizes: [info.subgroup_min_size, info.subgroup_max_size],
        cooperative_matrix: features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
    }
}

/// GPUs that can run compute shaders.
pub(super) fn adapters() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    // We don't use indirect dispatches; validating them would only cost memory and limit buffer
    // sizes.
    descriptor.flags.remove(wgpu::InstanceFlags::VALIDATION_INDIRECT_CALL);
    // Requests for memory that isn't available should fail with an error instead of crashing the
    // driver.
    descriptor.memory_budget_thresholds =
        wgpu::MemoryBudgetThresholds { for_resource_creation: Some(95), for_device_loss: None };
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.retain(computes);
    adapters
}

/// Whether a GPU can run compute shaders.
fn computes(adapter: &wgpu::Adapter) -> bool {
    if !adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS) {
        return false;
    }
    let info = adapter.get_info();
    // With OpenGL, wgpu knows only the version of the driver.
    let why = if info.backend == wgpu::Backend::Gl { gl::too_old(&info.driver_info) } else { None };
    if let Some(why) = &why {
        tracing::debug!("{} is ignored: {why}", device_name(&info));
    }
    why.is_none()
}

/// Opens the fastest hardware GPU by type, or returns `None` if there is only software.
pub(crate) fn hardware(check: Check) -> Result<Option<Gpu>> {
    let adapter = ranked(adapters(), false).into_iter().next();
    match adapter.filter(|adapter| adapter.get_info().device_type != wgpu::DeviceType::Cpu) {
        Some(adapter) => open_adapter(&adapter, &GpuOptions::default(), check).map(Some),
        None => Ok(None),
    }
}

/// Opens the GPU that the options and the environment select.
pub(crate) fn open(options: &GpuOptions, check: Check) -> Result<Gpu> {
    match (&options.select, std::env::var("QLORA_DEVICE")) {
        (Select::HighPerformance | Select::LowPower, Ok(name)) if !["", "gpu", "best"].contains(&name.as_str()) => {
            open_selected(options, name.parse().map_or(Select::Name(name), Select::Index), check)
        }
        (select, _) => open_selected(options, select.clone(), check),
    }
}

/// Opens the GPU that `wanted` selects, regardless of the environment.
pub(crate) fn open_selected(options: &GpuOptions, wanted: Select, check: Check) -> Result<Gpu> {
    let found = adapters();
    let names: Vec<String> = found.iter().map(|adapter| device_name(&adapter.get_info())).collect();
    let is_hardware = found.iter().any(|adapter| adapter.get_info().device_type != wgpu::DeviceType::Cpu);
    let chosen = match &wanted {
        Select::HighPerformance => ranked(found, false).into_iter().next(),
        Select::LowPower => ranked(found, true).into_iter().next(),
        Select::Index(index) => index.checked_sub(1).and_then(|at| found.into_iter().nth(at)),
        Select::Name(part) => {
            let part = part.to_lowercase();
            let is_meant = |name: &str| !part.is_empty() && name.to_lowercase().contains(&part);
            let mut matching = (names.iter().zip(found)).filter(|(name, _)| is_meant(name));
            matching.next().map(|(_, adapter)| adapter)
        }
    };
    let adapter = chosen.ok_or_else(|| no_device(&wanted, &names, is_hardware))?;
    open_adapter(&adapter, options, check)
}

/// The error for a GPU that isn't found. It lists `names`, in the order of [`devices`].
fn no_device(wanted: &Select, names: &[String], is_hardware: bool) -> Error {
    let found: Vec<String> = (1..).zip(names).map(|(index, name)| format!("{index} {name}")).collect();
    let mut hints = Vec::new();
    if let Some(nearest) = nearest(wanted, names) {
        hints.push(format!("Did you mean {nearest}?"));
    }
    if matches!(wanted, Select::Index(_) | Select::Name(_)) {
        hints.push("A device is cpu, gpu, best, an index of `qlora devices` or a part of a name.".into());
    }
    if !is_hardware {
        hints.push(NO_DEVICE_HINT.into());
    }
    Error::NoDevice {
        wanted: match wanted {
            Select::HighPerformance | Select::LowPower => "any GPU".into(),
            Select::Index(index) => format!("index {index}"),
            Select::Name(name) => format!("{name:?}"),
        },
        found: if found.is_empty() { "none but the CPU".into() } else { format!("0 cpu, {}", found.join(", ")) },
        hint: hints.join(" "),
    }
}

/// Returns the device word, or the word of a name, that was most likely meant.
fn nearest(wanted: &Select, names: &[String]) -> Option<String> {
    let Select::Name(wanted) = wanted else { return None };
    let wanted = wanted.to_lowercase();
    let words = names.iter().flat_map(|name| name.split(|c: char| !c.is_alphanumeric())).filter(|word| word.len() > 2);
    let words = ["cpu", "gpu", "best"].into_iter().chain(words).map(str::to_lowercase);
    let likeness = |word: &String| strsim::normalized_damerau_levenshtein(&wanted, word);
    words.filter(|word| likeness(word) > 0.6).max_by(|one, other| likeness(one).total_cmp(&likeness(other)))
}

/// Advice if there is no hardware GPU.
const NO_DEVICE_HINT: &str = "Install a Vulkan driver for the GPU, or Mesa's software driver: \
    `apt install libvulkan1 mesa-vulkan-drivers` (Debian, Ubuntu), `dnf install mesa-vulkan-drivers` (Fedora), \
    `pacman -S vulkan-swrast` (Arch). macOS and Windows include Metal and DX12. The CPU device needs no driver: `--device cpu`";

/// Sorts best first: by type, then in wgpu's order, which puts Vulkan, Metal and DX12 before GL.
fn ranked(mut adapters: Vec<wgpu::Adapter>, low_power: bool) -> Vec<wgpu::Adapter> {
    adapters.sort_by_key(|adapter| {
        let info = adapter.get_info();
        let kind = match info.device_type {
            wgpu::DeviceType::DiscreteGpu => u8::from(low_power),
            wgpu::DeviceType::IntegratedGpu => u8::from(!low_power),
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        (kind, info.backend == wgpu::Backend::Gl)
    });
    adapters
}

fn open_adapter(adapter: &wgpu::Adapter, options: &GpuOptions, check: Check) -> Result<Gpu> {
    check_variables()?;
    let info = adapter.get_info();
    let ability = ability(adapter, adapter.features());
    let wanted = wanted(options, &info, &ability)?;
    settle(&info, &ability, wanted, options, check, |wrap| pollster::block_on(Gpu::open(adapter, wrap)))
}

/// Wraps the caller's device.
pub(crate) fn wrap(
    adapter: &wgpu::Adapter,
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    options: &GpuOptions,
    check: Check,
) -> Result<Gpu> {
    let info = adapter.get_info();
    let ability = ability(adapter, device.features());
    let wanted = wanted(options, &info, &ability)?;
    let open = |wrap| Gpu::wrap(info.clone(), device.clone(), queue.clone(), wrap);
    settle(&info, &ability, wanted, options, check, open)
}

fn ability(adapter: &wgpu::Adapter, features: wgpu::Features) -> Ability {
    let cooperative = Cooperative::candidates(adapter);
    Ability {
        features: usable(features, !cooperative.is_empty()),
        cooperative,
        trusted: adapter.get_info().device_type == wgpu::DeviceType::Cpu,
    }
}

fn wanted(options: &GpuOptions, info: &wgpu::AdapterInfo, ability: &Ability) -> Result<Wanted> {
    let asked = options.tier.map_or_else(tier_variable, |tier| Ok(Some(tier)))?;
    let tier = asked.unwrap_or_else(|| Tier::best(info.device_type, ability.features));
    Ok(Wanted { tier, forced: asked.is_some() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mistyped_is_answered_with_what_there_is() {
        let names = ["Radeon RX 7600 (vulkan)".to_owned(), "llvmpipe (LLVM 15) (gl)".into()];
        for (wanted, nearest) in [("gpuu", "gpu"), ("CUP", "cpu"), ("radoen", "radeon"), ("vulcan", "vulkan")] {
            let error = no_device(&Select::Name(wanted.into()), &names, true).to_string();
            assert!(error.contains(&format!("Did you mean {nearest}?")), "{error}");
            assert!(error.contains("0 cpu, 1 Radeon RX 7600 (vulkan), 2 llvmpipe"), "{error}");
            assert!(error.contains("an index of `qlora devices`") && !error.contains("Install"), "{error}");
        }
        let error = no_device(&Select::Name("nothing".into()), &[], false).to_string();
        assert!(!error.contains("Did you mean") && error.contains("Install a Vulkan driver"), "{error}");
        let error = no_device(&Select::Index(7), &names, true).to_string();
        assert_eq!(
            error,
            "no device matches index 7; found: 0 cpu, 1 Radeon RX 7600 (vulkan), 2 llvmpipe (LLVM 15) (gl). A \
             device is cpu, gpu, best, an index of `qlora devices` or a part of a name."
        );
    }
}
