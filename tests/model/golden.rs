//! Logits of the recorded models and adapters (transformers and PEFT), on every device and tier.

use crate::common;
use std::ops::ControlFlow;

use crate::common::model::{adapter, distance, f32s, file, load, logits, path, tokens};
use crate::common::tolerances::{LOGITS, MERGED};
use qlora_wgpu::device::Tier;
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::{PeftConfig, TargetModules, Targets};
use qlora_wgpu::generate::{Sampler, Sampling, generate};
use qlora_wgpu::internal::safetensors::{OutData, OutTensor, write};
use qlora_wgpu::nn::{Decoder, Tokens};
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::{Device, Error, ModelFiles};

/// A model, the file of its logits, and the files of each form of its base.
type Model = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

/// The recorded models.
const MODELS: [Model; 3] = [
    (
        "llama",
        "llama.golden_logits.safetensors",
        &[
            ("llama", "logits.base_fp32"),
            ("llama-bnb-nf4", "logits.nf4_dequant"),
            ("llama-bnb-nf4_dq", "logits.nf4_dq_dequant"),
            ("llama-bnb-fp4_dq", "logits.fp4_dq_dequant"),
        ],
    ),
    (
        "qwen2",
        "qwen2.golden_logits.safetensors",
        &[("qwen2", "logits.base_fp32"), ("qwen2-bnb-nf4_dq", "logits.nf4_dq_dequant")],
    ),
    (
        "qwen3",
        "qwen3.golden_logits.safetensors",
        &[("qwen3", "logits.base_fp32"), ("qwen3-bnb-nf4_dq", "logits.nf4_dq_dequant")],
    ),
];

fn check(device: &Device, what: &str, got: &[f32], wanted: &[f32]) {
    let distance = distance(got, wanted);
    assert!(distance <= LOGITS.on(device), "{} {what}: {distance:e}", common::name(device));
}

#[test]
fn logits_of_every_model_and_base_are_those_of_transformers() {
    for device in common::devices() {
        for (_, golden, bases) in MODELS {
            let golden = file(golden);
            let tokens = tokens(&golden, "input_ids", None);
            for (directory, key) in bases {
                check(&device, directory, &logits(&load(&device, directory), &tokens), &f32s(&golden, key));
            }
        }
    }
}

#[test]
fn padded_sequences_have_the_logits_of_transformers_where_there_are_tokens() {
    for device in common::devices() {
        for (directory, golden, _) in MODELS {
            let golden = file(golden);
            let tokens = tokens(&golden, "input_ids", Some("padded.attention_mask"));
            assert!(tokens.segments.contains(&0), "some are padding");
            let got = logits(&load(&device, directory), &tokens);
            let wanted = f32s(&golden, "padded.logits.base_fp32");
            let vocabulary = wanted.len() / tokens.ids.len();
            assert!(got.iter().all(|logit| logit.is_finite()));
            for at in (0..tokens.ids.len()).filter(|&at| tokens.segments[at] != 0) {
                let row = at * vocabulary..(at + 1) * vocabulary;
                check(&device, &format!("{directory} token {at}"), &got[row.clone()], &wanted[row]);
            }
        }
    }
}

#[test]
fn a_model_quantized_while_it_loads_is_the_one_that_bitsandbytes_wrote() {
    let device = Device::cpu();
    let golden = file("llama.golden_logits.safetensors");
    let tokens = tokens(&golden, "input_ids", None);
    for (options, directory) in
        [(QuantOptions::nf4(), "llama-bnb-nf4"), (QuantOptions::nf4().double_quant(), "llama-bnb-nf4_dq")]
    {
        let model = ModelFiles::open(path("llama")).unwrap().load(&device, &BaseFormat::Quantize(options)).unwrap();
        let (ours, theirs) = (logits(&model, &tokens), logits(&load(&device, directory), &tokens));
        let distance = distance(&ours, &theirs);
        // For double-quantized scales, bitsandbytes rounds a few through a lookup table.
        assert!(distance <= if directory.ends_with("dq") { 1e-2 } else { 0.0 }, "{directory}: {distance:e}");
    }
}

