//! The device from a library user's view: sharing one's own device, errors as values, the pool's
//! counters, recording.

mod common;

use qlora_wgpu::device::{Device, Gpu, GpuOptions, Select, Tier, devices};
use qlora_wgpu::nn::{LoraAdapter, LoraConfig, QLoraLinear};
use qlora_wgpu::ops::add;
use qlora_wgpu::ops::silu_mul;
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::{Error, Tensor, wgpu};

fn gpu_of(device: &Device) -> &Gpu {
    match device {
        Device::Gpu(gpu) => gpu,
        Device::Cpu(_) => panic!("a GPU was asked for"),
    }
}

/// A device that the caller opened without any features, with its wgpu adapter.
fn callers_own() -> (wgpu::Adapter, wgpu::Device, wgpu::Queue) {
    let wanted = common::adapters().swap_remove(0).name;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.retain(|adapter| wanted.starts_with(adapter.get_info().name.trim()));
    let adapter = adapters.swap_remove(0);
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap();
    (adapter, device, queue)
}

fn layer(device: &Device, d_out: usize, d_in: usize) -> QLoraLinear {
    let weight = ndarray::Array2::from_shape_fn((d_out, d_in), |(i, j)| ((i * 7 + j * 3) % 11) as f32 / 11.0 - 0.5);
    let adapter = LoraAdapter::new(device, d_out, d_in, &LoraConfig::new(4, 8.0)).unwrap();
    let quant = QuantOptions::nf4().double_quant();
    QLoraLinear::quantize(device, weight.view(), &quant).unwrap().with_adapter("default", adapter).unwrap()
}

#[test]
fn a_callers_own_device_computes_as_ours() {
    if !common::wants_gpus() {
        return;
    }
    let (adapter, raw, queue) = callers_own();
    let device = Device::from_wgpu(&adapter, raw, queue, &GpuOptions::default()).unwrap();
    let x = ndarray::Array2::from_shape_fn((5, 64), |(i, j)| (i as f32 - 2.0) * (j as f32 - 30.0) / 64.0);
    let ours = layer(&Device::cpu(), 48, 64).forward_array(x.view()).unwrap();
    let theirs = layer(&device, 48, 64).forward_array(x.view()).unwrap();
    approx::assert_abs_diff_eq!(ours.as_slice().unwrap(), theirs.as_slice().unwrap(), epsilon = 1e-4);
}

#[test]
fn threads_share_a_device() {
    for device in common::gpus_with(|_| {}) {
        let layer = layer(&device, 48, 64);
        let x = Tensor::from_slice(&device, &[3, 64], &[0.5; 192]).unwrap();
        let wanted = layer.forward(&x).unwrap().to_vec().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        assert_eq!(layer.forward(&x).unwrap().to_vec().unwrap(), wanted, "{}", device.name());
                    }
                });
            }
        });
    }
}

#[test]
fn a_callers_device_with_default_limits_runs_every_tier_of_its_features() {
    if !common::wants_gpus() {
        return;
    }
    for info in common::adapters() {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
        let named = |adapter: &&wgpu::Adapter| {
            let found = adapter.get_info();
            info.name == format!("{} ({})", found.name.trim(), found.backend)
        };
        let adapter = adapters.iter().find(named).unwrap();
        // The limits that every WebGPU device has: 16 KiB of workgroup memory, eight storage
        // buffers.
        let descriptor = wgpu::DeviceDescriptor {
            required_features: adapter.features()
                & (wgpu::Features::SUBGROUP
                    | wgpu::Features::SHADER_F16
                    | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
            // SAFETY: cooperative matrices are the only experimental feature requested, and only
            // the crate's kernels use them.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            ..Default::default()
        };
        let (raw, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
        for tier in &info.tiers {
            let options = GpuOptions { tier: Some(tier.parse().unwrap()), ..GpuOptions::default() };
            let device = Device::from_wgpu(adapter, raw.clone(), queue.clone(), &options).unwrap();
            let layer = layer(&device, 48, 64);
            for m in [1, 20] {
                layer.forward(&Tensor::zeros(&device, &[m, 64]).unwrap()).unwrap().to_vec().unwrap();
            }
        }
    }
}

#[test]
fn a_lost_device_is_an_error_now_and_later() {
    if !common::wants_gpus() {
        return;
    }
    let (adapter, raw, queue) = callers_own();
    let shared = Device::from_wgpu(&adapter, raw.clone(), queue, &GpuOptions::default()).unwrap();
    raw.destroy();
    for device in [shared].into_iter().chain(common::gpus_with(|_| {}).into_iter().inspect(|device| {
        gpu_of(device).wgpu_device().destroy();
    })) {
        for attempt in 0..3 {
            let error = Tensor::from_slice(&device, &[4], &[1.0; 4]).and_then(|tensor| tensor.to_vec()).unwrap_err();
            assert!(matches!(error, Error::DeviceLost { .. }), "{} attempt {attempt}: {error:?}", device.name());
            assert!(error.to_string().contains(device.name()), "{error}");
        }
    }
}

#[test]
fn a_layer_whose_device_is_lost_says_so() {
    for device in common::gpus_with(|_| {}) {
        let layer = layer(&device, 48, 64);
        let x = Tensor::zeros(&device, &[3, 64]).unwrap();
        layer.forward(&x).unwrap().to_vec().unwrap();
        gpu_of(&device).wgpu_device().destroy();
        let error = layer.forward(&x).and_then(|y| y.to_vec()).unwrap_err();
        assert!(matches!(error, Error::DeviceLost { .. }), "{error:?}");
        let error = layer.forward(&x).and_then(|y| y.to_vec()).unwrap_err();
        assert!(matches!(error, Error::DeviceLost { .. }), "{error:?}");
    }
}

#[test]
fn out_of_memory_is_an_error_and_the_device_stays_usable() {
    for device in common::gpus_with(|options| options.memory_limit = Some(1 << 20)) {
        let kept = Tensor::from_slice(&device, &[1000], &[2.0; 1000]).unwrap();
        let error = Tensor::zeros(&device, &[300_000]).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { bytes, .. } if bytes >= 1_200_000), "{error:?}");
        assert_eq!(kept.to_vec().unwrap(), [2.0; 1000]);
        // Freed memory can be reused for another size.
        for values in [200_000, 150_000, 220_000] {
            Tensor::zeros(&device, &[values]).unwrap();
        }
    }
}

