//! Heap memory for quantizing a checkpoint, and for merging an adapter into one.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use half::bf16;
use ndarray::Array2;
use qlora_wgpu::ModelFiles;
use qlora_wgpu::export::{DirectoryOptions, Merged};
use qlora_wgpu::formats::checkpoint::{BaseFormat, Checkpoint};
use qlora_wgpu::formats::peft::{PeftAdapter, PeftConfig, PeftModule};
use qlora_wgpu::internal::gguf;
use qlora_wgpu::internal::safetensors::{OutData, OutTensor, TensorType, write};
use qlora_wgpu::quant::{Dtype, QuantOptions};
use serde_json::json;

/// The system's allocator, counting.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the arguments unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: they share the counters.
static ALONE: Mutex<()> = Mutex::new(());

/// Quantizing reads the mapped file: neither f32 nor 16-bit values of a whole matrix are ever on
/// the heap.
#[test]
fn quantizing_holds_the_packed_matrices_only() {
    let _alone = ALONE.lock();
    const SIDE: usize = 1024;
    const MATRICES: usize = 4;
    let folder = tempfile::TempDir::new().unwrap();
    let name = |i: usize| format!("model.layers.{i}.weight");
    for (dtype, bytes) in [(TensorType::BF16, 2), (TensorType::F32, 4)] {
        let tensors = (0..MATRICES).map(|i| {
            let values = move || {
                let value = |j: usize| (j as f32 * 0.37 + i as f32).sin();
                let values = (0..SIDE * SIDE).map(value);
                Ok(match dtype {
                    TensorType::BF16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
                    _ => values.flat_map(f32::to_le_bytes).collect(),
                })
            };
            OutTensor { name: name(i), dtype, shape: vec![SIDE, SIDE], data: OutData::Lazy(Box::new(values)) }
        });
        write(&folder.path().join("model.safetensors"), tensors.collect(), BTreeMap::new()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let quantize = |i| {
            let base = BaseFormat::Quantize(QuantOptions::nf4().double_quant());
            checkpoint.matrix(&name(i), SIDE, SIDE, &base).unwrap()
        };
        // Starts the threads of the pool.
        drop(quantize(0));

        let before = NOW.load(Relaxed);
        PEAK.store(before, Relaxed);
        let matrices: Vec<_> = (0..MATRICES).map(quantize).collect();
        let packed: usize = matrices.iter().map(|matrix| matrix.bytes()).sum();
        let beside = PEAK.load(Relaxed).saturating_sub(before + packed);
        let dense = SIDE * SIDE * bytes;
        assert!(packed < MATRICES * SIDE * SIDE * 9 / 16, "{packed}");
        assert!(beside < dense / 4, "{dtype}: {beside} bytes beside the packed {packed}; a matrix takes {dense}");
    }
}

/// Writes a Llama of six layers in bf16, with arbitrary values and a tokenizer for GGUF files.
fn model(folder: &Path) {
    const HIDDEN: usize = 512;
    const INNER: usize = 1024;
    let config = json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "max_position_embeddings": 64, "dtype": "bfloat16",
    });
    let vocabulary: serde_json::Map<_, _> =
        (33..97_u8).zip(0..).map(|(byte, id): (_, u32)| (char::from(byte).to_string(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let mut shapes = vec![("model.embed_tokens".to_owned(), vec![64, HIDDEN]), ("model.norm".into(), vec![HIDDEN])];
    for layer in 0..6 {
        let mut add =
            |module: &str, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{module}"), shape.into()));
        for (module, shape) in [
            ("input_layernorm", &[HIDDEN][..]),
            ("post_attention_layernorm", &[HIDDEN]),
            ("self_attn.q_proj", &[HIDDEN, HIDDEN]),
            ("self_attn.k_proj", &[HIDDEN, HIDDEN]),
            ("self_attn.v_proj", &[HIDDEN, HIDDEN]),
            ("self_attn.o_proj", &[HIDDEN, HIDDEN]),
            ("mlp.gate_proj", &[INNER, HIDDEN]),
            ("mlp.up_proj", &[INNER, HIDDEN]),
            ("mlp.down_proj", &[HIDDEN, INNER]),
        ] {
            add(module, shape);
        }
    }
    let tensors = shapes.into_iter().map(|(module, shape)| {
        let count = shape.iter().product();
        let bytes =
            move || Ok((0..count).flat_map(|i: usize| bf16::from_f32((i as f32 * 0.37).sin()).to_le_bytes()).collect());
        let (name, dtype) = (format!("{module}.weight"), TensorType::BF16);
        OutTensor { name, dtype, shape, data: OutData::Lazy(Box::new(bytes)) }
    });
    write(&folder.join("model.safetensors"), tensors.collect(), BTreeMap::new()).unwrap();
}

/// Merging holds one matrix at a time: as stored, as f32, and as written. The model has 42
/// matrices.
#[test]
fn merging_holds_one_matrix() {
    let _alone = ALONE.lock();
    let folder = tempfile::TempDir::new().unwrap();
    model(folder.path());
    let spec = ModelFiles::open(folder.path()).unwrap().spec(&BaseFormat::AsIs).unwrap();
    let module = |rows, cols| {
        let values = |shape| Array2::from_elem(shape, 0.01);
        PeftModule { a: values((2, cols)), b: values((rows, 2)), magnitude: None, bias: None }
    };
    let modules = spec.linears().map(|(path, matrix)| (path, module(matrix.rows, matrix.cols))).collect();
    let adapter = PeftAdapter { config: PeftConfig::new(2, 4.0), modules };
    let files = ModelFiles::open(folder.path()).unwrap();
    let merged = Merged::new(&files, &adapter).unwrap();
    let go_on = |_: qlora_wgpu::export::Progress<'_>| ControlFlow::Continue(());

    // Starts the threads of the pool.
    merged.write_gguf(&folder.path().join("a.gguf"), gguf::TensorType::Q8_0, &go_on).unwrap();
    let largest = 512 * 1024 * 4;
    let check = |what: &str, write: &dyn Fn()| {
        let before = NOW.load(Relaxed);
        PEAK.store(before, Relaxed);
        write();
        let peak = PEAK.load(Relaxed).saturating_sub(before);
        // Write buffers take a MiB.
        assert!(
            peak < 5 * largest / 2 + (3 << 19),
            "{what}: {peak} bytes at the peak; the largest matrix takes {largest}"
        );
    };
    for kind in [gguf::TensorType::F32, gguf::TensorType::F16, gguf::TensorType::Q4_0] {
        check("a GGUF file", &|| merged.write_gguf(&folder.path().join("a.gguf"), kind, &go_on).unwrap());
    }
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let options = DirectoryOptions { max_shard_bytes: 20_000_000, ..DirectoryOptions::new(dtype) };
        check("a directory", &|| merged.write_directory(&folder.path().join("merged"), &options, &go_on).unwrap());
    }
}