#[test]
fn adapters_have_the_logits_of_peft() {
    let golden = file("llama.golden_adapter_logits.safetensors");
    let tokens = tokens(&golden, "input_ids", None);
    for device in common::devices() {
        let mut model = load(&device, "llama-bnb-nf4_dq");
        let base = logits(&model, &tokens);
        for name in ["lora", "rslora_qv", "dora", "pattern"] {
            model.attach_peft(name, &adapter(&format!("adapter-{name}"))).unwrap();
            let got = logits(&model, &tokens);
            check(&device, name, &got, &f32s(&golden, &format!("logits.{name}")));
            assert!(distance(&got, &base) > 0.01, "{name} changes something");
            model.deactivate().unwrap();
        }
        assert_eq!(logits(&model, &tokens), base, "the base is as it was");
        model.activate("lora").unwrap();
        check(&device, "lora again", &logits(&model, &tokens), &f32s(&golden, "logits.lora"));
    }
}

#[test]
fn adapters_of_different_layers_and_ranks_switch_to_the_bit_in_any_order() {
    let golden = file("llama.golden_adapter_logits.safetensors");
    let tokens = tokens(&golden, "input_ids", None);
    // All linear layers; q_proj and v_proj; magnitudes too; ranks that differ from layer to layer.
    let names = ["lora", "rslora_qv", "dora", "pattern"];
    for device in common::devices() {
        let alone = |name: Option<&str>| {
            let mut model = load(&device, "llama-bnb-nf4_dq");
            if let Some(name) = name {
                model.attach_peft(name, &adapter(&format!("adapter-{name}"))).unwrap();
            }
            logits(&model, &tokens)
        };
        let mut wanted: Vec<_> = names.iter().map(|&name| (Some(name), alone(Some(name)))).collect();
        wanted.push((None, alone(None)));
        let mut model = load(&device, "llama-bnb-nf4_dq");
        // Attached in an order in which layers of the previous adapter must go back to their base.
        for (name, wanted) in &wanted[..names.len()] {
            let name = name.unwrap();
            model.attach_peft(name, &adapter(&format!("adapter-{name}"))).unwrap();
            assert!(&logits(&model, &tokens) == wanted, "{} {name}, just attached", common::name(&device));
        }
        let check = |model: &Decoder, at: usize, before: usize| {
            let equal = logits(model, &tokens) == wanted[at].1;
            assert!(equal, "{} {:?} after {:?}", common::name(&device), wanted[at].0, wanted[before].0);
        };
        // Every adapter after every other.
        for before in 0..wanted.len() {
            for at in 0..wanted.len() {
                for index in [before, at] {
                    match wanted[index].0 {
                        Some(name) => model.activate(name).unwrap(),
                        None => model.deactivate().unwrap(),
                    }
                }
                check(&model, at, before);
            }
        }
        model.activate("dora").unwrap();
        let error = model.activate("none").unwrap_err().to_string();
        assert!(error.contains("dora, lora, pattern, rslora_qv"), "{error}");
        check(&model, 2, 2);
    }
}

#[test]
fn merged_models_have_the_logits_of_peft() {
    let golden = file("llama.golden_adapter_logits.safetensors");
    let tokens = tokens(&golden, "input_ids", None);
    for device in common::devices() {
        for name in ["lora", "dora"] {
            let mut model = load(&device, "llama-bnb-nf4_dq");
            model.attach_peft(name, &adapter(&format!("adapter-{name}"))).unwrap();
            let directory = tempfile::tempdir().unwrap();
            write_merged(&model, directory.path());
            let merged = ModelFiles::open(directory.path()).unwrap().load(&device, &BaseFormat::AsIs).unwrap();
            check(&device, name, &logits(&merged, &tokens), &f32s(&golden, &format!("logits.{name}.merged")));
            let (_, q) = model.linears().next().unwrap();
            let wanted = f32s(&golden, &format!("merged.{name}.model.layers.0.self_attn.q_proj.weight"));
            let distance = distance(q.merge_to_f32().unwrap().as_slice().unwrap(), &wanted);
            assert!(distance <= MERGED.on(&device), "{} {name}: {distance:e}", common::name(&device));
        }
        let requantized = file("llama-bnb-nf4_dq-merged-lora/golden.safetensors");
        let got = logits(&load(&device, "llama-bnb-nf4_dq-merged-lora"), &tokens);
        check(&device, "merged and quantized again", &got, &f32s(&requantized, "logits"));
    }
}