#[test]
fn a_tensor_over_the_binding_limit_is_an_error_with_the_limit() {
    for device in common::gpus_with(|options| options.max_binding_bytes = Some(4096)) {
        let error = Tensor::zeros(&device, &[1025]).unwrap_err();
        assert!(matches!(error, Error::TooLarge { bytes: 4100, limit: 4096, .. }), "{error:?}");
        Tensor::zeros(&device, &[1024]).unwrap();
    }
}

#[test]
fn forward_passes_reuse_buffers_pipelines_and_return_to_the_same_level() {
    for device in common::gpus_with(|_| {}).into_iter().chain([Device::cpu()]) {
        let layer = layer(&device, 96, 128);
        let x = Tensor::zeros(&device, &[3, 128]).unwrap();
        layer.forward(&x).unwrap().to_vec().unwrap();
        let before = device.memory();
        let pipelines = if let Device::Gpu(gpu) = &device { gpu.pipeline_count() } else { 0 };
        device.reset_peak();
        for _ in 0..300 {
            layer.forward(&x).unwrap();
        }
        device.wait().unwrap();
        let after = device.memory();
        assert_eq!(after.allocations, before.allocations, "{}: every buffer was reused", device.name());
        assert_eq!(after.live_bytes, before.live_bytes, "{}", device.name());
        assert!(after.reuses >= before.reuses + 600, "{}: h and y of each pass", device.name());
        let transient = after.peak_bytes - before.live_bytes;
        assert!((96 * 3 * 4..8192).contains(&transient), "{}: one h and one y at a time: {transient}", device.name());
        if let Device::Gpu(gpu) = &device {
            assert_eq!(gpu.pipeline_count(), pipelines);
            gpu.trim();
            assert_eq!(device.memory().pooled_bytes, 0);
        }
        drop((layer, x));
        assert_eq!(device.memory().live_bytes, if matches!(device, Device::Gpu(_)) { 16 } else { 0 }, "all given back");
    }
}

#[test]
fn a_pass_unlike_the_one_before_binds_its_own_buffers() {
    let tensor = |device: &Device, seed: usize| {
        let values: Vec<f32> = (0..64).map(|i| ((i + seed) as f32 * 0.37).sin()).collect();
        Tensor::from_slice(device, &[64], &values).unwrap()
    };
    // Each list is a pass with one read at its end: the same kernels with other tensors, in
    // another order, fewer and more.
    let passes = [[0, 1, 2].as_slice(), &[0, 1, 2], &[1, 0, 2], &[2], &[2, 1], &[0, 1, 2, 1, 0], &[0, 1, 2, 1, 0]];
    let run = |device: &Device| {
        let all: Vec<Tensor> = (0..4).map(|seed| tensor(device, seed)).collect();
        let mut results = Vec::new();
        for (index, pass) in passes.iter().enumerate() {
            let mut sum = all[index % 3].clone();
            for &op in *pass {
                sum = match op {
                    0 => add(&sum, &all[3]).unwrap(),
                    1 => silu_mul(&sum, &all[index % 2]).unwrap(),
                    _ => add(&all[2], &sum).unwrap(),
                };
            }
            results.extend(sum.to_vec().unwrap());
            if let (Device::Gpu(gpu), 4) = (device, index) {
                // Drops every pooled buffer and its bind groups.
                gpu.trim();
            }
        }
        results
    };
    let wanted = run(&Device::cpu());
    for device in common::gpus_with(|_| {}) {
        for (got, wanted) in run(&device).iter().zip(&wanted) {
            assert!((got - wanted).abs() <= 1e-5 * wanted.abs().max(1.0), "{}: {got} {wanted}", device.name());
        }
    }
}

