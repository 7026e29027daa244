//! A real model from its GGUF file, SmolLM2-135M-Instruct in Q4_1: weights, logits, a text's loss
//! and a training run, all compared with transformers and PEFT on the same weights, dequantized.
//! `make smollm2` fetches the file.

use crate::common;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::common::model::{distance, f32s, i64s_flat, logits, smollm2};
use crate::common::tolerances::{SMOLLM2_LOGITS, SMOLLM2_LOSS, SMOLLM2_TRAINING};
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::PeftAdapter;
use qlora_wgpu::generate::{Sampler, Sampling, generate};
use qlora_wgpu::internal::gguf::{GgufFile, RowOrder};
use qlora_wgpu::internal::safetensors::SafetensorsFile;
use qlora_wgpu::nn::{Batch, Decoder, ModelConfig, Tokens, shifted_labels};
use qlora_wgpu::optim::{AdamW, Schedule};
use qlora_wgpu::train::{TrainOptions, Trainer};
use qlora_wgpu::{Device, ModelFiles};
use serde_json::Value;

fn load(device: &Device) -> Decoder {
    ModelFiles::open(smollm2()).unwrap().load(device, &BaseFormat::AsIs).unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2").join(name)
}

fn tensors() -> SafetensorsFile {
    SafetensorsFile::open(golden("smollm2.golden.safetensors")).unwrap()
}

fn json() -> Value {
    serde_json::from_slice(&std::fs::read(golden("smollm2.golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A text in which every token but the first is a label.
fn labelled(model: &Decoder, ids: &Value) -> Batch {
    let ids = self::ids(ids);
    let labels: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    let tokens = Tokens::new(ids, 1).unwrap();
    let labels = shifted_labels(&tokens, &labels, model.config().vocab_size).unwrap();
    model.batch(&tokens, Some(&labels)).unwrap()
}

#[test]
fn weights_are_those_of_the_reference_to_the_bit() {
    let (file, golden) = (GgufFile::open(smollm2()).unwrap(), tensors());
    let config = ModelConfig::from_gguf(&file).unwrap();
    assert_eq!((config.layers, config.hidden_size, config.heads, config.kv_heads), (30, 576, 9, 3));
    assert!(config.tie_word_embeddings);
    let check = |name: &str, [rows, cols]: [usize; 2], order: RowOrder, row: usize, wanted: &str| {
        let matrix = file.matrix(name, rows, cols, order, &BaseFormat::AsIs).unwrap();
        let mut got = vec![0.0; cols];
        matrix.dequantize_rows(row..row + 1, &mut got);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
        assert!(bits(&got) == bits(&f32s(&golden, wanted)), "{name}, row {row}");
    };
    check("token_embd.weight", [49_152, 576], RowOrder::Plain, 1000, "embed_row_1000");
    check("blk.29.ffn_down.weight", [576, 1536], RowOrder::Plain, 3, "down29_row3");
    check("blk.0.attn_q.weight", [576, 576], RowOrder::Interleaved { head_dim: 64 }, 7, "q_proj0_row7");
}

fn check(device: &Device, steps: usize) {
    let (recorded, json, name) = (tensors(), json(), common::name(device));
    let mut model = load(device);

    let prompt = i64s_flat(&recorded, "prompt_ids").into_iter().map(|id| u32::try_from(id).unwrap()).collect();
    let all = logits(&model, &Tokens::new(prompt, 1).unwrap());
    let vocabulary = model.config().vocab_size;
    let bound = SMOLLM2_LOGITS.on(device);
    for (got, wanted) in [(&all[..vocabulary], "logits_first"), (&all[all.len() - vocabulary..], "logits_last")] {
        let off = distance(got, &f32s(&recorded, wanted));
        println!("{name}: {wanted} off by {off:e}");
        assert!(off <= bound, "{name}: {wanted} off by {off}");
    }

    let nll = &json["nll"];
    let batch = labelled(&model, &nll["ids"]);
    assert_eq!(batch.label_tokens() as u64, nll["n_targets"].as_u64().unwrap());
    let mean = f64::from(model.evaluate(&batch).unwrap().0.to_vec().unwrap()[0]) / batch.label_tokens() as f64;
    let off = (mean - nll["mean_nll"].as_f64().unwrap()).abs();
    println!("{name}: mean loss {mean}, off by {off:e}");
    assert!(off <= SMOLLM2_LOSS.on(device), "{name}: mean loss {mean}, off by {off}");

    let train = &json["train"];
    model.attach_peft("default", &PeftAdapter::read(golden("adapter-init")).unwrap()).unwrap();
    let batch = labelled(&model, &train["ids"]);
    let lr = train["lr"].as_f64().unwrap();
    let optimizer = AdamW { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let schedule = Schedule::constant();
    let options = TrainOptions { optimizer, schedule, max_norm: None, checkpoint_activations: false, seed: 0 };
    let mut trainer = Trainer::new(options);
    let bound = SMOLLM2_TRAINING.on(device);
    for (step, record) in train["steps"].as_array().unwrap().iter().take(steps).enumerate() {
        let report = trainer.step(&mut model, std::slice::from_ref(&batch)).unwrap();
        for (what, got) in [("loss", report.loss), ("grad_norm", report.grad_norm)] {
            let wanted = record[what].as_f64().unwrap();
            let off = (f64::from(got) / wanted - 1.0).abs();
            println!("{name}: step {step}: {what} {got}, off by {off:e}");
            assert!(off <= bound, "{name}: step {step}: {what} is {got}, wanted {wanted}");
        }
    }
}

#[test]
fn the_cpu_agrees_with_transformers_and_peft() {
    check(&Device::cpu(), 6);
    answers(&Device::cpu());
}

#[test]
fn a_gpu_agrees_with_transformers_and_peft() {
    // One GPU is enough for the whole model; kernels are tested on all of them.
    if let Some(device) = common::gpus_with(|_| ()).first() {
        check(device, 2);
        answers(device);
    }
}

/// The likeliest tokens after the chat, one by one through the cache.
fn answers(device: &Device) {
    let (model, json) = (load(device), json());
    let (prompt, wanted) = (ids(&json["greedy"]["prompt_ids"]), ids(&json["greedy"]["new_ids"]));
    let mut sampler = Sampler::new(Sampling::default()).unwrap();
    let got = generate(&model, &prompt, wanted.len(), &mut sampler, &[], |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(got, wanted, "{}", common::name(device));
}
