//! Configs, checkpoints and adapters written by transformers, bitsandbytes and PEFT.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::model::path;
use qlora_wgpu::formats::checkpoint::{BaseFormat, Checkpoint};
use qlora_wgpu::formats::peft::{PeftAdapter, TargetModules};
use qlora_wgpu::internal::safetensors::{OutData, OutTensor, SafetensorsFile, write};
use qlora_wgpu::nn::{Architecture, ModelConfig};
use qlora_wgpu::nn::{RopeConfig, RopeLayout, RopeScaling};
use qlora_wgpu::quant::HostMatrix;
use qlora_wgpu::quant::{Dtype, Format, QuantOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

const DENSE: [&str; 3] = ["llama", "qwen2", "qwen3"];
const BITSANDBYTES: [(&str, Format); 6] = [
    ("llama-bnb-nf4", Format::Nf4),
    ("llama-bnb-nf4_dq", Format::Nf4),
    ("llama-bnb-nf4_dq-merged-lora", Format::Nf4),
    ("llama-bnb-fp4_dq", Format::Fp4),
    ("qwen2-bnb-nf4_dq", Format::Nf4),
    ("qwen3-bnb-nf4_dq", Format::Nf4),
];

/// Every folder with an adapter among the golden files.
fn adapters() -> Vec<PathBuf> {
    let folders =
        |path: &Path| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let outer: Vec<_> = folders(&path("")).collect();
    let inner = outer.iter().flat_map(|path| folders(path));
    let found: Vec<_> =
        outer.iter().cloned().chain(inner).filter(|path| path.join("adapter_config.json").exists()).collect();
    assert_eq!(found.len(), 13);
    found
}

/// Names and shapes of the decoder's vectors and matrices.
fn shapes(config: &ModelConfig) -> (BTreeMap<String, usize>, BTreeMap<String, (usize, usize)>) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut vectors = BTreeMap::from([("model.norm.weight".to_owned(), hidden)]);
    let mut matrices = BTreeMap::from([("model.embed_tokens.weight".to_owned(), (config.vocab_size, hidden))]);
    if !config.tie_word_embeddings {
        matrices.insert("lm_head.weight".into(), (config.vocab_size, hidden));
    }
    for layer in 0..config.layers {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        vectors.extend(["input_layernorm.weight", "post_attention_layernorm.weight"].map(|norm| (name(norm), hidden)));
        if config.qk_norm {
            vectors.extend(
                ["self_attn.q_norm.weight", "self_attn.k_norm.weight"].map(|norm| (name(norm), config.head_dim)),
            );
        }
        let linear = [
            ("self_attn.q_proj", (q, hidden), config.qkv_bias),
            ("self_attn.k_proj", (kv, hidden), config.qkv_bias),
            ("self_attn.v_proj", (kv, hidden), config.qkv_bias),
            ("self_attn.o_proj", (hidden, q), config.o_bias),
            ("mlp.gate_proj", (inner, hidden), config.mlp_bias),
            ("mlp.up_proj", (inner, hidden), config.mlp_bias),
            ("mlp.down_proj", (hidden, inner), config.mlp_bias),
        ];
        for (module, shape, bias) in linear {
            matrices.insert(name(&format!("{module}.weight")), shape);
            if bias {
                vectors.insert(name(&format!("{module}.bias")), shape.0);
            }
        }
    }
    (vectors, matrices)
}

/// Reads every tensor of the checkpoint and checks that there are no others.
fn read_all(folder: &Path, base: &BaseFormat) -> (BTreeMap<String, Vec<f32>>, BTreeMap<String, HostMatrix>) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let (vectors, matrices) = shapes(&ModelConfig::read(folder).unwrap());
    let used: BTreeSet<String> = vectors.keys().chain(matrices.keys()).cloned().collect();
    checkpoint.check_all_used(&used).unwrap();
    let vector = |(name, len): (String, usize)| (name.clone(), checkpoint.vector(&name, len).unwrap());
    let matrix =
        |(name, (rows, cols)): (String, _)| (name.clone(), checkpoint.matrix(&name, rows, cols, base).unwrap());
    (vectors.into_iter().map(vector).collect(), matrices.into_iter().map(matrix).collect())
}

#[test]
fn configs_are_read() {
    let rope =
        |head_dim| RopeConfig { theta: 10_000.0, head_dim, scaling: RopeScaling::None, layout: RopeLayout::HalfSplit };
    let llama = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 128,
        hidden_size: 64,
        intermediate_size: 192,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope: rope(16),
        max_position_embeddings: 128,
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        windows: vec![None; 2],
        dtype: Some(Dtype::F32),
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        pad_token_id: Some(0),
        quantized: false,
    };
    let qwen2 = ModelConfig {
        architecture: Architecture::Qwen2,
        hidden_size: 96,
        intermediate_size: 160,
        head_dim: 24,
        rope: rope(24),
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        qkv_bias: true,
        ..llama.clone()
    };
    let qwen3 = ModelConfig {
        architecture: Architecture::Qwen3,
        head_dim: 32,
        rope: rope(32),
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        qk_norm: true,
        ..llama.clone()
    };
    for (name, expected) in DENSE.into_iter().zip([llama, qwen2, qwen3]) {
        assert_eq!(ModelConfig::read(path(name)).unwrap(), expected, "{name}");
        let quantized = ModelConfig { quantized: true, ..expected };
        for (folder, _) in BITSANDBYTES.iter().filter(|(folder, _)| folder.starts_with(name)) {
            assert_eq!(ModelConfig::read(path(folder)).unwrap(), quantized, "{folder}");
        }
    }
}

