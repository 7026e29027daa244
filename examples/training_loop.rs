//! A hand-written training loop, for programs with their own loss or their own layers around this
//! one. The adapter learns the difference between a changed weight and the frozen 4-bit one.
//!
//! `cargo run --example training_loop`

use ndarray::Array2;
use qlora_wgpu::nn::{LoraAdapter, LoraConfig, QLoraLinear};
use qlora_wgpu::ops::grad_norm;
use qlora_wgpu::optim::{AdamW, Decay, Optimizer, Schedule};
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::{Device, Tensor};

const STEPS: u32 = 200;
const TOKENS: usize = 128;

/// Values in -0.5..0.5 without a pattern, different for every seed.
fn values(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
    Array2::from_shape_fn((rows, cols), |(i, j)| {
        let mixed = ((i * cols + j) as u32 ^ seed << 20).wrapping_mul(2_654_435_761);
        (mixed ^ mixed >> 15).wrapping_mul(2_246_822_519) as f32 / u32::MAX as f32 - 0.5
    })
}

fn main() -> qlora_wgpu::Result<()> {
    let device = Device::best()?;
    let (d_out, d_in) = (64, 128);
    let weight = values(d_out, d_in, 1);
    let changed = &weight + &values(d_out, 4, 2).dot(&values(4, d_in, 3));

    let adapter = LoraAdapter::new(&device, d_out, d_in, &LoraConfig::new(8, 16.0))?;
    let mut layer = QLoraLinear::quantize(&device, weight.view(), &QuantOptions::nf4().double_quant())?
        .with_adapter("default", adapter)?;
    let mut optimizer = Optimizer::new(AdamW { lr: 1e-2, weight_decay: 0.0, ..AdamW::default() });
    let schedule = Schedule { decay: Decay::Cosine, warmup: 10, total: STEPS };

    let mut losses = Vec::new();
    for step in 0..STEPS {
        let x = values(TOKENS, d_in, 100 + step);
        let (y, saved) = layer.forward_train(&Tensor::from_array(&device, &x)?, step.into())?;

        // The loss is up to the program. Here it is the mean squared difference, on the host.
        let difference = y.to_array2()? - x.dot(&changed.t());
        let count = difference.len() as f32;
        losses.push(difference.mapv(|value| value * value).sum() / count);
        let dy = Tensor::from_array(&device, &(difference * (2.0 / count)))?;

        // Computes the gradients of A and B; with `true`, also that of the input, for layers
        // before this one.
        let gradients = layer.backward(&dy, &saved, false)?;
        let found: Vec<&Tensor> = gradients.da.iter().chain(&gradients.db).collect();
        let norm = grad_norm(&found, None, Some(1.0))?;
        optimizer.begin();
        for ((_, parameter), gradient) in layer.parameters_mut().zip(found) {
            optimizer.update(parameter, gradient, schedule.factor(step), &norm)?;
        }
        if step % 40 == 0 {
            println!("step {step:3}  loss {:.5}", losses[step as usize]);
        }
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("{}: loss {first:.5} before, {last:.5} after", device.name());
    assert!(last < 0.05 * first, "{first} to {last}");
    Ok(())
}
