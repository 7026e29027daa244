//! Binary seed files for fuzzing, `fuzz/seeds`: small files that cover everything the readers
//! know. Text seeds aren't made here.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::bitsandbytes;
use super::gguf::writer::{Writer, array, text};
use super::gguf::{GgufFile, TensorType};
use super::safetensors::{self, OutData, OutTensor, SafetensorsFile};
use crate::Device;
use crate::formats::checkpoint::BaseFormat;
use crate::model_files::ModelFiles;
use crate::quant::{QuantOptions, QuantizedMatrix};
use crate::text::Tokenizer;

fn here(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A value of every type.
fn values() -> Writer {
    let nested = array(9, &[array(4, &[7_u32.to_le_bytes().into()]), array(8, &[text("deep")])]);
    let integers = [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (10, 8), (11, 8)];
    let of_integers = integers.iter().fold(Writer::default(), |writer, &(kind, bytes)| {
        let value = vec![0x81; bytes];
        writer.entry(&format!("i{kind}"), kind, &value).entry(
            &format!("a{kind}"),
            9,
            array(kind, &[value.clone(), value]),
        )
    });
    of_integers
        .u32("general.alignment", 64)
        .f32("f32", 0.5)
        .entry("f64", 12, 0.1_f64.to_le_bytes())
        .entry("flag", 7, [1])
        .entry("flags", 9, array(7, &[vec![0], vec![1]]))
        .string("text", "é")
        .entry("texts", 9, array(8, &[text("a"), text("")]))
        .entry("nested", 9, nested)
}

/// A block of every tensor type whose block length is in `lengths`, in rows or as a vector.
fn blocks(lengths: &[usize]) -> Writer {
    let vectors = SafetensorsFile::open(here("tests/golden/gguf/block_vectors.safetensors")).unwrap();
    let kinds = (0..40).filter_map(TensorType::from_id).filter(|kind| lengths.contains(&kind.block()));
    kinds.fold(Writer::default(), |writer, kind| {
        let recorded = vectors.get(&format!("{kind}.bytes")).map(|tensor| tensor.bytes.to_vec());
        let bytes = recorded.unwrap_or_else(|| vec![0x3c; 4 * kind.block_bytes()]);
        match kind.block() {
            1 => writer.tensor(&kind.to_string(), &[2, 2], kind, &bytes[..4 * kind.block_bytes()]),
            32 => writer.tensor(&kind.to_string(), &[2, 32], kind, &bytes[..2 * kind.block_bytes()]),
            block => writer.tensor(&kind.to_string(), &[block], kind, &bytes[..kind.block_bytes()]),
        }
    })
}

/// A model with one layer.
fn model(architecture: &str) -> Writer {
    let key = |key: &str| format!("{architecture}.{key}");
    let mut writer = Writer::default()
        .string("general.architecture", architecture)
        .u32(&key("block_count"), 1)
        .u32(&key("embedding_length"), 4)
        .u32(&key("feed_forward_length"), 2)
        .u32(&key("attention.head_count"), 2)
        .u32(&key("attention.head_count_kv"), 1)
        .u32(&key("context_length"), 8)
        .u32(&key("vocab_size"), 3)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5);
    if architecture == "qwen3" {
        writer = writer.f32("qwen3.rope.freq_base", 1e6).u32("qwen3.attention.key_length", 2);
    }
    let mut tensors: Vec<(&str, &[usize])> = vec![
        ("token_embd.weight", &[3, 4]),
        ("output_norm.weight", &[4]),
        ("blk.0.attn_norm.weight", &[4]),
        ("blk.0.attn_q.weight", &[4, 4]),
        ("blk.0.attn_k.weight", &[2, 4]),
        ("blk.0.attn_v.weight", &[2, 4]),
        ("blk.0.attn_output.weight", &[4, 4]),
        ("blk.0.ffn_norm.weight", &[4]),
        ("blk.0.ffn_gate.weight", &[2, 4]),
        ("blk.0.ffn_up.weight", &[2, 4]),
        ("blk.0.ffn_down.weight", &[4, 2]),
    ];
    tensors.extend::<Vec<(&str, &[usize])>>(match architecture {
        "llama" => vec![("output.weight", &[3, 4]), ("rope_freqs.weight", &[1])],
        "qwen2" => {
            vec![("blk.0.attn_q.bias", &[4]), ("blk.0.attn_k.bias", &[2]), ("blk.0.attn_v.bias", &[2])]
        }
        _ => vec![("blk.0.attn_q_norm.weight", &[2]), ("blk.0.attn_k_norm.weight", &[2])],
    });
    tensors.into_iter().fold(writer, |writer, (name, shape)| {
        let ones = 1_f32.to_le_bytes().repeat(shape.iter().product());
        writer.tensor(name, shape, TensorType::F32, &ones)
    })
}