/// Writes the model's merged linear layers, and all other tensors of the original, as a directory.
fn write_merged(model: &Decoder, directory: &std::path::Path) {
    let source = file("llama/model.safetensors");
    let merged: Vec<(String, ndarray::Array2<f32>)> =
        model.linears().map(|(path, linear)| (format!("{path}.weight"), linear.merge_to_f32().unwrap())).collect();
    let tensors = source
        .names()
        .iter()
        .map(|name| {
            let original = source.tensor(name).unwrap();
            let bytes = match merged.iter().find(|(other, _)| other == name) {
                Some((_, weight)) => bytemuck::cast_slice(weight.as_slice().unwrap()).to_vec(),
                None => original.bytes.to_vec(),
            };
            OutTensor {
                name: name.clone(),
                dtype: original.dtype,
                shape: original.shape.to_vec(),
                data: OutData::Bytes(bytes.into()),
            }
        })
        .collect();
    write(&directory.join("model.safetensors"), tensors, Default::default()).unwrap();
    std::fs::copy(path("llama/config.json"), directory.join("config.json")).unwrap();
}

#[test]
fn what_does_not_fit_is_an_error_and_changes_nothing() {
    let device = Device::cpu();
    let golden = file("llama.golden_adapter_logits.safetensors");
    let tokens = tokens(&golden, "input_ids", None);
    let mut model = load(&device, "llama-bnb-nf4_dq");
    let before = logits(&model, &tokens);

    let mut wrong = adapter("adapter-lora");
    let module = wrong.modules.remove("model.layers.1.mlp.up_proj").unwrap();
    wrong.modules.insert("model.layers.7.mlp.up_proj".into(), module.clone());
    let error = model.attach_peft("wrong", &wrong).unwrap_err().to_string();
    assert_eq!(
        error,
        "adapters of a model: a module of the adapter is model.layers.7.mlp.up_proj; the model's linear layers are \
         model.layers.0.self_attn.q_proj to model.layers.1.mlp.down_proj"
    );

    let mut wrong = adapter("adapter-lora");
    wrong.modules.insert("model.layers.1.self_attn.q_proj".into(), module);
    let error = model.attach_peft("wrong", &wrong).unwrap_err().to_string();
    assert_eq!(
        error,
        "adapters of a model: adapter's layer [d_out, d_in]: expected [64, 64] for model.layers.1.self_attn.q_proj, \
         got [192, 64]"
    );

    let mut biased = adapter("adapter-lora");
    biased.config.lora_bias = true;
    let error = model.attach_peft("biased", &biased).unwrap_err().to_string();
    assert!(error.contains("lora_bias is true"), "{error}");
    assert_eq!(
        model.attach("biased", &biased.config, 0).unwrap_err().to_string(),
        "adapters of a model: lora_bias is true; biases of lora_B aren't supported"
    );

    assert!(matches!(model.activate("wrong"), Err(Error::NoSuchAdapter { .. })));
    assert_eq!(logits(&model, &tokens), before);

    model.attach_peft("lora", &adapter("adapter-lora")).unwrap();
    assert_eq!(
        model.attach_peft("lora", &adapter("adapter-lora")).unwrap_err().to_string(),
        "adapters of a model: the adapter's name is lora; the model already has an adapter of this name"
    );
}

