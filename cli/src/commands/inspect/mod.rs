//! `qlora inspect`: shows the contents of a model or an adapter from its headers and configs
//! alone.

mod tensors;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use indicatif::{HumanBytes, HumanCount};
use qlora_wgpu::ModelFiles;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::formats::peft::{self, PeftConfig};
use qlora_wgpu::internal::Weights;
use qlora_wgpu::internal::gguf::{GgufFile, is_gguf};
use qlora_wgpu::internal::one_line;
use qlora_wgpu::internal::safetensors::SafetensorsFile;
use qlora_wgpu::nn::ModelConfig;
use serde::Serialize;
use serde_json::{Map, Value};

use self::tensors::{Size, TensorInfo, TotalInfo};
use crate::model::no_model;
use crate::output::{print_json, print_line, table};
use crate::paths::exists;

/// Shows what is in a model or an adapter: its config, and its tensors with formats and sizes.
///
/// Only headers and configs are read. Tensors that are alike in several layers share a row, as in
/// `model.layers.{0-29}.mlp.up_proj.weight`. The parts of a 4-bit bitsandbytes weight count as one
/// tensor.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora inspect model.gguf\n  \
    qlora inspect ADAPTER --json")]
pub struct InspectArgs {
    /// A .gguf or .safetensors file, a Hugging Face directory, or a PEFT adapter directory.
    #[arg(value_name = "FILE|DIR", value_hint = ValueHint::AnyPath)]
    path: PathBuf,
    /// Show a row for every tensor.
    #[arg(long)]
    all: bool,
    /// Print JSON with every tensor: path, kind, architecture, name, unsupported (why, or null),
    /// model, adapter, adapted_layers, parameters, bytes, bits_per_weight, formats, tensors.
    #[arg(long)]
    json: bool,
}

/// Kind of file or directory.
#[derive(Serialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Gguf,
    Checkpoint,
    Safetensors,
    Adapter,
}

/// The result in the form of its JSON. Keys that don't apply are null.
#[derive(Serialize)]
struct Report {
    path: String,
    kind: Kind,
    architecture: Option<String>,
    name: Option<String>,
    /// Why this program can't run it, judging by its config or types.
    unsupported: Option<String>,
    model: Option<ModelInfo>,
    /// `adapter_config.json`, with PEFT's defaults for missing keys.
    adapter: Option<Map<String, Value>>,
    /// Number of linear layers with adapter tensors.
    adapted_layers: Option<usize>,
    #[serde(flatten)]
    total: Size,
    formats: Vec<TotalInfo>,
    tensors: Vec<TensorInfo>,
}

/// Sizes of a model, named as in `config.json`.
#[derive(Serialize)]
struct ModelInfo {
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
}

impl From<&ModelConfig> for ModelInfo {
    fn from(config: &ModelConfig) -> Self {
        ModelInfo {
            num_hidden_layers: config.layers,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_attention_heads: config.heads,
            num_key_value_heads: config.kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_position_embeddings: config.max_position_embeddings,
            tie_word_embeddings: config.tie_word_embeddings,
        }
    }
}

pub fn run(args: &InspectArgs) -> Result<()> {
    exists(&args.path)?;
    let report = if args.path.is_dir() { folder(&args.path) } else { file(&args.path) }?;
    if args.json { print_json(&report) } else { print(&report, args.all) }
}

fn folder(path: &Path) -> Result<Report> {
    if path.join(peft::CONFIG).exists() {
        adapter(path)
    } else if path.join("config.json").exists() {
        model(path)
    } else {
        Err(no_model(path, "it has neither config.json nor adapter_config.json"))
    }
}

fn file(path: &Path) -> Result<Report> {
    if is_gguf(path)? {
        model(path)
    } else if path.extension().is_some_and(|extension| extension == "safetensors") {
        safetensors(path)
    } else {
        let message = "is neither a GGUF nor a .safetensors file; give one of those, or a directory".into();
        Err(Error::File { path: path.into(), message })
    }
}

impl Report {
    fn new(path: &Path, kind: Kind, tensors: Vec<TensorInfo>) -> Self {
        Report {
            path: path.display().to_string(),
            kind,
            architecture: None,
            name: None,
            unsupported: None,
            model: None,
            adapter: None,
            adapted_layers: None,
            total: Size::sum(&tensors),
            formats: tensors::totals(&tensors),
            tensors,
        }
    }
}

fn model(path: &Path) -> Result<Report> {
    let files = ModelFiles::open(path)?;
    let mut report = match files.weights()? {
        Weights::Checkpoint(checkpoint) => Report::new(path, Kind::Checkpoint, tensors::of_safetensors(checkpoint)?),
        Weights::Gguf(file) => Report::new(path, Kind::Gguf, tensors::of_gguf(file)?),
    };
    report.architecture = files.architecture()?;
    report.name = files.name()?;
    match files.config() {
        Ok(config) => report.model = Some(ModelInfo::from(config)),
        Err(error) => report.unsupported = Some(error.to_string()),
    }
    if let (Weights::Gguf(file), None) = (files.weights()?, &report.unsupported) {
        report.unsupported = unsupported_tensor(file)?.map(|error| error.to_string());
    }
    Ok(report)
}

