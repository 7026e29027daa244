//! Compares plans with training steps: the peaks that a device counts must equal the planned ones.

use crate::common;
use std::path::Path;

use crate::common::model::{path, smollm2};
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::{PeftConfig, TargetModules, Targets};
use qlora_wgpu::nn::{Batch, Decoder, ModelConfig, ModelSpec, Tokens, shifted_labels};
use qlora_wgpu::optim::{AdamW, Schedule};
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::quant::{MatrixKind, MatrixSpec};
use qlora_wgpu::train::plan::{MEMORY_PERCENT, MicroBatches, Parts, Plan};
use qlora_wgpu::train::{TrainOptions, Trainer};
use qlora_wgpu::{Device, Error, ModelFiles};

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

/// Loads, trains two steps, and compares the device's counters with the plan.
fn check(
    device: &Device,
    model: &Path,
    base: &BaseFormat,
    adapter: &PeftConfig,
    batches: MicroBatches,
    checkpoint: bool,
) {
    // With an empty pool.
    let device = match device {
        Device::Cpu(_) => &Device::cpu(),
        Device::Gpu(gpu) => {
            gpu.trim();
            device
        }
    };
    // With many threads and small matrices, the number of simultaneous tiles depends on chance.
    let _set_once = rayon::ThreadPoolBuilder::new().num_threads(2).build_global();
    device.reset_peak();
    let options = options(checkpoint);
    let plan =
        Plan::new(&ModelFiles::open(model).unwrap().spec(base).unwrap(), adapter, batches, &options, device).unwrap();
    let (peak, held) = {
        let mut model = ModelFiles::open(model).unwrap().load(device, base).unwrap();
        model.attach("default", adapter, 0).unwrap();
        let mut trainer = Trainer::new(options);
        // The first step allocates the optimizer's moments; its size doesn't matter.
        let first = batch(&model, &MicroBatches { count: 1, rows: 1, tokens: 9 });
        trainer.step(&mut model, &[first]).unwrap();
        let batches: Vec<Batch> = (0..batches.count).map(|_| batch(&model, &batches)).collect();
        trainer.step(&mut model, &batches).unwrap();
        (device.memory().peak_bytes, device.memory().peak_held_bytes)
    };
    let mut context = format!("{} {} {batches:?}", common::name(device), model.file_name().unwrap().display());
    context.push_str(if checkpoint { ", checkpoints" } else { "" });
    context.push_str(if adapter.use_dora { ", DoRA: " } else { ": " });
    // The pool also keeps a few sizes of the shorter step and, on the CPU, the tiles that threads
    // happened to need.
    for (what, got, wanted, slack) in [("peak", peak, plan.peak_bytes, 0), ("held", held, plan.held_bytes, 128 << 10)] {
        println!("{context}{what} {got}, planned {wanted}, off by {:.3} %", 100.0 * (wanted as f64 / got as f64 - 1.0));
        assert!(wanted.abs_diff(got) <= got / 20 + slack, "{context}{what} {got}, planned {wanted}");
    }
    assert_eq!(plan.at_peak.total(), plan.peak_bytes, "{context}");
    assert!(plan.held_bytes >= plan.peak_bytes, "{context}");
}

/// With and without recomputation, DoRA and accumulation.
fn check_all(device: &Device, model: &Path, base: &BaseFormat, adapter: &PeftConfig, rows: usize, tokens: usize) {
    for (count, checkpoint, use_dora) in (0..8).map(|i| (1 + i % 2, i / 2 % 2 == 1, i / 4 == 1)) {
        let adapter = PeftConfig { use_dora, ..adapter.clone() };
        check(device, model, base, &adapter, MicroBatches { count, rows, tokens }, checkpoint);
    }
}

fn nf4() -> BaseFormat {
    BaseFormat::Quantize(QuantOptions::nf4().double_quant())
}

/// On some layers only, with dropout.
fn sparse_adapter() -> PeftConfig {
    let targets = Targets::new(TargetModules::names(["q_proj", "down_proj"]));
    PeftConfig { targets, lora_dropout: 0.1, ..PeftConfig::new(3, 6.0) }
}

#[test]
fn small_models_on_the_cpu() {
    let cpu = Device::cpu();
    check_all(&cpu, &path("llama-bnb-nf4_dq"), &nf4(), &PeftConfig::new(8, 16.0), 2, 96);
    check_all(&cpu, &path("qwen2"), &nf4(), &sparse_adapter(), 1, 50);
    check_all(&cpu, &path("qwen3"), &BaseFormat::AsIs, &sparse_adapter(), 3, 33);
}

#[test]
fn small_models_on_every_gpu() {
    for device in common::gpus_with(|_| ()) {
        check_all(&device, &path("llama-bnb-nf4_dq"), &nf4(), &PeftConfig::new(8, 16.0), 2, 96);
        check_all(&device, &path("qwen2"), &nf4(), &sparse_adapter(), 1, 50);
    }
}

#[test]
fn smollm2_on_the_cpu() {
    let adapter = PeftConfig::new(16, 32.0);
    for (count, checkpoint, use_dora) in [(1, false, false), (2, true, false), (1, true, true), (2, false, true)] {
        let adapter = PeftConfig { use_dora, ..adapter.clone() };
        let batches = MicroBatches { count, rows: 1, tokens: 128 };
        check(&Device::cpu(), &smollm2(), &nf4(), &adapter, batches, checkpoint);
    }
    for checkpoint in [false, true] {
        let batches = MicroBatches { count: 1, rows: 1, tokens: 512 };
        check(&Device::cpu(), &smollm2(), &nf4(), &adapter, batches, checkpoint);
    }
}

