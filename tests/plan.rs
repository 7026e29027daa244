//! Plans against training steps: the peaks that a device counts are those that the plan says.

mod common;

use std::path::Path;

use common::model::{path, smollm2};
use qlora_wgpu::Device;
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::{PeftConfig, TargetModules, Targets};
use qlora_wgpu::nn::{Batch, Decoder, ModelSpec, Tokens, shifted_labels};
use qlora_wgpu::optim::{AdamW, Schedule};
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::train::plan::{MicroBatches, Plan};
use qlora_wgpu::train::{TrainOptions, Trainer};

fn options(checkpoint_activations: bool) -> TrainOptions {
    let (optimizer, schedule) = (AdamW::default(), Schedule::constant());
    TrainOptions { optimizer, schedule, max_norm: Some(1.0), checkpoint_activations, seed: 0 }
}

fn batch(model: &Decoder, batches: &MicroBatches) -> Batch {
    let vocabulary = model.config().vocab_size;
    let ids: Vec<u32> = (0..batches.rows * batches.tokens).map(|i| (i * 7 % vocabulary) as u32).collect();
    let labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let tokens = Tokens::new(ids, batches.rows).unwrap();
    let labels = shifted_labels(&tokens, &labels, vocabulary).unwrap();
    model.batch(&tokens, Some(&labels)).unwrap()
}

/// Loads, trains two steps, and compares what the device has counted with the plan.
fn check(
    device: &Device,
    model: &Path,
    base: &BaseFormat,
    adapter: &PeftConfig,
    batches: MicroBatches,
    checkpoint: bool,
) {
    // With nothing in its pool.
    let device = match device {
        Device::Cpu(_) => &Device::cpu(),
        Device::Gpu(gpu) => {
            gpu.trim();
            device
        }
    };
    device.reset_peak();
    let options = options(checkpoint);
    let plan = Plan::new(&ModelSpec::read(model, base).unwrap(), adapter, batches, &options, device).unwrap();
    let (peak, held) = {
        let mut model = Decoder::load(device, model, base).unwrap();
        model.attach("default", adapter, 0).unwrap();
        let batches: Vec<Batch> = (0..batches.count).map(|_| batch(&model, &batches)).collect();
        let mut trainer = Trainer::new(options);
        for _ in 0..2 {
            trainer.step(&mut model, &batches).unwrap();
        }
        (device.memory().peak_bytes, device.memory().peak_held_bytes)
    };
    let context = format!(
        "{} {} {batches:?}{}{}: ",
        common::name(device),
        model.file_name().unwrap().display(),
        if checkpoint { " checkpointed" } else { "" },
        if adapter.use_dora { " DoRA" } else { "" }
    );
    for (what, got, wanted) in [("peak", peak, plan.peak_bytes), ("held", held, plan.held_bytes)] {
        let off = wanted as f64 / got as f64 - 1.0;
        println!("{context}{what} {got}, planned {wanted}, off by {:.3} %", 100.0 * off);
        //assert!(off.abs() <= 0.05, "{context}{what} {got}, planned {wanted}");
    }
}

/// With and without checkpoints, DoRA and accumulation.
fn check_all(device: &Device, model: &Path, base: &BaseFormat, adapter: &PeftConfig, rows: usize, tokens: usize) {
    for (count, checkpoint, use_dora) in (0..8).map(|i| (1 + i % 2, i / 2 % 2 == 1, i / 4 == 1)) {
        let adapter = PeftConfig { use_dora, ..adapter.clone() };
        check(device, model, base, &adapter, MicroBatches { count, rows, tokens }, checkpoint);
    }
}

fn nf4() -> BaseFormat {
    BaseFormat::Quantize(QuantOptions::nf4().double_quant())
}

fn names(names: [&str; 2]) -> Targets {
    Targets::new(TargetModules::names(names))
}

#[test]
fn small_models_on_every_device() {
    for device in common::gpus_with(|_| ()).into_iter().chain([Device::cpu()]) {
        check_all(&device, &path("llama-bnb-nf4_dq"), &nf4(), &PeftConfig::new(8, 16.0), 2, 96);
        let adapter =
            PeftConfig { targets: names(["q_proj", "down_proj"]), lora_dropout: 0.1, ..PeftConfig::new(3, 6.0) };
        check_all(&device, &path("qwen2"), &nf4(), &adapter, 1, 50);
        check_all(&device, &path("qwen3"), &BaseFormat::AsIs, &adapter, 3, 33);
    }
}

#[test]
fn smollm2_on_the_cpu() {
    let adapter = PeftConfig::new(16, 32.0);
    let start = std::time::Instant::now();
    check_all(&Device::cpu(), &smollm2(), &nf4(), &adapter, 1, 128);
    println!("{:?} off", start.elapsed());
    for checkpoint in [false, true] {
        check(
            &Device::cpu(),
            &smollm2(),
            &nf4(),
            &adapter,
            MicroBatches { count: 1, rows: 1, tokens: 512 },
            checkpoint,
        );
    }
    println!("{:?} off", start.elapsed());
}

#[test]
fn smollm2_on_a_gpu() {
    let adapter = PeftConfig { targets: names(["q_proj", "v_proj"]), ..PeftConfig::new(8, 16.0) };
    let start = std::time::Instant::now();
    if let Some(device) = common::gpus_with(|_| ()).first() {
        check(device, &smollm2(), &nf4(), &adapter, MicroBatches { count: 1, rows: 1, tokens: 128 }, false);
    }
    println!("{:?} off", start.elapsed());
}
