//! `qlora inspect` on every kind of file and folder.

use std::fs;
use std::path::Path;

use crate::common;
use crate::common::model::path;
use assert_cmd::Command;
use serde_json::{Value, json};

fn inspect(path: &Path, flags: &[&str]) -> Command {
    let mut qlora = Command::cargo_bin("qlora").unwrap();
    qlora.arg("inspect").arg(path).args(flags);
    qlora
}

fn stdout(command: &mut Command) -> String {
    String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
}

fn json_of(path: &Path) -> Value {
    let report: Value = serde_json::from_str(&stdout(&mut inspect(path, &["--json"]))).unwrap();
    let keys: Vec<_> = report.as_object().unwrap().keys().map(String::as_str).collect();
    let wanted = [
        "path",
        "kind",
        "architecture",
        "name",
        "unsupported",
        "model",
        "adapter",
        "adapted_layers",
        "parameters",
        "bytes",
        "bits_per_weight",
        "formats",
        "tensors",
    ];
    assert_eq!(keys, wanted, "whatever the kind");
    for total in ["parameters", "bytes"] {
        for list in ["formats", "tensors"] {
            let sum: u64 = report[list].as_array().unwrap().iter().map(|item| item[total].as_u64().unwrap()).sum();
            assert_eq!(report[total].as_u64(), Some(sum), "{total} of {list}");
        }
    }
    report
}

fn failure(path: &Path) -> String {
    let output = inspect(path, &[]).assert().code(1).get_output().clone();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.stdout.is_empty() && error.lines().count() == 1, "{error}");
    assert!(error.starts_with(&format!("error: {}", path.display())), "{error}");
    error
}

/// The tensor with this name.
fn tensor<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["tensors"].as_array().unwrap().iter().find(|tensor| tensor["name"] == name).unwrap()
}

/// A GGUF file for the llama architecture: metadata, then F32, Q4_0 and IQ2_XXS tensors.
fn gguf() -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let string = |key: &str, value: &str| [text(key), 8_u32.to_le_bytes().to_vec(), text(value)].concat();
    let entries = [string("general.architecture", "llama"), string("general.name", "A test")];
    // Name, lengths (innermost first), type, bytes.
    let tensors: [(&str, &[u64], u32, usize); 4] =
        [("blk.0.w", &[64, 3], 2, 108), ("blk.1.w", &[64, 3], 2, 108), ("norm", &[5], 0, 20), ("odd", &[256], 16, 66)];
    let mut out = [b"GGUF", &3_u32.to_le_bytes()[..]].concat();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    out.extend(entries.concat());
    let mut data = 0_usize;
    for (name, lengths, kind, bytes) in tensors {
        out.extend(text(name));
        out.extend((lengths.len() as u32).to_le_bytes());
        out.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend((data as u64).to_le_bytes());
        data = (data + bytes).next_multiple_of(32);
    }
    out.resize(out.len().next_multiple_of(32) + data, 0);
    out
}