/// The first tensor of a type that isn't read, as an error.
fn unsupported_tensor(file: &GgufFile) -> Result<Option<Error>> {
    for name in file.names() {
        let kind = file.tensor(name)?.kind;
        if !kind.is_read() {
            return Ok(Some(file.tensor_error(name, format!("is {kind}, which is not supported"))));
        }
    }
    Ok(None)
}

fn safetensors(path: &Path) -> Result<Report> {
    let tensors = tensors::of_safetensors(&SafetensorsFile::open(path)?)?;
    Ok(Report::new(path, Kind::Safetensors, tensors))
}

fn adapter(path: &Path) -> Result<Report> {
    // A file that isn't JSON is an error; an adapter of another kind is shown.
    peft::config_json(path)?;
    let file = peft::open_tensors(path)?;
    let layers: BTreeSet<&str> = file.names().iter().filter_map(|key| peft::module_of(key)).collect();
    let mut report = Report::new(path, Kind::Adapter, tensors::of_safetensors(&file)?);
    report.adapted_layers = Some(layers.len());
    match PeftConfig::read(path) {
        Ok(config) => report.adapter = Some(config.json()),
        Err(error) => report.unsupported = Some(error.to_string()),
    }
    Ok(report)
}

fn print(report: &Report, all: bool) -> Result<()> {
    for (name, text) in facts(report) {
        print_line(&format!("{name:<14}{}", one_line(&text)))?;
    }
    if report.tensors.is_empty() {
        return Ok(());
    }
    let formats = tensors::format_rows(&report.formats, report.tensors.len(), &report.total);
    print_line(&format!("\n{}", table(["format", "tensors", "parameters", "bytes", "bits/weight"], 1, formats)))?;
    let header = ["tensor", "format", "count", "shape", "parameters", "bytes", "bits/weight"];
    print_line(&format!("\n{}", table(header, 2, tensors::tensor_rows(&report.tensors, all))))
}

/// Facts to show first.
fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let kind = match report.kind {
        Kind::Gguf => "GGUF file",
        Kind::Checkpoint => "Hugging Face directory",
        Kind::Safetensors => "safetensors file",
        Kind::Adapter => "PEFT adapter",
    };
    let mut facts = vec![("path", report.path.clone()), ("kind", kind.to_owned())];
    facts.extend(report.architecture.clone().map(|text| ("architecture", text)));
    facts.extend(report.name.clone().map(|text| ("name", text)));
    facts.extend(report.unsupported.clone().map(|text| ("unsupported", text)));
    if let Some(model) = &report.model {
        let ModelInfo { num_hidden_layers: layers, hidden_size: hidden, intermediate_size: inner, .. } = model;
        let head = if model.tie_word_embeddings { "the embedding" } else { "its own" };
        facts.push(("layers", format!("{layers}, hidden {hidden}, MLP {inner}")));
        let (heads, kv_heads) = (model.num_attention_heads, model.num_key_value_heads);
        facts.push(("heads", format!("{heads} of size {}, {kv_heads} for keys and values", model.head_dim)));
        facts.push(("vocabulary", format!("{}, head: {head}", model.vocab_size)));
        facts.push(("positions", model.max_position_embeddings.to_string()));
    }
    if let Some(config) = &report.adapter {
        facts.extend(adapter_facts(config));
    }
    facts.extend(report.adapted_layers.map(|count| ("adapted", format!("{count} linear layers"))));
    let Size { parameters, bytes, .. } = report.total;
    facts.push(("parameters", HumanCount(parameters).to_string()));
    facts.push(("size", format!("{}, {} bits per weight", HumanBytes(bytes), report.total.bits())));
    facts
}

fn adapter_facts(config: &Map<String, Value>) -> Vec<(&'static str, String)> {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values
            .iter()
            .map(|value| value.as_str().map_or(value.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Object(map) => map.iter().map(|(key, value)| format!("{key}: {value}")).collect::<Vec<_>>().join(", "),
        value => value.to_string(),
    };
    let unset = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Number(number) => number.as_f64() == Some(0.0),
        _ => false,
    };
    let keys = [
        ("base model", "base_model_name_or_path"),
        ("revision", "revision"),
        ("rank", "r"),
        ("rank pattern", "rank_pattern"),
        ("alpha", "lora_alpha"),
        ("alpha pattern", "alpha_pattern"),
        ("dropout", "lora_dropout"),
        ("rsLoRA", "use_rslora"),
        ("DoRA", "use_dora"),
        ("bias of B", "lora_bias"),
        ("targets", "target_modules"),
        ("excluded", "exclude_modules"),
        ("layers", "layers_to_transform"),
    ];
    let fact = |(name, key): (&'static str, &str)| Some((name, config.get(key).filter(|value| !unset(value))?));
    keys.into_iter().filter_map(fact).map(|(name, value)| (name, text(value))).collect()
}