#[test]
fn checkpoints_are_read_in_full() {
    for name in DENSE {
        let folder = path(name);
        let file = SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
        let values = |name: &str| file.tensor(name).unwrap().to_f32().unwrap();
        let (vectors, matrices) = read_all(&folder, &BaseFormat::AsIs);
        assert!(vectors.iter().all(|(name, vector)| *vector == values(name)));
        for (name, matrix) in matrices {
            let HostMatrix::Dense(matrix) = matrix else { panic!("{name}") };
            assert_eq!(matrix.to_f32(), values(&name), "{name}");
        }
    }
}

/// The 4-bit weights in bitsandbytes' files equal our quantization of the original weights.
#[test]
fn quantized_checkpoints_are_those_of_bitsandbytes() {
    for (name, format) in BITSANDBYTES {
        let folder = path(name);
        // `base` applies to dense matrices only.
        let (_, matrices) = read_all(&folder, &BaseFormat::AsIs);
        let linear = matrices.iter().filter(|(name, _)| name.contains("_proj."));
        assert_eq!(linear.clone().count(), 14);
        for (name, matrix) in linear {
            assert!(matches!(matrix, HostMatrix::Quantized(matrix) if matrix.format() == format), "{name}");
        }
        assert!(matches!(matrices["model.embed_tokens.weight"], HostMatrix::Dense(_)));
    }
    let (_, theirs) = read_all(&path("llama-bnb-nf4"), &BaseFormat::AsIs);
    let (_, ours) = read_all(&path("llama"), &BaseFormat::Quantize(QuantOptions::nf4()));
    for (name, matrix) in theirs.iter().filter(|(name, _)| name.contains("_proj.")) {
        assert_eq!(ours[name], *matrix, "{name}");
    }
}

#[test]
fn shards_read_like_one_file() {
    for name in ["qwen2", "llama-bnb-nf4_dq"] {
        let file = SafetensorsFile::open(path(name).join("model.safetensors")).unwrap();
        let folder = TempDir::new().unwrap();
        fs::copy(path(name).join("config.json"), folder.path().join("config.json")).unwrap();
        let mut map = serde_json::Map::new();
        // Every other tensor, so that the tensors of one 4-bit weight are in both.
        for shard in 0..2 {
            let shard_name = format!("model-{:05}-of-00002.safetensors", shard + 1);
            let names = file.names().iter().skip(shard).step_by(2);
            let tensors = names.map(|name| {
                map.insert(name.clone(), json!(shard_name));
                let tensor = file.tensor(name).unwrap();
                let (dtype, shape) = (tensor.dtype, tensor.shape.to_vec());
                OutTensor { name: name.clone(), dtype, shape, data: OutData::Bytes(tensor.bytes.into()) }
            });
            let tensors = tensors.collect();
            write(&folder.path().join(shard_name), tensors, BTreeMap::new()).unwrap();
        }
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        assert_eq!(read_all(folder.path(), &BaseFormat::AsIs), read_all(&path(name), &BaseFormat::AsIs));
    }
}

#[test]
fn adapters_are_written_as_peft_writes_them() {
    for theirs in adapters() {
        let adapter = PeftAdapter::read(&theirs).unwrap();
        let folder = TempDir::new().unwrap();
        let ours = folder.path().join("adapter");
        adapter.write(&ours).unwrap();
        assert_eq!(PeftAdapter::read(&ours).unwrap(), adapter);

        let tensors = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
        assert!(tensors(&ours) == tensors(&theirs), "{}: other bytes", theirs.display());
        let config = |folder: &Path| -> serde_json::Map<String, Value> {
            serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (ours, theirs) = (config(&ours), config(&theirs));
        for (key, value) in &ours {
            assert_eq!(*value, theirs[key], "{key}");
        }
        assert!(ours.keys().is_sorted());
    }
}

#[test]
fn adapters_have_their_ranks_and_scales() {
    let read = |name: &str| PeftAdapter::read(path(name)).unwrap();
    let lora = read("adapter-lora");
    assert_eq!((lora.config.r, lora.config.lora_alpha, lora.modules.len()), (8, 16.0, 14));
    assert!(lora.modules.iter().all(|(path, module)| module.magnitude.is_none() && lora.config.scaling(path) == 2.0));

    let dora = read("adapter-dora");
    assert!(dora.config.use_dora && !dora.modules.is_empty());
    assert!(dora.modules.values().all(|module| module.magnitude.as_ref().unwrap().len() == module.b.nrows()));

    let rslora = read("adapter-rslora_qv");
    assert_eq!(rslora.config.targets.modules(), &TargetModules::names(["q_proj", "v_proj"]));
    assert!(!rslora.modules.is_empty());
    assert!(rslora.modules.keys().all(|path| rslora.config.scaling(path) == 4.0));

    let pattern = read("adapter-pattern");
    let [q0, q1, down] =
        ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj"].map(|path| format!("model.layers.{path}"));
    for (path, rank, alpha) in [(&q0, 4, 32.0), (&q1, 4, 4.0), (&down, 16, 4.0)] {
        assert_eq!((pattern.config.rank(path), pattern.config.alpha(path)), (rank, alpha), "{path}");
        assert_eq!(pattern.modules[path].a.nrows(), rank);
    }
}
