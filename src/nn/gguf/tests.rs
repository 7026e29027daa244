use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;
use crate::device::Device;
use crate::formats::gguf::TensorType;
use crate::formats::gguf::writer::Writer;
use crate::formats::safetensors::SafetensorsFile;
use crate::model_files::ModelFiles;
use crate::nn::{Batch, Decoder, Tokens};

/// Metadata of a small file.
fn metadata(architecture: &str) -> Writer {
    let key = |key: &str| format!("{architecture}.{key}");
    Writer::default()
        .string(ARCHITECTURE, architecture)
        .u32(&key("block_count"), 2)
        .u32(&key("embedding_length"), 64)
        .u32(&key("feed_forward_length"), 128)
        .u32(&key("attention.head_count"), 8)
        .u32(&key("attention.head_count_kv"), 2)
        .u32(&key("context_length"), 512)
        .u32(&key("vocab_size"), 100)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
}

fn config(mut writer: Writer) -> Result<ModelConfig> {
    let folder = TempDir::new().unwrap();
    ModelConfig::from_gguf(&writer.open(&folder).unwrap())
}

fn error(writer: Writer) -> String {
    config(writer).unwrap_err().to_string()
}

#[test]
fn metadata_are_a_config() {
    let llama = config(metadata("llama")).unwrap();
    assert_eq!((llama.architecture, llama.layers, llama.hidden_size), (Architecture::Llama, 2, 64));
    assert_eq!((llama.intermediate_size, llama.vocab_size, llama.max_position_embeddings), (128, 100, 512));
    assert_eq!((llama.heads, llama.kv_heads, llama.head_dim, llama.rms_norm_eps), (8, 2, 8, 1e-5));
    let plain = RopeConfig { theta: 10_000.0, head_dim: 8, scaling: RopeScaling::None, layout: RopeLayout::HalfSplit };
    assert_eq!(llama.rope, plain);
    assert_eq!((llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm), (false, false, false, false));
    assert_eq!((llama.tie_word_embeddings, &llama.windows[..]), (true, &[None; 2][..]));
    assert_eq!((llama.bos_token_id, llama.eos_token_ids, llama.pad_token_id), (None, vec![], None));

    let scaled = metadata("llama")
        .f32("llama.rope.freq_base", 500_000.0)
        .string("llama.rope.scaling.type", "linear")
        .f32("llama.rope.scaling.factor", 4.0)
        .u32("llama.attention.sliding_window", 32)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .tensor("output.weight", &[1], TensorType::F32, &[0; 4])
        .tensor("blk.0.attn_q.bias", &[1], TensorType::F32, &[0; 4]);
    let scaled = config(scaled).unwrap();
    assert_eq!((scaled.architecture, &scaled.windows[..]), (Architecture::Mistral, &[Some(32); 2][..]));
    let linear = RopeConfig { theta: 500_000.0, scaling: RopeScaling::Linear { factor: 4.0 }, ..plain };
    assert_eq!((scaled.rope, scaled.tie_word_embeddings, scaled.qkv_bias), (linear, false, true));
    assert_eq!((scaled.bos_token_id, &scaled.eos_token_ids[..]), (Some(1), &[2][..]));

    assert!(config(metadata("qwen2")).unwrap().qkv_bias);
    let qwen3 = config(metadata("qwen3").u32("qwen3.attention.key_length", 16)).unwrap();
    assert_eq!((qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim), (true, false, 16));
}

#[test]
fn what_is_not_supported_is_an_error_that_names_the_key() {
    let llama = || metadata("llama");
    assert!(error(metadata("gemma")).contains("`general.architecture`: is \"gemma\""));
    assert!(error(Writer::default()).contains("`general.architecture`: is missing"));
    assert!(error(Writer::default().string(ARCHITECTURE, "llama")).contains("`llama.embedding_length`: is missing"));
    assert!(error(llama().u32("llama.expert_count", 8)).contains("`llama.expert_count`: is 8; only 0"));
    assert!(error(llama().f32("llama.logit_scale", 0.5)).contains("`llama.logit_scale`"));
    assert!(error(llama().u32("llama.rope.dimension_count", 4)).contains("only the length of keys, 8"));
    assert!(error(llama().u32("llama.attention.key_length", 7)).contains("need an even number"));
    assert!(error(llama().u32("llama.attention.value_length", 16)).contains("`llama.attention.value_length`"));
    assert!(error(llama().string("llama.rope.scaling.type", "yarn")).contains("is \"yarn\""));
    assert!(error(llama().f32("llama.rope.freq_base", -1.0)).contains("must be above 0"));
    assert!(
        error(metadata("qwen2").u32("qwen2.attention.sliding_window", 32))
            .contains("`qwen2.attention.sliding_window`: is 32; qwen2 files with a sliding window")
    );
    let zero = Writer::default().string(ARCHITECTURE, "llama").u32("llama.embedding_length", 0);
    assert!(error(zero).contains("is 0; it must be at least 1"));
}

