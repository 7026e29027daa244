//! Devices for integration tests; see `QLORA_TEST_DEVICES` in CONTRIBUTING.md.

#![allow(dead_code, reason = "every test program uses its own part of this")]

pub mod model;
pub mod run;
pub mod seed;

use std::sync::LazyLock;

use qlora_wgpu::device::{Device, DeviceInfo, GpuOptions, Select, devices};

fn wanted() -> String {
    std::env::var("QLORA_TEST_DEVICES").unwrap_or_default().to_lowercase()
}

/// False only if `QLORA_TEST_DEVICES=cpu` excludes GPU tests.
pub fn wants_gpus() -> bool {
    wanted() != "cpu"
}

/// The GPUs that QLORA_TEST_DEVICES selects.
///
/// # Panics
/// If there are none.
pub fn adapters() -> Vec<DeviceInfo> {
    if !wants_gpus() {
        return Vec::new();
    }
    let mut found = devices();
    found.retain(|info| info.index > 0 && info.name.to_lowercase().contains(&wanted()));
    assert!(
        !found.is_empty(),
        "no adapter matches QLORA_TEST_DEVICES={:?}: install a Vulkan driver (`make setup` installs Mesa's software driver \
         on Debian and Ubuntu), or set QLORA_TEST_DEVICES=cpu to leave GPU tests out",
        wanted()
    );
    found
}

/// Every GPU once, opened with changed options.
pub fn gpus_with(change: impl Fn(&mut GpuOptions)) -> Vec<Device> {
    let open = |info: &DeviceInfo| {
        let mut options = GpuOptions { select: Select::Index(info.index), ..GpuOptions::default() };
        change(&mut options);
        Device::gpu(&options).unwrap_or_else(|error| panic!("{}: {error}", info.name))
    };
    adapters().iter().map(open).collect()
}

/// The CPU, and every GPU in every tier that it can run, or in the tier of `QLORA_TIER`. Opened
/// once, so that tests share compiled kernels.
pub fn all() -> Vec<Device> {
    static DEVICES: LazyLock<Vec<Device>> = LazyLock::new(open_all);
    DEVICES.clone()
}

fn open_all() -> Vec<Device> {
    let mut found = vec![Device::cpu()];
    for info in adapters() {
        let only = std::env::var("QLORA_TIER").ok().filter(|tier| !tier.is_empty());
        for tier in only.map_or_else(|| info.tiers.clone(), |tier| vec![tier]) {
            let tier = Some(tier.parse().unwrap());
            let options = GpuOptions { select: Select::Index(info.index), tier, ..GpuOptions::default() };
            found.push(Device::gpu(&options).unwrap_or_else(|error| panic!("{}: {error}", info.name)));
        }
    }
    found
}

/// Device and tier, for messages.
pub fn name(device: &Device) -> String {
    match device {
        Device::Cpu(_) => "cpu".into(),
        Device::Gpu(gpu) => format!("{} tier {}", gpu.name(), gpu.tier()),
    }
}

/// Whether operands are staged as f16, so that results carry f16 rounding.
pub fn is_f16(device: &Device) -> bool {
    matches!(device, Device::Gpu(gpu) if gpu.tier().f16())
}