#[test]
fn a_checkpoint_of_bitsandbytes_has_its_true_shapes() {
    let dense = json_of(&path("llama"));
    for (name, format, double) in
        [("llama-bnb-nf4", "nf4", false), ("llama-bnb-nf4_dq", "nf4", true), ("llama-bnb-fp4_dq", "fp4", true)]
    {
        let packed = json_of(&path(name));
        assert_eq!((&packed["kind"], &packed["architecture"]), (&json!("checkpoint"), &json!("llama")));
        assert_eq!(packed["model"], dense["model"]);
        assert_eq!(packed["model"]["num_hidden_layers"], 2);
        assert_eq!((&packed["unsupported"], &packed["adapter"]), (&Value::Null, &Value::Null));
        assert_eq!(packed["parameters"], dense["parameters"], "{name}");
        let names = |report: &Value| -> Vec<Value> {
            report["tensors"].as_array().unwrap().iter().map(|tensor| tensor["name"].clone()).collect()
        };
        assert_eq!(names(&packed), names(&dense));

        let weight = tensor(&packed, "model.layers.1.self_attn.k_proj.weight");
        assert_eq!(weight["shape"], tensor(&dense, "model.layers.1.self_attn.k_proj.weight")["shape"]);
        assert_eq!((weight["format"].as_str(), weight["block"].as_u64()), (Some(format), Some(64)));
        assert_eq!(
            (weight["double_quantized"].as_bool(), weight["super_block"].as_u64()),
            (Some(double), double.then_some(256))
        );
        let file = common::model::file(&format!("{name}/model.safetensors"));
        let bytes: usize = file
            .names()
            .iter()
            .filter(|key| key.starts_with("model.layers.1.self_attn.k_proj.weight"))
            .map(|key| file.tensor(key).unwrap().bytes.len())
            .sum();
        assert_eq!(weight["bytes"].as_u64(), Some(bytes as u64));
        assert_eq!(
            weight["bits_per_weight"].as_f64(),
            Some(bytes as f64 * 8.0 / weight["parameters"].as_f64().unwrap())
        );
        let norm = tensor(&packed, "model.norm.weight");
        assert_eq!(
            (&norm["format"], &norm["block"], &norm["double_quantized"]),
            (&json!("F32"), &Value::Null, &json!(false))
        );
    }
    let table = stdout(&mut inspect(&path("llama-bnb-nf4_dq"), &[]));
    for part in
        ["nf4, blocks of 64, double-quantized", "model.layers.{0-1}.mlp.up_proj.weight", "115,008", "layers        2"]
    {
        assert!(table.contains(part), "{part} in\n{table}");
    }
    let all = stdout(&mut inspect(&path("llama-bnb-nf4_dq"), &["--all"]));
    assert!(
        all.contains("model.layers.1.mlp.up_proj.weight") && all.lines().count() == table.lines().count() + 9,
        "{all}"
    );
}

#[test]
fn adapters_show_their_config() {
    let report = json_of(&path("adapter-pattern"));
    let config = &report["adapter"];
    assert_eq!((&report["kind"], &report["adapted_layers"]), (&json!("adapter"), &json!(6)));
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(4)));
    assert_eq!(config["target_modules"], json!(["q_proj", "down_proj", "v_proj"]));
    assert_eq!(config["rank_pattern"], json!({"down_proj": 16}));
    assert_eq!((&config["use_rslora"], &config["use_dora"]), (&json!(false), &json!(false)));
    let adapter = common::model::adapter("adapter-pattern");
    let values: usize = adapter.modules.values().map(|module| module.a.len() + module.b.len()).sum();
    assert_eq!(report["parameters"].as_u64(), Some(values as u64));
    let table = stdout(&mut inspect(&path("adapter-pattern"), &[]));
    for part in ["tiny-llama", "down_proj: 16", "q_proj, down_proj, v_proj", "6 linear layers"] {
        assert!(table.contains(part), "{part} in\n{table}");
    }
    assert_eq!(json_of(&path("adapter-rslora_qv"))["adapter"]["use_rslora"], true);
    assert_eq!(json_of(&path("adapter-dora"))["adapter"]["use_dora"], true);
    assert!(stdout(&mut inspect(&path("adapter-dora"), &[])).contains("DoRA          true"));

    // An adapter of another kind: shows its tensors, and why it isn't supported.
    let folder = tempfile::tempdir().unwrap();
    fs::copy(path("adapter-lora/adapter_model.safetensors"), folder.path().join("adapter_model.safetensors")).unwrap();
    fs::write(folder.path().join("adapter_config.json"), r#"{"peft_type": "LOHA"}"#).unwrap();
    let report = json_of(folder.path());
    assert!(report["unsupported"].as_str().unwrap().contains("LOHA") && report["adapter"].is_null(), "{report}");
}

