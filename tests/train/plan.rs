//! Compares plans with training steps: the peaks that a device counts must equal the planned ones.

use crate::common;
use std::path::PathBuf;

use crate::common::model::{path, smollm2};
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::{PeftConfig, TargetModules, Targets};
use qlora_wgpu::internal::{MatrixKind, MatrixSpec};
use qlora_wgpu::nn::{Batch, Decoder, ModelConfig, ModelSpec, Tokens, WeightSource, shifted_labels};
use qlora_wgpu::optim::{AdamW, Schedule};
use qlora_wgpu::quant::{DenseData, DenseMatrix, HostMatrix, QuantOptions, QuantizedMatrix};
use qlora_wgpu::train::plan::{MEMORY_PERCENT, MicroBatches, Parts, Plan};
use qlora_wgpu::train::{TrainOptions, Trainer};
use qlora_wgpu::{Device, Error, ModelFiles, Result};

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

/// A model that can be planned and loaded.
struct Model {
    name: String,
    spec: ModelSpec,
    load: Box<dyn Fn(&Device) -> Decoder + Sync>,
    /// Whether a step takes long.
    large: bool,
}

impl Model {
    fn file(path: PathBuf, base: BaseFormat) -> Model {
        let name = path.file_name().unwrap().display().to_string();
        let files = ModelFiles::open(path).unwrap();
        let spec = files.spec(&base).unwrap();
        Model { name, spec, load: Box::new(move |device| files.load(device, &base).unwrap()), large: false }
    }

    fn smollm2() -> Model {
        Model { large: true, ..Model::file(smollm2(), nf4()) }
    }

    /// A recorded model.
    fn recorded(name: &str, base: BaseFormat) -> Model {
        Model::file(path(name), base)
    }

    /// Two layers with made-up weights, the first with a window, and with biases everywhere.
    fn with_biases_and_windows(tied: bool) -> Model {
        let config = ModelConfig {
            vocab_size: 203,
            windows: vec![Some(20), None],
            qkv_bias: true,
            o_bias: true,
            mlp_bias: true,
            tie_word_embeddings: tied,
            ..ModelFiles::open(path("llama")).unwrap().spec(&nf4()).unwrap().config().clone()
        };
        let spec = |_: &str, rows, cols, linear| {
            let kind = if linear { MatrixKind::quantized(&QuantOptions::nf4()) } else { MatrixKind::F32 };
            Ok(MatrixSpec { rows, cols, kind })
        };
        let spec = ModelSpec::new(config.clone(), spec).unwrap();
        let load = move |device: &Device| Decoder::build(device, config.clone(), &mut Waves).unwrap();
        Model { name: format!("made-up, tied: {tied}"), spec, load: Box::new(load), large: false }
    }
}

/// Weights of a made-up model.
struct Waves;

impl WeightSource for Waves {
    fn vector(&mut self, _: &str, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.5; len])
    }

    fn matrix(&mut self, _: &str, rows: usize, cols: usize, linear: bool) -> Result<HostMatrix> {
        let values: Vec<f32> = (0..rows * cols).map(|i| 0.1 * (i as f32).sin()).collect();
        if linear {
            let options = QuantOptions::nf4();
            return Ok(QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, &options)?.into());
        }
        Ok(DenseMatrix::new(rows, cols, DenseData::F32(values))?.into())
    }
}

/// Loads, trains two steps, and compares the device's counters with the plan.
fn check(device: &Device, model: &Model, adapter: &PeftConfig, batches: MicroBatches, checkpoint: bool) {
    // With an empty pool.
    let device = match device {
        Device::Cpu(_) => &Device::cpu(),
        Device::Gpu(gpu) => {
            gpu.trim();
            device
        }
    };
    device.reset_peak();
    let before = device.memory();
    let options = options(checkpoint);
    let plan = Plan::new(&model.spec, adapter, batches, &options, device).unwrap();
    assert!(device.memory().peak_bytes - before.live_bytes <= 16, "a plan takes no memory");
    // The first step allocates the optimizer's moments. A short one saves time, but leaves a few
    // other sizes in the pool.
    let first = if model.large { MicroBatches { count: 1, rows: 1, tokens: 9 } } else { batches };
    let (peak, held) = {
        let mut model = (model.load)(device);
        model.attach("default", adapter, 0).unwrap();
        let mut trainer = Trainer::new(options);
        for batches in [first, batches] {
            let batches: Vec<Batch> = (0..batches.count).map(|_| batch(&model, &batches)).collect();
            trainer.step(&mut model, &batches).unwrap();
        }
        (device.memory().peak_bytes, device.memory().peak_held_bytes)
    };
    let mut context = format!("{} {} {batches:?}", common::name(device), model.name);
    context.push_str(if checkpoint { ", checkpoints" } else { "" });
    context.push_str(if adapter.use_dora { ", DoRA: " } else { ": " });
    let held_percent = if model.large { 5 } else { 1 };
    for (what, got, wanted, percent) in
        [("peak", peak, plan.peak_bytes, 1), ("held", held, plan.held_bytes, held_percent)]
    {
        println!("{context}{what} {got}, planned {wanted}, off by {:.3} %", 100.0 * (wanted as f64 / got as f64 - 1.0));
        assert!(100 * wanted.abs_diff(got) <= percent * got, "{context}{what} {got}, planned {wanted}");
    }
    assert_eq!(plan.at_peak.total(), plan.peak_bytes, "{context}");
    assert!(plan.held_bytes >= plan.peak_bytes, "{context}");
}