#[test]
fn frequencies_of_llama_3_are_recognized_and_others_refused() {
    let scaling = |factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let with = |divisors: &[f32]| {
        let writer = metadata("llama").f32("llama.rope.freq_base", 500_000.0).u32("llama.attention.key_length", 64);
        writer.tensor(ROPE_FREQS, &[divisors.len()], TensorType::F32, bytemuck::cast_slice(divisors))
    };
    for factor in [8.0, 32.0] {
        // Computed like in llama.cpp's converter.
        let divisors = (0..32).map(|i| {
            let wavelength = std::f64::consts::TAU * 500_000_f64.powf(f64::from(i) / 32.0);
            let smooth = (8192.0 / wavelength - 1.0) / 3.0;
            let blended = 1.0 / ((1.0 - smooth) / factor + smooth);
            (if wavelength < 2048.0 {
                1.0
            } else if wavelength > 8192.0 {
                factor
            } else {
                blended
            }) as f32
        });
        let mut divisors: Vec<f32> = divisors.collect();
        assert_eq!(config(with(&divisors)).unwrap().rope.scaling, scaling(factor as f32));
        divisors[3] = 1.5;
        assert!(error(with(&divisors)).contains("rope_freqs.weight\": has divisors that don't follow"));
    }
    assert!(error(with(&[1.0; 16])).contains("has shape [16], expected [32]"));
    assert!(error(with(&[1.0; 32]).f32("llama.rope.scaling.factor", 2.0)).contains("given together with rope.scaling"));
}

#[test]
fn no_changed_byte_of_the_metadata_panics() {
    let folder = TempDir::new().unwrap();
    let bytes = metadata("llama").f32("llama.rope.freq_base", 1e4).bytes();
    let path = folder.path().join("x.gguf");
    for at in 0..bytes.len() {
        for fill in [0x00, 0xff] {
            let mut changed = bytes.clone();
            changed[at..bytes.len().min(at + 4)].fill(fill);
            std::fs::write(&path, changed).unwrap();
            drop(GgufFile::open(&path).and_then(|file| ModelConfig::from_gguf(&file)));
        }
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model").join(name)
}

/// The recorded model `name`, as a converter would write it to a GGUF file.
fn converted(name: &str, config: &ModelConfig) -> Writer {
    let key = |key: &str| format!("{name}.{key}");
    let mut writer = Writer::default()
        .string(ARCHITECTURE, name)
        .u32(&key("block_count"), config.layers as u32)
        .u32(&key("embedding_length"), config.hidden_size as u32)
        .u32(&key("feed_forward_length"), config.intermediate_size as u32)
        .u32(&key("attention.head_count"), config.heads as u32)
        .u32(&key("attention.head_count_kv"), config.kv_heads as u32)
        .u32(&key("attention.key_length"), config.head_dim as u32)
        .u32(&key("context_length"), config.max_position_embeddings as u32)
        .u32(&key("vocab_size"), config.vocab_size as u32)
        .f32(&key("rope.freq_base"), config.rope.theta as f32)
        .f32(&key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    let file = SafetensorsFile::open(golden(name).join("model.safetensors")).unwrap();
    for name in file.names() {
        let tensor = file.tensor(name).unwrap();
        let values = tensor.f32s().unwrap();
        let mut rows: Vec<&[f32]> = values.chunks_exact(values.len() / tensor.shape[0]).collect();
        let is_rotary = name.contains("q_proj") || name.contains("k_proj");
        if config.architecture == Architecture::Llama && is_rotary {
            let half = config.head_dim / 2;
            for head in rows.chunks_exact_mut(config.head_dim) {
                let halves = head.to_vec();
                (0..head.len()).for_each(|row| head[row] = halves[row % 2 * half + row / 2]);
            }
        }
        let name = gguf_name(name).unwrap();
        let bytes: Vec<u8> = bytemuck::cast_slice(&rows.concat()).to_vec();
        writer = writer.tensor(&name, tensor.shape, TensorType::F32, &bytes);
    }
    writer
}

fn logits(model: &Decoder) -> Vec<u32> {
    let tokens = Tokens::new((0..24).map(|i| i * 5 % 100).collect(), 2).unwrap();
    let batch = Batch::new(model.device(), &tokens, None, model.config().vocab_size, None).unwrap();
    model.logits(&batch).unwrap().to_vec().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = ModelFiles::open("/no/such.gguf")
        .and_then(|files| files.load(&Device::cpu(), &BaseFormat::AsIs))
        .err()
        .unwrap();
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("such.gguf")), "{error}");
}

#[test]
fn a_converted_model_is_the_model() {
    for name in ["llama", "qwen2", "qwen3"] {
        let (device, folder) = (Device::cpu(), TempDir::new().unwrap());
        let theirs = ModelFiles::open(golden(name)).unwrap().load(&device, &BaseFormat::AsIs).unwrap();
        let mut writer = converted(name, theirs.config());
        let path = folder.path().join("x.gguf");
        drop(writer.open(&folder).unwrap());
        let ours = ModelFiles::open(&path).unwrap().load(&device, &BaseFormat::AsIs).unwrap();
        assert!(logits(&ours) == logits(&theirs), "{name}: not to the bit");

        drop(writer.tensor("blk.0.surplus", &[1], TensorType::F32, &[0; 4]).open(&folder).unwrap());
        let error =
            ModelFiles::open(&path).and_then(|files| files.load(&device, &BaseFormat::AsIs)).err().unwrap().to_string();
        assert!(error.ends_with("has tensors that the model doesn't use: blk.0.surplus"), "{error}");
    }
}