#[test]
fn padding_on_the_left_and_packing_change_nothing_for_a_sequence() {
    let sequences: [&[u32]; 2] = [&[5, 17, 99, 3, 64, 21, 8], &[44, 2, 120, 7]];
    let (length, vocabulary) = (12, 128);
    for device in common::devices() {
        for name in ["llama", "qwen3-bnb-nf4_dq"] {
            let model = load(&device, name);
            let alone: Vec<Vec<f32>> =
                sequences.iter().map(|ids| logits(&model, &Tokens::new(ids.to_vec(), 1).unwrap())).collect();
            // Left-padded, one row each.
            let (mut ids, mut mask) = (Vec::new(), Vec::new());
            for sequence in sequences {
                let padding = length - sequence.len();
                ids.extend(std::iter::repeat_n(0, padding).chain(sequence.iter().copied()));
                mask.extend(std::iter::repeat_n(0, padding).chain(sequence.iter().map(|_| 1)));
            }
            let padded = logits(&model, &Tokens::masked(ids, 2, &mask).unwrap());
            // Both in one row, padded on the right.
            let ids: Vec<u32> = sequences.concat().into_iter().chain([0]).collect();
            let segments = (0..ids.len() as u32).map(|at| [1, 2, 0][usize::from(at >= 7) + usize::from(at >= 11)]);
            let packed = logits(&model, &Tokens::packed(ids, 1, segments.collect()).unwrap());
            for (row, (alone, start)) in alone.iter().zip([0, 7]).enumerate() {
                let end = (row + 1) * length * vocabulary;
                check(&device, &format!("{name} left-padded"), &padded[end - alone.len()..end], alone);
                let at = start * vocabulary;
                check(&device, &format!("{name} packed"), &packed[at..at + alone.len()], alone);
            }
        }
    }
}

#[test]
fn targets_that_cannot_have_an_adapter_are_an_error() {
    let mut model = load(&Device::cpu(), "llama-bnb-nf4_dq");
    let config = |names: &[&str]| {
        let mut config = PeftConfig::new(4, 8.0);
        config.targets = Targets::new(TargetModules::names(names.iter().copied()));
        config
    };
    let error = model.attach("new", &config(&["q_proj", "lm_head"]), 0).unwrap_err().to_string();
    assert_eq!(
        error,
        "adapters of a model: target_modules is q_proj, lm_head; it matches lm_head, but only linear layers inside \
         the decoder can have adapters"
    );
    let error = model.attach("new", &config(&["query"]), 0).unwrap_err().to_string();
    assert_eq!(
        error,
        "adapters of a model: target_modules is query; no linear layer of the model matches; it has \
         model.layers.0.self_attn.q_proj to model.layers.1.mlp.down_proj"
    );
    assert_eq!(model.attach("new", &config(&["q_proj", "down_proj"]), 0).unwrap(), 4);
    assert_eq!(model.attach("all", &PeftConfig::new(4, 8.0), 0).unwrap(), 14);
}

#[test]
fn tokens_that_come_one_after_another_have_the_logits_of_all_at_once() {
    let ids = [5, 17, 99, 3, 64, 21, 8, 100];
    for device in common::devices() {
        for name in ["llama-bnb-nf4_dq", "qwen2", "qwen3"] {
            let mut model = load(&device, name);
            if name.starts_with("llama") {
                model.attach_peft("lora", &adapter("adapter-lora")).unwrap();
            }
            let whole = logits(&model, &Tokens::new(ids.to_vec(), 1).unwrap());
            let vocabulary = whole.len() / ids.len();
            let mut cache = model.cache(ids.len()).unwrap();
            let mut at = 0;
            // A prompt, then tokens one by one, then two again after going back.
            for step in [3, 1, 1, 3] {
                let got = model.extend(&mut cache, &ids[at..at + step]).unwrap().to_vec().unwrap();
                at += step;
                check(&device, &format!("{name} {at}"), &got, &whole[(at - 1) * vocabulary..at * vocabulary]);
            }
            assert!(model.extend(&mut cache, &[1]).unwrap_err().to_string().contains("room for 1 to 0"));
            cache.truncate(6);
            let got = model.extend(&mut cache, &ids[6..]).unwrap().to_vec().unwrap();
            check(&device, &format!("{name} again"), &got, &whole[7 * vocabulary..]);
        }
    }
}

