//! Checks the machine-independent parts of the files that `tests/interop` tests with other
//! programs. The digests are those it prints (`tests/interop/results`): a changed file must pass
//! there first. `tests/model/export.rs` compares merged models and exported adapters with those of
//! PEFT and llama.cpp.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::common::model::{path, repository};
use assert_cmd::Command;
use ndarray::Array2;
use qlora_wgpu::formats::peft::{ModulePatterns, PeftAdapter, PeftConfig, PeftModule, TargetModules, Targets};
use qlora_wgpu::internal::safetensors::SafetensorsFile;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Digest of a safetensors file's header: names, types and shapes.
fn header_digest(path: &Path) -> String {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    digest(&bytes[8..8 + length])
}

fn names(file: &SafetensorsFile) -> BTreeSet<&String> {
    file.names().iter().collect()
}

fn qlora(folder: &TempDir, arguments: &[&str]) {
    Command::cargo_bin("qlora").unwrap().current_dir(folder).args(arguments).assert().success();
}

/// Quantizes the llama model like `common.py`, to `NAME/model.safetensors`.
fn quantize(folder: &TempDir, name: &str, arguments: &[&str]) {
    fs::create_dir(folder.path().join(name)).unwrap();
    let source = path("llama");
    let (input, output) = (source.join("model.safetensors"), format!("{name}/model.safetensors"));
    let fixed = ["quantize", input.to_str().unwrap(), &output, "--include", r"_proj\.weight$"];
    qlora(folder, &[&fixed, arguments].concat());
    fs::copy(source.join("config.json"), folder.path().join(name).join("config.json")).unwrap();
}

#[test]
fn quantized_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    for (name, arguments, wanted) in [
        ("nf4", &["--format", "nf4"][..], "47a62c628fb130fd"),
        ("nf4_dq", &["--format", "nf4", "--double-quant"], "ca1ce98154958452"),
        ("fp4", &["--format", "fp4"], "3ecefaaf2034836c"),
        ("fp4_dq", &["--format", "fp4", "--double-quant"], "b4f58f224985ad75"),
    ] {
        quantize(&folder, name, arguments);
        let ours = folder.path().join(name).join("model.safetensors");
        assert_eq!(digest(&fs::read(&ours).unwrap()), wanted, "{name}");
        // Compares with the file that transformers wrote for this model, if it is recorded.
        let theirs = path(&format!("llama-bnb-{name}")).join("model.safetensors");
        if theirs.exists() {
            let (ours, theirs) = (SafetensorsFile::open(&ours).unwrap(), SafetensorsFile::open(&theirs).unwrap());
            assert_eq!(names(&ours), names(&theirs), "{name}");
            for key in theirs.names() {
                // Double quantization subtracts a mean from scales, whose last bit differs;
                // tests/quant/bitsandbytes.rs tests this closely.
                if name.ends_with("_dq") && (key.contains("absmax") || key.contains("quant_state")) {
                    continue;
                }
                let (ours, theirs) = (ours.tensor(key).unwrap(), theirs.tensor(key).unwrap());
                assert_eq!((ours.dtype, ours.shape), (theirs.dtype, theirs.shape), "{name}: {key}");
                assert!(ours.bytes == theirs.bytes, "{name}: {key}");
            }
        }
    }
}

/// An rsLoRA adapter with patterns, like the one that `peft_adapters.py` starts with.
fn patterns() -> PeftAdapter {
    let targets = TargetModules::regex(r".*\.(q_proj|v_proj|down_proj)").unwrap();
    let config = PeftConfig {
        use_rslora: true,
        targets: Targets::new(targets),
        rank_pattern: ModulePatterns::new([(r"layers\.1\.mlp\.down_proj", 2), ("q_proj", 6)]).unwrap(),
        alpha_pattern: ModulePatterns::new([(r"^model\.layers\.0\.mlp.*", 12.0), ("v_proj", 3.0)]).unwrap(),
        ..PeftConfig::new(4, 8.0)
    };
    let shapes = [("self_attn.q_proj", 64, 64), ("self_attn.v_proj", 32, 64), ("mlp.down_proj", 64, 192)];
    let modules = (0..2).flat_map(|layer| shapes.map(|shape| (layer, shape))).map(|(layer, (name, d_out, d_in))| {
        let path = format!("model.layers.{layer}.{name}");
        let rank = config.rank(&path);
        let a = Array2::from_shape_fn((rank, d_in), |(i, j)| ((i * 7 + j) % 11) as f32 / 64.0);
        (path, PeftModule { a, b: Array2::zeros((d_out, rank)), magnitude: None, bias: None })
    });
    PeftAdapter { modules: modules.collect(), config }
}

#[test]
fn trained_adapters() {
    let folder = tempfile::tempdir().unwrap();
    quantize(&folder, "nf4", &["--double-quant"]);
    patterns().write(folder.path().join("begun")).unwrap();
    let line = |i: u32| json!({ "input_ids": (0..24).map(|j| 3 + (i * 7 + j * j) % 125).collect::<Vec<_>>() });
    fs::write(folder.path().join("train.jsonl"), (0..4).map(|i| line(i).to_string() + "\n").collect::<String>())
        .unwrap();
    for (name, arguments, header, config) in [
        ("lora", &["--rank", "8", "--alpha", "16"][..], "e20c821a8ba78fd1", "8b2b6a250553f5ee"),
        ("rslora", &["--init-adapter", "begun"], "27293827145983e1", "9412790016d35c10"),
        ("dora", &["--rank", "4", "--alpha", "8", "--dora"], "7e98d0af65eea0f2", "40cdd10fd4f0d60a"),
    ] {
        let run = ["finetune", "--model", "nf4", "--data", "train.jsonl", "--output", name, "--device", "cpu"];
        qlora(&folder, &[&run, &["--max-steps", "1"][..], arguments].concat());
        let adapter = folder.path().join(name);
        assert_eq!(header_digest(&adapter.join("adapter_model.safetensors")), header, "{name}");
        let text = fs::read(adapter.join("adapter_config.json")).unwrap();
        let parsed: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(digest(&text), config, "{name}: {parsed:#}");
    }
}

#[test]
fn a_model_as_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let model = repository("cli/assets/tiny-glossary");
    let model = model.to_str().unwrap();
    fs::write(folder.path().join("train.txt"), "oath, n.").unwrap();
    let run = ["finetune", "--model", model, "--data", "train.txt", "--output", "idle", "--device", "cpu"];
    qlora(&folder, &[&run[..], &["--max-steps", "1", "--lr", "0", "--rank", "1"]].concat());
    qlora(&folder, &["merge", "--model", model, "--adapter", "idle", "--output", "idle.gguf", "--dtype", "f32"]);
    assert_eq!(digest(&fs::read(folder.path().join("idle.gguf")).unwrap()), "6ce9733d840cf666");
}