/// Runs this with one thread: with several and small matrices, the number of tiles that are decoded
/// at a time depends on chance.
fn with_one_thread(run: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(run);
}

/// With and without recomputation, DoRA and accumulation.
fn check_all(device: &Device, model: &Model, adapter: &PeftConfig, rows: usize, tokens: usize) {
    for (count, checkpoint, use_dora) in (0..8).map(|i| (1 + i % 2, i / 2 % 2 == 1, i / 4 == 1)) {
        let adapter = PeftConfig { use_dora, ..adapter.clone() };
        check(device, model, &adapter, MicroBatches { count, rows, tokens }, checkpoint);
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
    with_one_thread(|| {
        check_all(&cpu, &Model::recorded("llama-bnb-nf4_dq", nf4()), &PeftConfig::new(8, 16.0), 2, 96);
        check_all(&cpu, &Model::recorded("qwen2", nf4()), &sparse_adapter(), 1, 50);
        check_all(&cpu, &Model::recorded("qwen3", BaseFormat::AsIs), &sparse_adapter(), 3, 33);
        check_all(&cpu, &Model::with_biases_and_windows(true), &PeftConfig::new(8, 16.0), 2, 64);
    });
}

#[test]
fn small_models_on_every_gpu() {
    for device in common::gpus_with(|_| ()) {
        check_all(&device, &Model::recorded("llama-bnb-nf4_dq", nf4()), &PeftConfig::new(8, 16.0), 2, 96);
        check_all(&device, &Model::recorded("qwen2", nf4()), &sparse_adapter(), 1, 50);
    }
}

#[test]
fn every_tier_with_accumulation_biases_and_windows() {
    for device in std::iter::once(Device::cpu()).chain(common::open_gpus()) {
        for (tied, use_dora, checkpoint) in [(false, true, false), (true, false, true)] {
            let adapter = PeftConfig { use_dora, lora_dropout: 0.1, ..PeftConfig::new(8, 16.0) };
            let batches = MicroBatches { count: 3, rows: 3, tokens: 40 };
            with_one_thread(|| check(&device, &Model::with_biases_and_windows(tied), &adapter, batches, checkpoint));
        }
    }
}

#[test]
fn matrices_in_several_parts() {
    for device in common::gpus_with(|options| options.max_binding_bytes = Some(64 << 10)) {
        let batches = MicroBatches { count: 2, rows: 1, tokens: 40 };
        let adapter = PeftConfig::new(8, 16.0);
        check(&device, &Model::recorded("qwen3", BaseFormat::AsIs), &adapter, batches, false);
    }
}

#[test]
fn smollm2_on_the_cpu() {
    let (model, adapter) = (Model::smollm2(), PeftConfig::new(16, 32.0));
    for (count, checkpoint, use_dora) in [(1, false, false), (2, true, false), (1, true, true), (2, false, true)] {
        let adapter = PeftConfig { use_dora, ..adapter.clone() };
        check(&Device::cpu(), &model, &adapter, MicroBatches { count, rows: 1, tokens: 128 }, checkpoint);
    }
    for checkpoint in [false, true] {
        check(&Device::cpu(), &model, &adapter, MicroBatches { count: 1, rows: 1, tokens: 512 }, checkpoint);
    }
}

#[test]
fn smollm2_on_a_gpu() {
    let targets = Targets::new(TargetModules::names(["q_proj", "v_proj"]));
    let adapter = PeftConfig { targets, ..PeftConfig::new(8, 16.0) };
    if let Some(device) = common::gpus_with(|_| ()).first() {
        let batches = MicroBatches { count: 1, rows: 1, tokens: 128 };
        check(device, &Model::smollm2(), &adapter, batches, false);
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
fn batches_are_counted_and_not_made() {
    let model = ModelFiles::open(path("llama")).unwrap().spec(&nf4()).unwrap();
    let plan = |count, rows| {
        let batches = MicroBatches { count, rows, tokens: 8 };
        Plan::new(&model, &PeftConfig::new(4, 8.0), batches, &options(false), &Device::cpu())
    };
    let peak = |count| plan(count, 1).unwrap().peak_bytes;
    let each = peak(4) - peak(3);
    assert!(each > 0 && peak(1003) == peak(3) + 1000 * each, "{each}");
    // More than any machine has: planned at once, or refused.
    assert!(peak(1 << 40) >= each << 40);
    assert!(peak(usize::MAX) > peak(1 << 40));
    assert!(plan(1, 1 << 27).unwrap_err().to_string().contains("2^32"));
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
