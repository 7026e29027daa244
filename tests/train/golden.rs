//! Recorded training runs of PEFT on the dequantized bitsandbytes base: losses, gradients and
//! final adapters.

use crate::common;
use crate::common::model::{adapter, batch, f32s, file, load, path};
use crate::common::tolerances::{FINAL_ADAPTER, FIRST_GRADIENTS, LEARNING_RATE, LOSS};
use qlora_wgpu::formats::peft::{PeftAdapter, PeftConfig};
use qlora_wgpu::internal::bench::uniform;
use qlora_wgpu::nn::RopeConfig;
use qlora_wgpu::nn::{Batch, Decoder, LoraAdapter, ModelConfig, Tokens, WeightSource, shifted_labels};
use qlora_wgpu::optim::{AdamW, Decay, Schedule};
use qlora_wgpu::quant::HostMatrix;
use qlora_wgpu::quant::{DenseData, DenseMatrix, QuantOptions, QuantizedMatrix};
use qlora_wgpu::train::{TrainOptions, Trainer};
use qlora_wgpu::{Device, Error, Tensor};
use serde_json::Value;

struct Run {
    name: &'static str,
    curve: Value,
    options: TrainOptions,
}

impl Run {
    fn open(name: &'static str) -> Run {
        let curve: Value =
            serde_json::from_str(&std::fs::read_to_string(path(name).join("curve.json")).unwrap()).unwrap();
        let number = |value: &Value| value.as_f64().unwrap();
        let schedule = match name {
            "train-full" => Schedule { decay: Decay::Cosine, warmup: 2, total: 6 },
            _ => Schedule::constant(),
        };
        let optimizer = AdamW {
            lr: number(&curve["base_lr"]),
            beta1: number(&curve["betas"][0]),
            beta2: number(&curve["betas"][1]),
            eps: number(&curve["eps"]),
            weight_decay: number(&curve["weight_decay"]),
        };
        let max_norm = curve["clip"].as_f64().map(|clip| clip as f32);
        let options = TrainOptions { optimizer, schedule, max_norm, checkpoint_activations: false, seed: 0 };
        Run { name, curve, options }
    }

    fn model(&self, device: &Device) -> Decoder {
        let mut model = load(device, "llama-bnb-nf4_dq");
        model.attach_peft("default", &adapter(&format!("{}/adapter-init", self.name))).unwrap();
        model
    }

    /// The micro-batches of a step.
    fn batches(&self, device: &Device, step: usize) -> Vec<Batch> {
        let file = file(&format!("{}/batches.safetensors", self.name));
        let accumulated = self.curve["accum"].as_u64().unwrap() as usize;
        let first = if self.curve["batch_repeated_every_step"].as_bool().unwrap() { 0 } else { step * accumulated };
        (first..first + accumulated).map(|index| batch(device, &file, index, 128)).collect()
    }

    fn records(&self) -> &[Value] {
        self.curve["records"].as_array().unwrap()
    }
}

fn close(context: &str, got: f32, wanted: &Value, relative: f64) {
    let wanted = wanted.as_f64().unwrap();
    assert!((f64::from(got) - wanted).abs() <= relative * wanted.abs(), "{context}: got {got}, wanted {wanted}");
}