#[test]
fn generation_takes_the_likeliest_token_and_stops() {
    let model = load(&Device::cpu(), "llama-bnb-nf4_dq");
    let prompt = [5, 17, 99];
    let run = |most, stop: &[u32]| {
        let mut sampler = Sampler::new(Sampling::default()).unwrap();
        let mut heard = Vec::new();
        let answer = generate(&model, &prompt, most, &mut sampler, stop, |token| {
            heard.push(token);
            std::ops::ControlFlow::Continue(())
        });
        assert_eq!(heard, *answer.as_ref().unwrap());
        answer.unwrap()
    };
    let answer = run(6, &[]);
    assert_eq!(answer.len(), 6);
    let mut ids = prompt.to_vec();
    for &token in &answer {
        let all = logits(&model, &Tokens::new(ids.clone(), 1).unwrap());
        let last = &all[all.len() - 128..];
        let best = (0..128).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        assert_eq!(token as usize, best);
        ids.push(token);
    }
    let first = answer.iter().position(|&token| token == answer[3]).unwrap();
    assert_eq!(run(6, &[answer[3]]), answer[..first]);
    let error = generate(&model, &[1; 128], 1, &mut Sampler::new(Sampling::default()).unwrap(), &[], |_| {
        std::ops::ControlFlow::Continue(())
    });
    assert!(error.unwrap_err().to_string().contains("128 positions"));
}

#[test]
fn every_device_draws_the_same_answer_with_one_submission_a_token() {
    let sampling = Sampling { temperature: 0.9, top_k: 50, top_p: 0.95, seed: 5 };
    let run = |model: &Decoder, most: usize, stop: &[u32], breaks_at: usize| {
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut one = || {
            let mut heard = Vec::new();
            let answer = generate(model, &[5, 17, 99], most, &mut sampler, stop, |token| {
                heard.push(token);
                if heard.len() == breaks_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert_eq!(heard, *answer.as_ref().unwrap());
            heard
        };
        // The second continues with the sampler of the first, wherever that one ended.
        (one(), one())
    };
    let cpu = load(&Device::cpu(), "llama-bnb-nf4_dq");
    let (whole, again) = run(&cpu, 12, &[], 0);
    assert_eq!((whole.len(), again.len()), (12, 12));
    assert_ne!(whole, again);
    let stop = [whole[6]];
    for device in common::devices() {
        let model = load(&device, "llama-bnb-nf4_dq");
        assert_eq!(run(&model, 12, &[], 0), (whole.clone(), again.clone()), "{device:?}");
        assert_eq!(run(&model, 12, &stop, 0), run(&cpu, 12, &stop, 0), "{device:?}: a token that ends it");
        assert_eq!(run(&model, 12, &[], 4), run(&cpu, 12, &[], 4), "{device:?}: the listener ends it");
        assert_eq!(run(&model, 0, &[], 0), (vec![], vec![]), "{device:?}");
    }
    // Separate devices for this test, so that no other test adds submissions: one reports each
    // token, one runs ahead.
    for tier in [None, Some(Tier::Plain)] {
        for device in common::gpus_with(|options| options.tier = tier) {
            let model = load(&device, "llama-bnb-nf4_dq");
            let Device::Gpu(gpu) = &device else { unreachable!("they are GPUs") };
            let submissions = |most| {
                let before = gpu.submissions();
                run(&model, most, &[], 0);
                gpu.submissions() - before
            };
            assert_eq!(submissions(10) - submissions(4), 2 * 6, "{device:?}: two answers of six more tokens");
        }
    }
}
