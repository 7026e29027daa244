//! A program with its own wgpu device: the layer runs on it, beside whatever else the program does
//! there.
//!
//! `cargo run --example own_device`

use ndarray::Array2;
use qlora_wgpu::nn::{LoraAdapter, LoraConfig, QLoraLinear};
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::{Device, GpuOptions, Tensor, wgpu};

const D_OUT: usize = 96;
const D_IN: usize = 256;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The program's own device.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let descriptor = wgpu::DeviceDescriptor {
        // Kernels use these features if available, but also work without them.
        required_features: adapter.features() & (wgpu::Features::SUBGROUP | wgpu::Features::SHADER_F16),
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;

    let shared = Device::from_wgpu(&adapter, device.clone(), queue.clone(), &GpuOptions::default())?;
    let x = Array2::from_shape_fn((8, D_IN), |(i, j)| ((i * 5 + j * 3) % 17) as f32 / 17.0 - 0.5);
    let y = layer(&shared)?.forward(&Tensor::from_array(&shared, &x)?)?.to_array2()?;

    let reference = layer(&Device::cpu())?.forward_array(x.view())?;
    let error = (&y - &reference).iter().fold(0.0f32, |most, difference| most.max(difference.abs()));
    println!("{}: Y is {:?}, at most {error:.1e} from the CPU's", shared.name(), y.dim());
    assert!(error < 2e-2, "{error}");
    Ok(())
}

/// 96 x 256 weights in NF4, with an adapter that adds something.
fn layer(device: &Device) -> qlora_wgpu::Result<QLoraLinear> {
    let weight = Array2::from_shape_fn((D_OUT, D_IN), |(i, j)| ((i * 31 + j * 17) % 101) as f32 / 101.0 - 0.5);
    let mut adapter = LoraAdapter::new(device, D_OUT, D_IN, &LoraConfig::new(8, 16.0))?;
    // B of a new adapter is zero, so it would add nothing.
    adapter.edit(|_, mut b| b.fill(0.01))?;
    QLoraLinear::quantize(device, weight.view(), &QuantOptions::nf4().double_quant())?.with_adapter("default", adapter)
}