#[test]
fn gguf_and_safetensors_files_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    fs::write(&file, gguf()).unwrap();
    let report = json_of(&file);
    assert_eq!(
        (&report["kind"], &report["architecture"], &report["name"]),
        (&json!("gguf"), &json!("llama"), &json!("A test"))
    );
    assert!(report["unsupported"].as_str().unwrap().contains("llama.embedding_length"), "{report}");
    let weight = tensor(&report, "blk.1.w");
    assert_eq!((&weight["format"], &weight["shape"], &weight["bytes"]), (&json!("Q4_0"), &json!([3, 64]), &json!(108)));
    assert_eq!(weight["bits_per_weight"], 4.5);
    assert_eq!(tensor(&report, "odd")["format"], "IQ2_XXS", "which is not read, but known");
    assert_eq!(report["formats"][0]["format"], "Q4_0");
    let table = stdout(&mut inspect(&file, &[]));
    assert!(table.contains("blk.{0-1}.w") && table.contains("IQ2_XXS"), "{table}");
    // The contents decide, whatever the name.
    let other = folder.path().join("x.bin");
    fs::copy(&file, &other).unwrap();
    assert_eq!(json_of(&other)["tensors"], report["tensors"]);

    let report = json_of(&path("llama.golden_logits.safetensors"));
    assert_eq!((&report["kind"], &tensor(&report, "input_ids")["format"]), (&json!("safetensors"), &json!("I64")));
}

#[test]
fn shards_are_one_model_and_configs_that_are_not_supported_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let config = fs::read_to_string(path("llama/config.json")).unwrap();
    fs::write(
        folder.path().join("config.json"),
        config.replace(r#""model_type": "llama""#, r#""model_type": "gemma""#),
    )
    .unwrap();
    fs::copy(path("llama/model.safetensors"), folder.path().join("model-1.safetensors")).unwrap();
    let dense = json_of(&path("llama"));
    let names = dense["tensors"].as_array().unwrap().iter().map(|tensor| tensor["name"].as_str().unwrap().to_owned());
    let map: serde_json::Map<String, Value> = names.map(|name| (name, json!("model-1.safetensors"))).collect();
    fs::write(folder.path().join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    let report = json_of(folder.path());
    assert_eq!((&report["tensors"], &report["architecture"]), (&dense["tensors"], &json!("gemma")));
    assert!(report["unsupported"].as_str().unwrap().contains("gemma") && report["model"].is_null(), "{report}");
}

#[test]
fn what_is_wrong_with_a_path_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let write = |name: &str, bytes: &[u8]| fs::write(at(name), bytes).unwrap();
    assert!(failure(&at("none")).contains("no such file or directory"));
    write("notes.txt", b"Some text.");
    assert!(failure(&at("notes.txt")).contains("neither a GGUF nor a .safetensors file"));
    assert!(failure(folder.path()).contains("neither config.json nor adapter_config.json"));
    let whole = gguf();
    for len in [0, 3, 20, 100, whole.len() - 96] {
        write("cut.gguf", &whole[..len]);
        let error = failure(&at("cut.gguf"));
        assert!(error.contains("not a GGUF file") || error.contains("copy or download it again"), "{error}");
    }
    assert!(failure(folder.path()).contains("cut.gguf"), "which may be what was meant");
    let tensors = fs::read(path("llama/model.safetensors")).unwrap();
    for len in [4, 100, 3000] {
        write("model.safetensors", &tensors[..len]);
        let error = failure(&at("model.safetensors"));
        assert!(error.contains("too short") || error.contains("is truncated"), "{error}");
    }
    write("config.json", b"{\"model_type\": \"lla");
    let output = inspect(folder.path(), &[]).assert().code(1).get_output().stderr.clone();
    let error = String::from_utf8(output).unwrap();
    assert!(error.contains("config.json") && error.contains("truncated"), "{error}");
}