#[test]
fn smollm2_on_a_gpu() {
    let targets = Targets::new(TargetModules::names(["q_proj", "v_proj"]));
    let adapter = PeftConfig { targets, ..PeftConfig::new(8, 16.0) };
    if let Some(device) = common::gpus_with(|_| ()).first() {
        let batches = MicroBatches { count: 1, rows: 1, tokens: 128 };
        check(device, &smollm2(), &nf4(), &adapter, batches, false);
    }
}

/// The shape of Mistral 7B, with linear layers in NF4 and the rest in 16 bits.
fn seven_billion() -> ModelSpec {
    let llama = ModelFiles::open(path("llama")).unwrap().spec(&nf4()).unwrap().config().clone();
    let config = ModelConfig {
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 14_336,
        layers: 32,
        windows: vec![None; 32],
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        max_position_embeddings: 32_768,
        tie_word_embeddings: false,
        ..llama
    };
    let kind = |linear| match linear {
        true => MatrixKind::quantized(&QuantOptions::nf4().double_quant()),
        false => MatrixKind::Half,
    };
    ModelSpec::new(config, |_, rows, cols, linear| Ok(MatrixSpec { rows, cols, kind: kind(linear) })).unwrap()
}

#[test]
fn a_model_of_seven_billion_weights_and_what_fits() {
    let (model, device, adapter) = (seven_billion(), Device::cpu(), PeftConfig::new(16, 32.0));
    let batches = MicroBatches { count: 1, rows: 1, tokens: 512 };
    let plan = |checkpoint| Plan::new(&model, &adapter, batches, &options(checkpoint), &device).unwrap();
    let (whole, checkpointed) = (plan(false), plan(true));
    let linears: usize = model.linears().map(|(_, matrix)| matrix.rows * matrix.cols).sum();
    let dense = 2 * 2 * 32_000 * 4096 + 4 * 65 * 4096;
    let formula = 4.127 / 8.0 * linears as f64 + f64::from(dense);
    assert!((whole.most.base as f64 / formula - 1.0).abs() < 1e-3, "{} {formula}", whole.most.base);
    let trained: usize = model.linears().map(|(_, matrix)| 16 * (matrix.rows + matrix.cols)).sum();
    for plan in [whole, checkpointed] {
        let Parts { base, adapters, gradients, optimizer, .. } = plan.most;
        assert_eq!((base, adapters, optimizer), (whole.most.base, 4 * trained as u64, 8 * trained as u64));
        assert!(gradients >= adapters);
        println!("{plan:?}");
    }
    assert!(checkpointed.most.activations < whole.most.activations / 4, "{checkpointed:?} {whole:?}");

    let fit = |memory| Plan::fit(&model, &adapter, batches, &options(true), &device, memory).unwrap();
    let mut last = 0;
    for rows in [1, 2, 4, 8] {
        let batches = MicroBatches { rows, ..batches };
        let plan = Plan::new(&model, &adapter, batches, &options(true), &device).unwrap();
        let memory = plan.held_bytes * 100 / MEMORY_PERCENT + 1;
        assert!(plan.fits(memory) && !plan.fits(memory - 2), "{plan:?}");
        assert_eq!(fit(memory), plan);
        assert_eq!(fit(memory - 2).batches.rows, if rows == 1 { 1 } else { last });
        last = rows;
    }
}

#[test]
fn what_cannot_be_trained_is_an_error() {
    let model = ModelFiles::open(path("llama")).unwrap().spec(&nf4()).unwrap();
    let message = |adapter: PeftConfig, [count, rows, tokens]: [usize; 3]| {
        let batches = MicroBatches { count, rows, tokens };
        Plan::new(&model, &adapter, batches, &options(false), &Device::cpu()).unwrap_err().to_string()
    };
    let adapter = || PeftConfig::new(4, 8.0);
    assert!(message(adapter(), [1, 1, 129]).contains("max_position_embeddings is 128"));
    assert_eq!(
        message(adapter(), [1, 0, 8]),
        "plan: the step is 1 micro-batches of 0 rows of 8 tokens; it needs at least one token"
    );
    assert!(message(PeftConfig { r: 0, ..adapter() }, [1, 1, 8]).contains("rank is 0"));
    let targets = Targets::new(TargetModules::names(["nothing"]));
    assert!(message(PeftConfig { targets, ..adapter() }, [1, 1, 8]).contains("no linear layer"));
    assert_eq!(
        message(adapter(), [1, 1 << 30, 128]),
        "tensor: shape is [1073741824, 128]; a tensor has fewer than 2^32 values"
    );
    for device in common::gpus_with(|options| options.max_binding_bytes = Some(256 << 10)) {
        let batches = MicroBatches { count: 1, rows: 8, tokens: 128 };
        let plan = |batches| Plan::new(&model, &adapter(), batches, &options(false), &device);
        assert!(matches!(plan(batches), Err(Error::TooLarge { .. })));
        let fit = Plan::fit(&model, &adapter(), batches, &options(false), &device, 1 << 40).unwrap();
        assert!(fit.batches.rows < 8 && plan(fit.batches).unwrap() == fit, "{fit:?}");
    }
}