#[test]
fn results_are_the_same_bytes_every_time() {
    for device in common::gpus_with(|_| {}).into_iter().chain([Device::cpu()]) {
        for m in [1, 40] {
            let layer = layer(&device, 96, 128);
            let x: Vec<f32> = (0..m * 128).map(|i| (i as f32 * 0.37).sin()).collect();
            let x = Tensor::from_slice(&device, &[m, 128], &x).unwrap();
            let first = layer.forward(&x).unwrap().to_vec().unwrap();
            for _ in 0..5 {
                let again = layer.forward(&x).unwrap().to_vec().unwrap();
                assert!(first.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "{} M={m}", device.name());
            }
        }
    }
}

#[test]
fn devices_are_listed_and_found_by_index_and_name() {
    let found = devices();
    assert_eq!((found[0].index, found[0].name.as_str(), found[0].kind), (0, "cpu", "cpu"));
    assert!(matches!(Device::named("cpu").unwrap(), Device::Cpu(_)));
    assert!(matches!(Device::named("0").unwrap(), Device::Cpu(_)));
    for info in common::adapters() {
        for word in [info.index.to_string(), info.name.to_uppercase(), info.backend.clone()] {
            let device = Device::named(&word).unwrap();
            assert_eq!(gpu_of(&device).tier().to_string(), info.tier, "{word}");
            if word != info.backend {
                assert_eq!(device.name(), info.name, "{word}");
            }
        }
    }
    let error = Device::named("no such adapter").unwrap_err();
    assert!(matches!(&error, Error::NoDevice { hint, .. } if hint.contains("mesa-vulkan-drivers")), "{error}");
    assert!(error.to_string().contains("no such adapter"), "{error}");
    assert!(matches!(Device::named("77").unwrap_err(), Error::NoDevice { .. }));
}

#[test]
fn a_tier_that_the_device_cannot_run_is_an_error() {
    if !common::wants_gpus() {
        return;
    }
    // Opened without features: only the tiers that need none.
    let (adapter, raw, queue) = callers_own();
    let options = |tier| GpuOptions { tier: Some(tier), ..GpuOptions::default() };
    for tier in [Tier::SubgroupF16, Tier::CooperativeMatrix] {
        let error = Device::from_wgpu(&adapter, raw.clone(), queue.clone(), &options(tier)).unwrap_err().to_string();
        assert!(error.contains(&tier.to_string()) && error.contains("plain"), "{error}");
    }
    Device::from_wgpu(&adapter, raw, queue, &options(Tier::Plain)).unwrap();
    // Every GPU opens in exactly the tiers that it is listed with.
    for info in common::adapters() {
        for tier in Tier::ALL {
            let options = GpuOptions { select: Select::Index(info.index), ..options(tier) };
            let opened = Device::gpu(&options);
            assert_eq!(opened.is_ok(), info.tiers.contains(&tier.to_string()), "{} {tier}: {opened:?}", info.name);
        }
    }
}

#[test]
fn tensors_of_two_devices_do_not_meet() {
    for device in common::gpus_with(|_| {}) {
        let layer = layer(&device, 48, 64);
        let error = layer.forward(&Tensor::zeros(&Device::cpu(), &[1, 64]).unwrap()).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { .. }), "{error:?}");
        let other =
            Device::gpu(&GpuOptions { select: Select::Name(device.name().into()), ..GpuOptions::default() }).unwrap();
        let error = layer.forward(&Tensor::zeros(&other, &[1, 64]).unwrap()).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { .. }), "{error:?}");
    }
}

#[test]
fn short_work_is_one_submission() {
    for device in common::gpus_with(|_| {}) {
        let gpu = gpu_of(&device);
        let layer = layer(&device, 48, 64);
        let x = Tensor::from_slice(&device, &[1, 64], &[0.5; 64]).unwrap();
        layer.forward(&x).unwrap().to_vec().unwrap();
        let before = gpu.submissions();
        // Each takes at least two dispatches.
        let all: Vec<Tensor> = (0..500).map(|_| layer.forward(&x).unwrap()).collect();
        let last = all[499].to_vec().unwrap();
        assert_eq!(gpu.submissions() - before, 1, "{}", device.name());
        assert_eq!(all[0].to_vec().unwrap(), last);
    }
}
