//! Memory that a device has for a run.

use super::{Device, Gpu};
use crate::memory;

impl Device {
    /// Bytes available for tensors and matrices. For the CPU device and software drivers, the host
    /// memory that is available now. For a GPU through Vulkan, its largest heap of device memory,
    /// part of which may be in use already. `None` if unknown: through wgpu, Metal, DX12 and GL
    /// don't tell.
    pub fn capacity(&self) -> Option<u64> {
        match self {
            Device::Gpu(gpu) if gpu.info().device_type != wgpu::DeviceType::Cpu => largest_heap(gpu),
            Device::Cpu(_) | Device::Gpu(_) => memory::available(),
        }
    }
}

#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn largest_heap(gpu: &Gpu) -> Option<u64> {
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the device is only queried; nothing of it is destroyed or changed.
    let device = unsafe { gpu.wgpu_device().as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = device.shared_instance().raw_instance();
    // SAFETY: the physical device belongs to this instance, and both live as long as `device`.
    let memory = unsafe { instance.get_physical_device_memory_properties(device.raw_physical_device()) };
    let heaps = memory.memory_heaps.iter().take(memory.memory_heap_count as usize);
    heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
}

#[cfg(not(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
fn largest_heap(_: &Gpu) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn hosts_and_vulkan_adapters_say_what_they_have() {
        const MIB: u64 = 1 << 20;
        let host = Device::cpu().capacity().unwrap();
        assert!((MIB..1 << 50).contains(&host), "{host}");
        for device in testing::gpus() {
            let Device::Gpu(gpu) = &device else { continue };
            let name = testing::name(&device);
            match gpu.info().backend {
                wgpu::Backend::Vulkan => assert!(largest_heap(gpu).unwrap() > MIB, "{name}"),
                _ => assert_eq!(largest_heap(gpu), None, "{name}"),
            }
            if gpu.info().device_type == wgpu::DeviceType::Cpu {
                assert!(device.capacity().unwrap() > MIB, "{name}");
            }
        }
    }
}
