//! Merged models and exported adapters: checks the files' contents, and that models read from them
//! compute the same.

use crate::common;
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::common::model::{adapter, distance, f32s, file, logits, path, tokens};
use crate::common::tolerances::{LOGITS, MERGED};
use ndarray::{Array1, Array2};
use qlora_wgpu::export::{DirectoryOptions, Merged, Progress, write_gguf_adapter};
use qlora_wgpu::formats::checkpoint::{BaseFormat, Checkpoint};
use qlora_wgpu::formats::peft::{PeftAdapter, PeftConfig, PeftModule, TargetModules, Targets};
use qlora_wgpu::internal::MatrixSpec;
use qlora_wgpu::internal::gguf::{GgufFile, RowOrder, TensorType};
use qlora_wgpu::nn::{Decoder, ModelConfig, Tokens};
use qlora_wgpu::quant::HostMatrix;
use qlora_wgpu::quant::{Dtype, QuantOptions};
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::{Device, Error, ModelFiles};
use serde_json::{Value, json};
use tempfile::TempDir;

fn go_on(_: Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Byte-level BPE with 128 tokens: printable ASCII, some merges, and a special token.
fn tokenizer_json() -> Value {
    let mut vocabulary: Vec<String> = (33..127_u8).map(|byte| char::from(byte).to_string()).collect();
    vocabulary.extend(["Ġ", "Ċ", "th", "the", "Ġthe", "an", "Ġa"].map(String::from));
    vocabulary.extend((vocabulary.len()..127).map(|i| format!("zz{i}")));
    let vocabulary: serde_json::Map<_, _> = vocabulary.into_iter().zip((0..).map(|id: u32| json!(id))).collect();
    json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 127, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "vocab": vocabulary,
            "merges": [["t", "h"], ["th", "e"], ["Ġ", "the"], ["a", "n"], ["Ġ", "a"]],
        },
    })
}

/// A recorded model, with a tokenizer and other files beside it.
fn model(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(path(name).join(file), folder.path().join(file)).unwrap();
    }
    for (file, text) in [
        ("tokenizer.json", tokenizer_json().to_string()),
        (
            "tokenizer_config.json",
            json!({"bos_token": "<|end|>", "eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}"})
                .to_string(),
        ),
        ("LICENSE", "as you like".into()),
        ("weights.bin", "not these".into()),
    ] {
        fs::write(folder.path().join(file), text).unwrap();
    }
    folder
}

/// Makes an adapter with given values on every linear layer, with different ranks and alphas.
fn made(model: &Path) -> PeftAdapter {
    let mut config = PeftConfig::new(4, 6.0);
    config.use_rslora = true;
    config.targets = Targets::new(TargetModules::AllLinear);
    let spec = ModelFiles::open(model).unwrap().spec(&BaseFormat::AsIs).unwrap();
    let values = |rows: usize, cols: usize, seed: f32| {
        Array2::from_shape_fn((rows, cols), |(i, j)| 0.05 * ((i * cols + j) as f32 * 0.7 + seed).sin())
    };
    let module = |(i, (path, matrix)): (usize, (String, &MatrixSpec))| {
        let (a, b) = (values(4, matrix.cols, i as f32), values(matrix.rows, 4, 0.5 + i as f32));
        (path, PeftModule { a, b, magnitude: None, bias: None })
    };
    PeftAdapter { config, modules: spec.linears().enumerate().map(module).collect() }
}

fn open(path: &Path) -> Decoder {
    ModelFiles::open(path)
        .and_then(|files| files.load(&Device::cpu(), &BaseFormat::AsIs))
        .unwrap_or_else(|error| panic!("{error}"))
}

/// The values of a matrix, row by row.
fn values(matrix: &HostMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.dequantize_rows(0..matrix.rows(), &mut values);
    values
}

fn some_tokens() -> Tokens {
    Tokens::new((0..24).map(|i| i * 37 % 127).collect(), 2).unwrap()
}

/// Logits of the model in `path`, with an adapter beside it.
fn adapted(path: &Path, adapter: &PeftAdapter) -> Vec<f32> {
    let mut model = open(path);
    model.attach_peft("a", adapter).unwrap();
    logits(&model, &some_tokens())
}

