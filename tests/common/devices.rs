//! Devices for unit and integration tests; see `QLORA_TEST_DEVICES` in CONTRIBUTING.md.

use std::sync::LazyLock;

use qlora_wgpu::device::{Device, DeviceInfo, GpuOptions, Select, Tier, devices as list};

/// The CPU, and every GPU in every tier that it can run, or only in `QLORA_TIER`'s. Opened once for
/// each test program, so that tests share compiled kernels.
///
/// # Panics
/// If no GPU is found, or one can't run `QLORA_TIER`'s tier, unless `QLORA_TEST_DEVICES=cpu` says
/// that none is wanted. A test that silently runs on less than it should proves nothing.
pub fn devices() -> Vec<Device> {
    static DEVICES: LazyLock<Vec<Device>> =
        LazyLock::new(|| std::iter::once(Device::cpu()).chain(open_gpus()).collect());
    DEVICES.clone()
}

/// The GPUs among [`devices`].
pub fn gpus() -> Vec<Device> {
    devices().into_iter().filter(|device| matches!(device, Device::Gpu(_))).collect()
}

/// Opens every GPU once more, in its default tier, with changed options: for tests that need
/// counters or limits of their own.
///
/// # Panics
/// If there are none, or one doesn't open.
pub fn gpus_with(change: impl Fn(&mut GpuOptions)) -> Vec<Device> {
    adapters().iter().map(|info| open(info, &change)).collect()
}

/// The GPUs that `QLORA_TEST_DEVICES` selects.
///
/// # Panics
/// If there are none.
pub fn adapters() -> Vec<DeviceInfo> {
    if !wants_gpus() {
        return Vec::new();
    }
    let (mut found, wanted) = (list(), wanted());
    found.retain(|info| info.index > 0 && info.name.to_lowercase().contains(&wanted));
    assert!(
        !found.is_empty(),
        "no GPU matches QLORA_TEST_DEVICES={wanted:?}: install a Vulkan driver (`make setup` installs Mesa's software \
         driver on Debian and Ubuntu), or set QLORA_TEST_DEVICES=cpu to leave GPU tests out"
    );
    found
}

/// False only if `QLORA_TEST_DEVICES=cpu` excludes GPU tests.
pub fn wants_gpus() -> bool {
    wanted() != "cpu"
}

fn wanted() -> String {
    std::env::var("QLORA_TEST_DEVICES").unwrap_or_default().to_lowercase()
}

/// Opens the GPUs among [`devices`] once more, for tests that need counters of their own.
///
/// # Panics
/// Like [`devices`].
pub fn open_gpus() -> Vec<Device> {
    let only = std::env::var("QLORA_TIER").ok().filter(|tier| !tier.is_empty());
    let tiers = |info: &DeviceInfo| only.clone().map_or_else(|| info.tiers.clone(), |tier| vec![tier]);
    let in_tiers = |info: &DeviceInfo| {
        let tiers = tiers(info).into_iter().map(|tier| tier.parse::<Tier>().unwrap());
        tiers.map(|tier| open(info, |options| options.tier = Some(tier))).collect::<Vec<_>>()
    };
    adapters().iter().flat_map(in_tiers).collect()
}

fn open(info: &DeviceInfo, change: impl Fn(&mut GpuOptions)) -> Device {
    let mut options = GpuOptions { select: Select::Index(info.index), ..GpuOptions::default() };
    change(&mut options);
    Device::gpu(&options).unwrap_or_else(|error| panic!("{} tier {:?}: {error}", info.name, options.tier))
}

/// Whether operands are staged as f16, so that results carry f16 rounding; false for the CPU.
pub fn is_f16(device: &Device) -> bool {
    matches!(device, Device::Gpu(gpu) if gpu.tier().f16())
}

/// Device and tier, for messages.
pub fn name(device: &Device) -> String {
    match device {
        Device::Cpu(_) => "cpu".into(),
        Device::Gpu(gpu) => format!("{} tier {}", device.name(), gpu.tier()),
    }
}