/// The bits of every parameter.
fn parameter_bits(model: &Decoder) -> Vec<Vec<u32>> {
    let bits = |tensor: &Tensor| tensor.to_vec().unwrap().into_iter().map(f32::to_bits).collect();
    model.parameters().map(|(_, parameter)| bits(parameter)).collect()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// Checks that ‖got - wanted‖ is at most `relative` times ‖wanted‖ (plus a little for zeros).
fn close_tensor(context: &str, got: &[f32], wanted: &[f32], relative: f64) {
    assert_eq!(got.len(), wanted.len(), "{context}");
    let difference: Vec<f32> = got.iter().zip(wanted).map(|(got, wanted)| got - wanted).collect();
    let (distance, size) = (norm(&difference), norm(wanted));
    assert!(distance <= relative * size + 1e-9, "{context}: off by {distance:e} of {size:e}");
}

/// Repeats a recorded run on a device and compares every step.
fn check(name: &'static str, device: &Device) {
    let run = Run::open(name);
    let golden = file(&format!("{name}/golden.safetensors"));
    let mut model = run.model(device);
    let mut trainer = Trainer::new(run.options);

    let batches = run.batches(device, 0);
    let label_tokens: usize = batches.iter().map(Batch::label_tokens).sum();
    let (_, gradients) = trainer.gradients(&model, &batches, 1.0 / label_tokens as f32).unwrap();
    let mut compared = 0;
    for (path, parameter) in model.parameters() {
        // In the recording, as in torch, a magnitude is the weight of a module.
        let key = path.replace("lora_magnitude_vector", "lora_magnitude_vector.weight");
        let wanted = f32s(&golden, &format!("grad0.{key}"));
        let got = gradients.get(parameter).unwrap_or_else(|| panic!("{path} has a gradient")).to_vec().unwrap();
        close_tensor(&format!("{} {name} {path}", common::name(device)), &got, &wanted, FIRST_GRADIENTS.on(device));
        compared += 1;
    }
    assert_eq!(compared, golden.names().iter().filter(|name| name.starts_with("grad0.")).count());
    drop(gradients);

    for (step, record) in run.records().iter().enumerate() {
        let report = trainer.step(&mut model, &run.batches(device, step)).unwrap();
        let context = |what: &str| format!("{} {name} step {step}: {what}", common::name(device));
        close(&context("loss"), report.loss, &record["loss"], LOSS.on(device));
        close(&context("gradient norm"), report.grad_norm, &record["grad_norm"], LOSS.on(device));
        close(&context("learning rate"), report.lr, &record["lr"], LEARNING_RATE.on(device));
        assert_eq!(report.label_tokens as u64, record["n_label_tokens"].as_u64().unwrap(), "{}", context("tokens"));
    }
    let wanted = adapter(&format!("{name}/adapter-final"));
    let got = model.to_peft("default", &wanted.config).unwrap();
    assert_eq!(got.modules.len(), wanted.modules.len());
    let bound = FINAL_ADAPTER.on(device);
    for (path, module) in &got.modules {
        let context = |what: &str| format!("{} {name} final {path} {what}", common::name(device));
        let theirs = &wanted.modules[path];
        close_tensor(&context("A"), module.a.as_slice().unwrap(), theirs.a.as_slice().unwrap(), bound);
        close_tensor(&context("B"), module.b.as_slice().unwrap(), theirs.b.as_slice().unwrap(), bound);
        if let Some(magnitude) = &module.magnitude {
            close_tensor(&context("magnitude"), magnitude, theirs.magnitude.as_ref().unwrap(), bound);
        }
    }
}

fn check_everywhere(name: &'static str) {
    for device in common::devices() {
        check(name, &device);
    }
}

#[test]
fn the_curve_of_peft_on_one_batch() {
    check_everywhere("train-basic");
}

#[test]
fn the_long_curve_of_peft() {
    check_everywhere("train-basic20");
}

#[test]
fn the_curve_of_peft_with_accumulation_clipping_schedule_and_decay() {
    check_everywhere("train-full");
}

#[test]
fn the_curve_of_peft_with_dora() {
    check_everywhere("train-dora");
}

/// Returns a run's losses and its final adapter's values.
fn trajectory(device: &Device, checkpoint: bool, dropout: f32) -> (Vec<u32>, Vec<Vec<u32>>) {
    let run = Run::open("train-full");
    let mut model = run.model(device);
    for (_, linear) in model.linears_mut() {
        let lora: &mut LoraAdapter = linear.adapter_mut("default").unwrap();
        *lora = lora.clone().with_dropout(dropout).unwrap();
    }
    let mut trainer = Trainer::new(TrainOptions { checkpoint_activations: checkpoint, seed: 7, ..run.options });
    let losses = (0..3).map(|step| {
        let report = trainer.step(&mut model, &run.batches(device, step)).unwrap();
        (report.loss.to_bits(), report.grad_norm.to_bits())
    });
    let losses = losses.flat_map(|(loss, norm)| [loss, norm]).collect();
    (losses, parameter_bits(&model))
}

#[test]
fn reruns_and_checkpointed_runs_are_equal_to_the_bit() {
    for device in common::devices() {
        let name = common::name(&device);
        let first = trajectory(&device, false, 0.1);
        assert!(first == trajectory(&device, false, 0.1), "{name}: the same run again");
        assert!(first == trajectory(&device, true, 0.1), "{name}: with recomputation");
        assert!(first != trajectory(&device, false, 0.2), "{name}: dropout matters");
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_leaves_the_adapter_alone() {
    for device in common::devices() {
        let run = Run::open("train-basic");
        let mut model = run.model(&device);
        let mut trainer = Trainer::new(run.options);
        trainer.step(&mut model, &run.batches(&device, 0)).unwrap();
        let before = parameter_bits(&model);
        // Makes one value of one adapter overflow.
        let (_, linear) = model.linears_mut().nth(3).unwrap();
        let b = linear.adapter("default").unwrap().b().clone();
        linear.adapter_mut("default").unwrap().edit(|_, mut b| b[[0, 0]] = f32::INFINITY).unwrap();
        let error = trainer.step(&mut model, &run.batches(&device, 1)).unwrap_err();
        let Error::Diverged { step, ref what, .. } = error else { panic!("{error}") };
        assert_eq!(step, 1, "{error}");
        assert!(what.contains("loss") || what.contains("lora_"), "{error}");
        let (_, linear) = model.linears_mut().nth(3).unwrap();
        let a = linear.adapter("default").unwrap().a().clone();
        linear.adapter_mut("default").unwrap().replace(a, b).unwrap();
        assert!(before == parameter_bits(&model), "{}: nothing was updated", common::name(&device));
        // The run then continues as if nothing had happened.
        let report = trainer.step(&mut model, &run.batches(&device, 1)).unwrap();
        close(&common::name(&device), report.loss, &run.records()[1]["loss"], LOSS.on(&device));
    }
}

/// A decoder of random 4-bit layers, large enough to test the memory formulas.
struct Random;

const HIDDEN: usize = 256;
const FFN: usize = 512;
const VOCABULARY: usize = 64;

impl WeightSource for Random {
    fn vector(&mut self, _: &str, len: usize) -> qlora_wgpu::Result<Vec<f32>> {
        Ok(vec![1.0; len])
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> qlora_wgpu::Result<HostMatrix> {
        let values = uniform(name.len() as u64, rows * cols, 0.1);
        if !linear {
            return Ok(DenseMatrix::new(rows, cols, DenseData::F32(values))?.into());
        }
        let options = QuantOptions::nf4().double_quant();
        Ok(QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, &options)?.into())
    }
}

fn random_model(device: &Device, layers: usize, rank: usize) -> Decoder {
    let config = ModelConfig {
        vocab_size: VOCABULARY,
        hidden_size: HIDDEN,
        intermediate_size: FFN,
        layers,
        windows: vec![None; layers],
        heads: 4,
        kv_heads: 4,
        head_dim: 64,
        tie_word_embeddings: true,
        rope: RopeConfig { head_dim: 64, ..load(&Device::cpu(), "llama").config().rope },
        ..load(&Device::cpu(), "llama").config().clone()
    };
    let mut model = Decoder::build(device, config, &mut Random).unwrap();
    model.attach("default", &PeftConfig::new(rank, 8.0), 1).unwrap();
    model
}

fn random_batch(model: &Decoder, length: usize) -> Batch {
    let ids: Vec<u32> = (0..length as u32).map(|i| i * 7 % VOCABULARY as u32).collect();
    let labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let tokens = Tokens::new(ids, 1).unwrap();
    let labels = shifted_labels(&tokens, &labels, VOCABULARY).unwrap();
    model.batch(&tokens, Some(&labels)).unwrap()
}

#[test]
fn memory_is_what_the_formula_says_and_holds_no_dequantized_copy() {
    // Separate devices, whose counters no other test changes.
    for device in common::gpus_with(|_| ()).into_iter().chain([Device::cpu()]) {
        let name = common::name(&device);
        // The smallest linear layer, dequantized to f16, or to f32 as on the CPU. What a step holds
        // beside the weights takes less, as there are two tokens and adapters of rank 1: so no copy
        // exists at any time.
        let value_bytes = if matches!(device, Device::Cpu(_)) { 4 } else { 2 };
        let copy = (value_bytes * HIDDEN * HIDDEN) as f64;
        let (layers, rank) = (3, 1);
        let mut model = random_model(&device, layers, rank);
        let mut trainer = Trainer::new(Run::open("train-basic").options);
        let batch = random_batch(&model, 2);
        trainer.step(&mut model, std::slice::from_ref(&batch)).unwrap();
        device.wait().unwrap();

        let shapes = [(HIDDEN, HIDDEN); 4].into_iter().chain([(FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)]);
        let (mut weights, mut trained) = (0, 0);
        for (n, k) in shapes {
            weights += layers * n * k;
            trained += layers * rank * (n + k);
        }
        let dense = VOCABULARY * HIDDEN + (2 * layers + 1) * HIDDEN;
        // A table of 256 scales for each matrix, and the sines and cosines of the rotations.
        let tables = 7 * layers * 256 + model.config().max_position_embeddings * model.config().head_dim;
        // 4.127 bits per weight, f32 for the rest; parameters with two moments each.
        let formula = 4.127 / 8.0 * weights as f64 + 4.0 * (dense + tables + 3 * trained) as f64;
        let live = device.memory().live_bytes as f64;
        // Padding and the batch.
        assert!(live >= 0.999 * formula && live <= formula + 0.5 * copy, "{name}: {live} live, {formula} by formula");
        assert_eq!(trainer.optimizer().resident_bytes(), 2 * model.resident_bytes().1, "{name}: two moments each");

        device.reset_peak();
        trainer.step(&mut model, std::slice::from_ref(&batch)).unwrap();
        device.wait().unwrap();
        assert_eq!(device.memory().live_bytes as f64, live, "{name}: a step leaves nothing behind");
        let transient = device.memory().peak_bytes as f64 - live;
        assert!(transient >= 4.0 * trained as f64 && transient < copy, "{name}: {transient} bytes, {copy} a copy");
    }
}

#[test]
fn checkpointing_keeps_one_layer_and_the_inputs_of_the_others() {
    const RANK: usize = 4;
    for device in common::gpus_with(|_| ()).into_iter().chain([Device::cpu()]) {
        let name = common::name(&device);
        let length = 48;
        let peak = |layers: usize, checkpoint_activations: bool| {
            let model = random_model(&device, layers, RANK);
            let batch = random_batch(&model, length);
            let trainer = Trainer::new(TrainOptions { checkpoint_activations, ..Run::open("train-basic").options });
            // Allocates everything that stays before counting.
            trainer.gradients(&model, std::slice::from_ref(&batch), 1.0).unwrap();
            device.wait().unwrap();
            device.reset_peak();
            let before = device.memory().live_bytes;
            trainer.gradients(&model, std::slice::from_ref(&batch), 1.0).unwrap();
            (device.memory().peak_bytes - before) as f64
        };
        let a_layer = |checkpoint| (peak(6, checkpoint) - peak(2, checkpoint)) / 4.0;
        // The gradients of a layer's adapters exist at the end either way.
        let gradients = (4 * RANK * (4 * 2 * HIDDEN + 3 * (HIDDEN + FFN))) as f64;
        let input = (4 * length * HIDDEN) as f64;
        let (whole, checkpointed) = (a_layer(false), a_layer(true));
        // A layer's input is freed before its gradients are complete. The CPU's scratch varies.
        let most = 1.15 * input.max(gradients);
        assert!(checkpointed <= most, "{name}: {checkpointed} a layer, input {input}, gradients {gradients}");
        assert!(whole >= 8.0 * input, "{name}: {whole} a layer without");
    }
}

#[test]
fn a_trained_adapter_goes_through_a_directory() {
    let device = Device::cpu();
    let run = Run::open("train-dora");
    let mut model = run.model(&device);
    Trainer::new(run.options).step(&mut model, &run.batches(&device, 0)).unwrap();
    let config = adapter("train-dora/adapter-init").config;
    let directory = tempfile::tempdir().unwrap();
    model.to_peft("default", &config).unwrap().write(directory.path()).unwrap();
    let mut again = load(&device, "llama-bnb-nf4_dq");
    again.attach_peft("trained", &PeftAdapter::read(directory.path()).unwrap()).unwrap();
    let batch = &run.batches(&device, 0)[0];
    assert_eq!(model.evaluate(batch).unwrap().1.to_vec().unwrap(), again.evaluate(batch).unwrap().1.to_vec().unwrap());
    assert!(matches!(model.to_peft("none", &config), Err(Error::NoSuchAdapter { .. })));
}

#[test]
fn data_without_labels_is_an_error() {
    let run = Run::open("train-basic");
    let device = Device::cpu();
    let mut model = run.model(&device);
    let mut trainer = Trainer::new(run.options);
    assert_eq!(
        trainer.step(&mut model, &[]).unwrap_err().to_string(),
        "training step: the data is 0 micro-batches without labels; at least one token must carry loss"
    );
}