#[test]
fn merged_directories_are_pefts() {
    let golden = file("llama.golden_adapter_logits.safetensors");
    let tokens = tokens(&golden, "input_ids", None);
    for name in ["lora", "dora"] {
        let (adapter, folder) = (adapter(&format!("adapter-{name}")), tempfile::tempdir().unwrap());
        let output = folder.path().join("new/merged");
        let files = ModelFiles::open(path("llama-bnb-nf4_dq")).unwrap();
        let merged = Merged::new(&files, &adapter).unwrap();
        merged.write_directory(&output, &DirectoryOptions::new(Dtype::F32), &go_on).unwrap();

        let distance = |got: &[f32], key: &str| distance(got, &f32s(&golden, key));
        let weight = "model.layers.0.self_attn.q_proj.weight";
        let got = Checkpoint::open(&output).unwrap().matrix(weight, 64, 64, &BaseFormat::AsIs).unwrap();
        assert!(distance(&values(&got), &format!("merged.{name}.{weight}")) <= MERGED.f32.relative, "{name}");
        assert!(
            distance(&logits(&open(&output), &tokens), &format!("logits.{name}.merged")) <= LOGITS.f32.relative,
            "{name}"
        );
    }
}

#[test]
fn a_directory_has_everything_of_its_source() {
    let source = model("llama");
    let adapter = made(source.path());
    let expected = adapted(source.path(), &adapter);
    let files = ModelFiles::open(source.path()).unwrap();
    let merged = Merged::new(&files, &adapter).unwrap();
    let output = source.path().join("merged");
    for (dtype, shard, files, tolerance) in [
        (Dtype::F32, u64::MAX, 1, 1e-5),
        (Dtype::Bf16, 60_000, 5, 0.05),
        (Dtype::F16, 60_000, 5, 0.005),
        (Dtype::F16, u64::MAX, 1, 0.005),
    ] {
        // Writes into the folder from before.
        let options = DirectoryOptions { max_shard_bytes: shard, ..DirectoryOptions::new(dtype) };
        merged.write_directory(&output, &options, &go_on).unwrap();
        let got = logits(&open(&output), &some_tokens());
        assert!(distance(&got, &expected) <= tolerance, "{dtype}: {}", distance(&got, &expected));

        let mut names: Vec<String> =
            fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let small = names.extract_if(.., |name| !name.starts_with("model")).collect::<Vec<_>>();
        assert_eq!(
            small,
            ["LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        );
        let tensors = names.iter().filter(|name| name.ends_with(".safetensors")).count();
        assert_eq!((tensors, names.len() - tensors), (files, usize::from(files > 1)), "{names:?}");
        let config = ModelConfig::read(&output).unwrap();
        assert_eq!(config.dtype, Some(dtype));
        assert_eq!(ModelConfig { dtype: None, ..config }, ModelConfig { dtype: None, ..merged.config().clone() });
        for small in small.iter().filter(|name| *name != "config.json") {
            assert_eq!(fs::read(output.join(small)).unwrap(), fs::read(source.path().join(small)).unwrap(), "{small}");
        }
    }
}

#[test]
fn requantized_directories_are_bitsandbytes() {
    let adapter = adapter("adapter-lora");
    let files = ModelFiles::open(path("llama-bnb-nf4_dq")).unwrap();
    let merged = Merged::new(&files, &adapter).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let quant = QuantOptions::nf4().double_quant();
    let options = DirectoryOptions { requantize: Some(quant), ..DirectoryOptions::new(Dtype::F32) };
    merged.write_directory(folder.path(), &options, &go_on).unwrap();

    let golden = Checkpoint::open(path("llama-bnb-nf4_dq-merged-lora")).unwrap();
    let ours = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(ours.names().collect::<Vec<_>>(), golden.names().collect::<Vec<_>>());
    assert!(ModelConfig::read(folder.path()).unwrap().quantized);
    let config = ModelConfig::read(folder.path()).unwrap();
    for (module, (d_out, d_in)) in
        [("self_attn.q_proj", (64, config.hidden_size)), ("mlp.down_proj", (64, config.intermediate_size))]
    {
        let name = format!("model.layers.1.{module}.weight");
        let read = |checkpoint: &Checkpoint| values(&checkpoint.matrix(&name, d_out, d_in, &BaseFormat::AsIs).unwrap());
        // Codes of scales may differ by one from bitsandbytes', which doesn't always find the
        // nearest code.
        assert!(distance(&read(&ours), &read(&golden)) < 1e-3, "{name}");
    }
    let (got, wanted) = (
        logits(&open(folder.path()), &some_tokens()),
        logits(&open(&path("llama-bnb-nf4_dq-merged-lora")), &some_tokens()),
    );
    assert!(distance(&got, &wanted) < 0.02, "{}", distance(&got, &wanted));
}

#[test]
fn gguf_files_are_the_same_models() {
    for name in ["llama", "qwen2", "qwen3"] {
        let source = model(name);
        let adapter = made(source.path());
        let mut adapted = open(source.path());
        adapted.attach_peft("a", &adapter).unwrap();
        let expected = logits(&adapted, &some_tokens());
        let head_dim = adapted.config().head_dim;
        let files = ModelFiles::open(source.path()).unwrap();
        let merged = Merged::new(&files, &adapter).unwrap();
        for (kind, tolerance) in [
            (TensorType::F32, 1e-5),
            (TensorType::F16, 0.005),
            (TensorType::Bf16, 0.05),
            // A bound from all weights' errors together would be too loose; see the check below.
            (TensorType::Q8_0, f64::INFINITY),
            (TensorType::Q4_0, f64::INFINITY),
        ] {
            let output = source.path().join("merged.gguf");
            merged.write_gguf(&output, kind, &go_on).unwrap();
            let file = GgufFile::open(&output).unwrap();
            assert_eq!(file.tensor("blk.0.ffn_up.weight").unwrap().kind, kind);
            assert_eq!(file.tensor("output_norm.weight").unwrap().kind, TensorType::F32);
            let config = ModelConfig::from_gguf(&file).unwrap();
            let ours = merged.config().clone();
            let (dtype, bos_token_id, eos_token_ids) = (ours.dtype, ours.bos_token_id, ours.eos_token_ids.clone());
            let same = ModelConfig { dtype, bos_token_id, eos_token_ids, ..config };
            assert_eq!(same, ModelConfig { quantized: false, ..ours }, "{name}");
            let got = logits(&open(&output), &some_tokens());
            assert!(distance(&got, &expected) <= tolerance, "{name} {kind}: {}", distance(&got, &expected));

            // Relative to the largest value of a block: half a step, or for Q4_0 a whole one,
            // because it has no code for -d * 8. The scale is an f16.
            let step = match kind {
                TensorType::Q8_0 => 0.5 / 127.0,
                TensorType::Q4_0 => 1.0 / 8.0,
                _ => 1.0 / 256.0,
            };
            let q_order = if name == "llama" { RowOrder::Interleaved { head_dim } } else { RowOrder::Plain };
            for (theirs, module, order) in
                [("attn_q", "self_attn.q_proj", q_order), ("ffn_down", "mlp.down_proj", RowOrder::Plain)]
            {
                let path = format!("model.layers.1.{module}");
                let linear = adapted.linears().find(|(known, _)| *known == path).unwrap().1;
                let wanted = linear.merge_to_f32().unwrap().into_raw_vec_and_offset().0;
                let key = format!("blk.1.{theirs}.weight");
                let got = values(&file.matrix(&key, linear.d_out(), linear.d_in(), order, &BaseFormat::AsIs).unwrap());
                for (got, wanted) in got.chunks(32).zip(wanted.chunks(32)) {
                    let most = wanted.iter().fold(0.0, |most: f64, &value| most.max(f64::from(value).abs()));
                    assert!(distance(got, wanted) <= (step + 1.0 / 2048.0) * most, "{name} {kind} {key}");
                }
            }
        }
        check_tokenizers(&source.path().join("merged.gguf"), source.path());
    }
}

/// Checks that both have the same ids for some texts, the same special tokens and the same chat
/// template.
fn check_tokenizers(gguf: &Path, folder: &Path) {
    let ours = Tokenizer::from_gguf(&GgufFile::open(gguf).unwrap()).unwrap();
    let theirs = Tokenizer::from_dir(folder).unwrap();
    for text in ["the man and the cat", "a\n\nb  c<|end|>d", "Then, 1234 (of 5)!"] {
        assert_eq!(ours.encode(text, true).unwrap(), theirs.encode(text, true).unwrap(), "{text}");
    }
    assert_eq!((ours.bos(), ours.eos(), ours.chat_template()), (theirs.bos(), theirs.eos(), theirs.chat_template()));
}

#[test]
fn gguf_files_become_gguf_files_and_directories() {
    let source = model("llama");
    let none = PeftAdapter { modules: BTreeMap::new(), ..made(source.path()) };
    let base = source.path().join("base.gguf");
    let files = ModelFiles::open(source.path()).unwrap();
    Merged::new(&files, &none).unwrap().write_gguf(&base, TensorType::F32, &go_on).unwrap();
    assert_eq!(logits(&open(&base), &some_tokens()), logits(&open(source.path()), &some_tokens()), "to the bit");

    let adapter = made(&base);
    let files = ModelFiles::open(&base).unwrap();
    let merged = Merged::new(&files, &adapter).unwrap();
    let (gguf, folder) = (source.path().join("merged.gguf"), source.path().join("merged"));
    merged.write_gguf(&gguf, TensorType::F32, &go_on).unwrap();
    merged.write_directory(&folder, &DirectoryOptions::new(Dtype::F32), &go_on).unwrap();
    let expected = adapted(&base, &adapter);
    for path in [&gguf, &folder] {
        let got = logits(&open(path), &some_tokens());
        assert!(distance(&got, &expected) <= 1e-5, "{}: {}", path.display(), distance(&got, &expected));
    }
    check_tokenizers(&gguf, &folder);
    let [before, after] = [&base, &gguf].map(|path| GgufFile::open(path).unwrap());
    assert_eq!(after.names_in_order(), before.names_in_order());
    for key in before.keys() {
        assert_eq!(after.metadata(key), before.metadata(key), "{key}");
    }
    // Tensors that the adapter doesn't touch are unchanged.
    assert_eq!(after.tensor("token_embd.weight").unwrap().bytes, before.tensor("token_embd.weight").unwrap().bytes);
}

#[test]
fn an_exported_adapter_is_the_file_of_llama_cpps_converter() {
    let spec = ModelFiles::open(path("llama")).unwrap().spec(&BaseFormat::AsIs).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("adapter.gguf");
    write_gguf_adapter(&adapter("adapter-lora"), &spec, &output).unwrap();
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/adapter-lora.gguf");
    assert!(fs::read(&output).unwrap() == fs::read(golden).unwrap());
}

/// For every module in the file, alpha / r * B * A is what PEFT adds to W.
#[test]
fn scales_are_folded_into_an_exported_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("adapter.gguf");
    for (model, name) in
        [("llama", "adapter-lora"), ("llama", "adapter-rslora_qv"), ("llama", "adapter-pattern"), ("qwen3", "made")]
    {
        let adapter = if name == "made" { made(&path(model)) } else { adapter(name) };
        let spec = ModelFiles::open(path(model)).unwrap().spec(&BaseFormat::AsIs).unwrap();
        write_gguf_adapter(&adapter, &spec, &output).unwrap();
        let file = GgufFile::open(&output).unwrap();
        assert_eq!(file.names().count(), 2 * adapter.modules.len());
        let alpha: f32 = file.require("adapter.lora.alpha").unwrap();
        for (module, values) in &adapter.modules {
            let (layer, module_name) = module.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
            let theirs = match module_name {
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                _ => "ffn_down",
            };
            let head_dim = spec.config().head_dim;
            let rotated = model == "llama" && ["attn_q", "attn_k"].contains(&theirs);
            let order = if rotated { RowOrder::Interleaved { head_dim } } else { RowOrder::Plain };
            let read = |end: &str, order| {
                let name = format!("blk.{layer}.{theirs}.weight.lora_{end}");
                let &[rows, cols] = file.tensor(&name).unwrap().shape else { panic!("{name}") };
                let matrix = file.matrix(&name, rows, cols, order, &BaseFormat::AsIs).unwrap();
                Array2::from_shape_vec((rows, cols), self::values(&matrix)).unwrap()
            };
            let (a, b) = (read("a", RowOrder::Plain), read("b", order));
            let rank = a.nrows() as f32;
            let got = b.dot(&a) * (alpha / rank);
            let wanted = values.b.dot(&values.a) * adapter.config.scaling(module);
            let most = wanted.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            assert!((&got - &wanted).iter().all(|value| value.abs() <= 1e-6 * most.max(1e-3)), "{name} {module}");
        }
    }
}

#[test]
fn what_cannot_be_written_leaves_nothing() {
    let source = model("llama");
    let adapter = made(source.path());
    let files = ModelFiles::open(source.path()).unwrap();
    let merged = Merged::new(&files, &adapter).unwrap();
    let (folder, gguf) = (source.path().join("out"), source.path().join("out.gguf"));
    let options = DirectoryOptions { max_shard_bytes: 60_000, ..DirectoryOptions::new(Dtype::F32) };
    // Interrupts at any tensor.
    for end in [0, 1, 10, 20] {
        let watch = |progress: Progress<'_>| {
            if progress.done < end { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let error = merged.write_directory(&folder, &options, &watch).unwrap_err();
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        let error = merged.write_gguf(&gguf, TensorType::F16, &watch).unwrap_err();
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        assert!(!folder.exists() && !gguf.exists());
    }

    // A value that f16 can't represent.
    let mut large = made(source.path());
    large.modules.values_mut().for_each(|module| module.a *= 1e7);
    let files = ModelFiles::open(source.path()).unwrap();
    let merged = Merged::new(&files, &large).unwrap();
    let error = merged.write_gguf(&gguf, TensorType::F16, &go_on).unwrap_err().to_string();
    assert!(error.contains("q_proj") && error.contains("choose bf16 or f32"), "{error}");
    let error = merged.write_directory(&folder, &DirectoryOptions::new(Dtype::F16), &go_on).unwrap_err().to_string();
    assert!(error.contains("choose bf16 or f32"), "{error}");
    assert!(!folder.exists() && !gguf.exists());
    let left: Vec<_> = fs::read_dir(source.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("tmp")), "{left:?}");

    // DoRA with a NaN magnitude.
    let mut dora = common::model::adapter("adapter-dora");
    dora.modules.values_mut().for_each(|module| {
        module.magnitude = module.magnitude.as_ref().map(|m| Array1::from_elem(m.len(), f32::NAN).to_vec())
    });
    let merged = Merged::new(&files, &dora).unwrap();
    let error = merged.write_directory(&folder, &options, &go_on).unwrap_err().to_string();
    assert!(error.contains("only finite values"), "{error}");

    // Adapters of other models, and settings that an adapter file can't express.
    let spec = files.spec(&BaseFormat::AsIs).unwrap();
    let error = write_gguf_adapter(&dora, &spec, &gguf).unwrap_err().to_string();
    assert!(error.contains("use_dora") && error.contains("qlora merge"), "{error}");
    let other = made(&path("qwen3"));
    assert_eq!(
        Merged::new(&files, &other).err().unwrap().to_string(),
        "adapters of a model: adapter's layer [d_out, d_in]: expected [64, 64] for model.layers.0.self_attn.q_proj, \
         got [128, 64]"
    );
    assert_eq!(
        write_gguf_adapter(&other, &spec, &gguf).unwrap_err().to_string(),
        "adapters of a model: adapter's layer [d_out, d_in]: expected [64, 64] for model.layers.0.self_attn.q_proj, \
         got [128, 64]"
    );
    let mut unknown = made(source.path());
    let module = unknown.modules.pop_first().unwrap().1;
    unknown.modules.insert("model.layers.9.self_attn.q_proj".into(), module);
    let error = write_gguf_adapter(&unknown, &spec, &gguf).unwrap_err().to_string();
    assert_eq!(
        error,
        "adapters of a model: a module of the adapter is model.layers.9.self_attn.q_proj; the model's linear layers \
         are model.layers.0.self_attn.q_proj to model.layers.1.mlp.down_proj"
    );

    // Tokenizers that a GGUF file can't represent.
    let files = ModelFiles::open(source.path()).unwrap();
    let merged = Merged::new(&files, &adapter).unwrap();
    let error = |change: &dyn Fn(&mut Value)| {
        let mut tokenizer = tokenizer_json();
        change(&mut tokenizer);
        fs::write(source.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        merged.write_gguf(&gguf, TensorType::F16, &go_on).unwrap_err().to_string()
    };
    assert!(error(&|t| t["normalizer"] = json!({"type": "Lowercase"})).contains("normalizer \"Lowercase\""));
    assert!(error(&|t| t["pre_tokenizer"]["use_regex"] = json!(false)).contains("no name in GGUF files"));
    assert!(
        error(&|t| t["pre_tokenizer"]["add_prefix_space"] = json!(true))
            .contains("pre-tokenizer that a GGUF file can't")
    );
    let words = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
    assert!(error(&|t| t["model"] = words.clone()).contains("tokenizer.json: not a BPE tokenizer"));
    fs::remove_file(source.path().join("tokenizer.json")).unwrap();
    let error = merged.write_gguf(&gguf, TensorType::F16, &go_on).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: "), "{error}");
    assert!(!gguf.exists());
}