/// A tokenizer of one of the two kinds.
fn tokenizer(model: &str) -> Writer {
    let words = ["<unk>", "<s>", "</s>", "<tool>", "<0x0A>", "▁", "H", "e", "l", "o", "He", "ll", "llo", "Hello", "▁H"];
    let kinds: [i32; 15] = [2, 3, 3, 4, 6, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
    let strings = |words: &[&str]| array(8, &words.iter().map(|word| text(word)).collect::<Vec<_>>());
    let scores = (0..15).map(|i| (-(i as f32)).to_le_bytes().into()).collect::<Vec<_>>();
    let writer = Writer::default()
        .string("tokenizer.ggml.model", model)
        .entry("tokenizer.ggml.tokens", 9, strings(&words))
        .entry("tokenizer.ggml.token_type", 9, array(5, &kinds.map(|kind| kind.to_le_bytes().into())))
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .entry("tokenizer.ggml.add_bos_token", 7, [1])
        .string("tokenizer.chat_template", "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}");
    match model {
        "llama" => writer.entry("tokenizer.ggml.scores", 9, array(6, &scores)),
        _ => writer.string("tokenizer.ggml.pre", "llama-bpe").entry(
            "tokenizer.ggml.merges",
            9,
            strings(&["H e", "l l", "ll o", "He llo"]),
        ),
    }
}

/// Bytes of a safetensors file with these tensors.
fn safetensors_file(tensors: Vec<OutTensor<'_>>) -> Vec<u8> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("x");
    safetensors::write(&path, tensors, BTreeMap::new()).unwrap();
    fs::read(path).unwrap()
}

/// A 4-bit weight. The spaces after the JSON, the file's last bytes, leave room for insertions.
fn four_bit(options: QuantOptions) -> Vec<u8> {
    let values: Vec<f32> = (0..3 * 33).map(|i| (i as f32 * 0.71).sin()).collect();
    let matrix = QuantizedMatrix::quantize(values[..].into(), 3, 33, &options.block(32)).unwrap();
    let mut tensors = bitsandbytes::tensors("model.q.weight", &matrix).unwrap();
    let state = tensors.iter_mut().find(|tensor| tensor.name.contains("quant_state")).unwrap();
    let OutData::Bytes(json) = &mut state.data else { panic!("lazy") };
    json.to_mut().extend([b' '; 32]);
    state.shape = vec![json.len()];
    safetensors_file(tensors)
}

/// Tensors of many types, with the names of a bare decoder.
fn plain() -> Vec<u8> {
    use safetensors::TensorType::{BF16, BOOL, F16, F32, F64, I64, U8};
    let tensor = |(i, dtype): (usize, safetensors::TensorType)| {
        let shape = if i % 2 == 0 { vec![2, 3] } else { vec![4] };
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        OutTensor { name: format!("layers.{i}"), dtype, shape, data: OutData::Bytes(vec![0x3c; bytes].into()) }
    };
    safetensors_file([BF16, F16, F32, F32, BF16, F16, I64, U8, BOOL, F64].into_iter().enumerate().map(tensor).collect())
}

/// `QLORA_WRITE_SEEDS=1 cargo test fuzz_seeds` rewrites them.
#[test]
fn they_are_what_is_made_here_and_whole() {
    let gguf = |name, mut writer: Writer| (format!("gguf/{name}"), writer.bytes());
    let seeds = [
        gguf("values", values()),
        gguf("blocks-small", blocks(&[1, 32])),
        gguf("blocks-large", blocks(&[256])),
        gguf("model-llama", model("llama")),
        gguf("model-qwen2", model("qwen2")),
        gguf("model-qwen3", model("qwen3")),
        gguf("tokenizer-gpt2", tokenizer("gpt2")),
        gguf("tokenizer-llama", tokenizer("llama")),
        ("tokenizer/gguf-gpt2".into(), tokenizer("gpt2").bytes()),
        ("tokenizer/gguf-llama".into(), tokenizer("llama").bytes()),
        ("safetensors/plain".into(), plain()),
        ("safetensors/nf4".into(), four_bit(QuantOptions::nf4())),
        ("safetensors/nf4-double".into(), four_bit(QuantOptions::nf4().double_quant())),
        ("safetensors/fp4".into(), four_bit(QuantOptions::fp4())),
        ("safetensors/int4-double".into(), four_bit(QuantOptions::int4().double_quant())),
    ];
    for (name, bytes) in seeds {
        let path = here("fuzz/seeds").join(&name);
        if std::env::var_os("QLORA_WRITE_SEEDS").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &bytes).unwrap();
        }
        assert!(fs::read(&path).unwrap() == bytes, "{name} differs");
        if name.contains("/model") {
            ModelFiles::open(&path).unwrap().load(&Device::cpu(), &BaseFormat::AsIs).unwrap();
        } else if name.contains("tokenizer") {
            let tokenizer = Tokenizer::from_gguf(&GgufFile::open(&path).unwrap()).unwrap();
            assert_eq!(tokenizer.encode("Hello", false).unwrap().last(), Some(&13));
        } else if name.starts_with("gguf") {
            GgufFile::open(&path).unwrap();
        } else {
            let file = SafetensorsFile::open(&path).unwrap();
            bitsandbytes::quantized_weights(&file)
                .iter()
                .for_each(|weight| drop(bitsandbytes::read(&file, weight).unwrap()));
        }
    }
}
