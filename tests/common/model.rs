//! The recorded models, adapters and runs of tests/golden/model, and SmolLM2's file.

use std::fs;
use std::path::{Path, PathBuf};

use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::PeftAdapter;
use qlora_wgpu::internal::safetensors::SafetensorsFile;
use qlora_wgpu::nn::{Batch, Decoder, Tokens, shifted_labels};
use qlora_wgpu::{Device, ModelFiles};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A file or folder of the repository, whichever package the test belongs to.
pub fn repository(path: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = package.ancestors().find(|folder| folder.join("tests/golden").is_dir());
    root.expect("tests/golden is in the repository").join(path)
}

/// A file or folder of tests/golden/model.
pub fn path(name: &str) -> PathBuf {
    repository("tests/golden/model").join(name)
}

pub fn file(name: &str) -> SafetensorsFile {
    SafetensorsFile::open(path(name)).unwrap()
}

pub fn f32s(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().f32s().unwrap().into_owned()
}

/// An i64 tensor and its shape.
pub fn i64s(file: &SafetensorsFile, name: &str) -> (Vec<i64>, [usize; 2]) {
    (i64s_flat(file, name), file.tensor(name).unwrap().shape.try_into().unwrap())
}

/// The values of an i64 tensor of any shape.
pub fn i64s_flat(file: &SafetensorsFile, name: &str) -> Vec<i64> {
    let bytes = file.tensor(name).unwrap().bytes;
    bytes.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Tokens of a recorded batch, with a mask if there is one.
pub fn tokens(file: &SafetensorsFile, ids: &str, mask: Option<&str>) -> Tokens {
    let (ids, [rows, _]) = i64s(file, ids);
    let ids: Vec<u32> = ids.into_iter().map(|id| u32::try_from(id).unwrap()).collect();
    match mask.filter(|mask| file.get(mask).is_some()) {
        Some(mask) => Tokens::masked(ids, rows, &i64s(file, mask).0).unwrap(),
        None => Tokens::new(ids, rows).unwrap(),
    }
}

/// Batch `index` of a recorded run.
pub fn batch(device: &Device, file: &SafetensorsFile, index: usize, vocabulary: usize) -> Batch {
    let key = |name: &str| format!("batch{index}.{name}");
    let tokens = tokens(file, &key("input_ids"), Some(&key("attention_mask")));
    let labels = shifted_labels(&tokens, &i64s(file, &key("labels")).0, vocabulary).unwrap();
    Batch::new(device, &tokens, Some(&labels), vocabulary, None).unwrap()
}

pub fn load(device: &Device, name: &str) -> Decoder {
    ModelFiles::open(path(name))
        .and_then(|files| files.load(device, &BaseFormat::AsIs))
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

pub fn adapter(name: &str) -> PeftAdapter {
    PeftAdapter::read(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// All logits of unlabelled tokens.
pub fn logits(model: &Decoder, tokens: &Tokens) -> Vec<f32> {
    let batch = Batch::new(model.device(), tokens, None, model.config().vocab_size, None).unwrap();
    model.logits(&batch).unwrap().to_vec().unwrap()
}

/// The largest difference.
pub fn distance(got: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    // A NaN must not vanish in the maximum.
    let worse = |most: f64, next: f64| if most.is_nan() || next.is_nan() { f64::NAN } else { most.max(next) };
    got.iter().zip(wanted).map(|(&got, &wanted)| (f64::from(got) - f64::from(wanted)).abs()).fold(0.0, worse)
}

/// SmolLM2-135M-Instruct in Q4_1, where scripts/smollm2.sh puts it.
pub fn smollm2() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache"))).map(|c| c.join("qlora-wgpu"));
    let folder = set("QLORA_CACHE").or_else(cache).expect("HOME, or QLORA_CACHE, is set");
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is missing: `make smollm2` fetches it", path.display());
    path
}

/// A tokenizer with the words w0, w1 and so on.
pub fn tokenizer(words: usize) -> String {
    let vocabulary: serde_json::Map<String, Value> = (0..words).map(|i| (format!("w{i}"), json!(i))).collect();
    let model = json!({"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"});
    json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}).to_string()
}

/// A folder with a tokenizer and a recorded model, which has 128 tokens and 128 positions.
pub fn with_tokenizer(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(path(name).join(file), folder.path().join(file)).unwrap();
    }
    fs::write(folder.path().join("tokenizer.json"), tokenizer(128)).unwrap();
    folder
}
