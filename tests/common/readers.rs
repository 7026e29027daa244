//! Calls everything that reads files, whole or damaged: for the fuzz targets, and for tests of
//! their findings.

mod adapters;
mod text;
mod vocabulary;

use std::fs;
use std::path::PathBuf;

use qlora_wgpu::formats::checkpoint::{BaseFormat, Checkpoint};
use qlora_wgpu::internal::bitsandbytes;
use qlora_wgpu::internal::gguf::{GgufFile, RowOrder, Value};
use qlora_wgpu::internal::safetensors::{SafetensorsFile, Tensors};
use qlora_wgpu::nn::ModelConfig;
use qlora_wgpu::quant::HostMatrix;
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::{Device, ModelFiles, Result};
use tempfile::TempDir;

pub use adapters::adapter_config;
pub use text::{jsonl, tokenizer};

/// Reads `bytes` as a GGUF file: values, tensors in every order and base, config, tokenizer,
/// model.
///
/// # Errors
/// Errors of opening the file. All readers are called; each reports what is wrong inside the file.
///
/// # Panics
/// If two readers contradict each other.
pub fn gguf(bytes: &[u8]) -> Result<()> {
    let (_folder, path) = file("x.gguf", bytes);
    let file = GgufFile::open(&path)?;

    for key in file.keys() {
        walk(file.metadata(key).expect("a value that was read when the file was opened"));
        drop((file.get::<u32>(key), file.get::<i32>(key), file.get::<usize>(key), file.get::<f32>(key)));
        drop((file.get::<bool>(key), file.get::<&str>(key), file.get::<Vec<&str>>(key), file.get::<Vec<f32>>(key)));
    }
    let orders = [RowOrder::Plain, RowOrder::Interleaved { head_dim: 2 }, RowOrder::Interleaved { head_dim: 6 }];
    for name in file.names() {
        let tensor = file.tensor(name)?;
        for order in orders {
            match *tensor.shape {
                [len] => drop(file.vector(name, len, order).map(|values| assert_eq!(values.len(), len))),
                [rows, cols] => {
                    bases().for_each(|base| decode(file.matrix(name, rows, cols, order, &base), rows, cols))
                }
                _ => {}
            }
        }
    }
    drop(ModelConfig::from_gguf(&file));
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
        drop(tokenizer.chat());
        let ids = tokenizer.encode("Hello, 123 wörlds\n</s>", true).unwrap_or_default();
        tokenizer.decode(&ids, false).expect("ids of its own");
    }
    drop(
        ModelFiles::open(&path)
            .and_then(|files| files.load(&Device::cpu(), &BaseFormat::Quantize(QuantOptions::nf4()))),
    );
    Ok(())
}

/// Reads `bytes` as a safetensors file and as a checkpoint: each tensor in its own type, and 4-bit
/// weights from their parts.
///
/// # Errors
/// Errors of opening the file.
///
/// # Panics
/// If two readers contradict each other.
pub fn safetensors(bytes: &[u8]) -> Result<()> {
    let (folder, path) = file("model.safetensors", bytes);
    let file = SafetensorsFile::open(&path)?;

    drop(file.metadata());
    for name in file.names() {
        drop(file.tensor(name)?.to_f32());
    }
    let checkpoint = Checkpoint::open(folder.path())?;
    for name in checkpoint.names() {
        match *checkpoint.tensor(name)?.shape {
            [len] => drop(checkpoint.vector(name, len).map(|values| assert_eq!(values.len(), len))),
            [rows, cols] => bases().for_each(|base| decode(checkpoint.matrix(name, rows, cols, &base), rows, cols)),
            _ => {}
        }
    }
    for weight in bitsandbytes::quantized_weights(&checkpoint) {
        if let Ok(matrix) = bitsandbytes::read(&checkpoint, weight) {
            let (rows, cols) = (matrix.rows(), matrix.cols());
            decode(checkpoint.matrix(weight, rows, cols, &BaseFormat::AsIs), rows, cols);
            drop(bitsandbytes::tensors(weight, &matrix).expect("writing parts that were read from parts"));
        }
    }
    Ok(())
}

/// Makes a file with this name in a folder of its own, which is deleted with it.
fn file(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(name);
    fs::write(&path, bytes).expect("a file in it");
    (folder, path)
}

fn bases() -> impl Iterator<Item = BaseFormat> {
    let quantized = [QuantOptions::nf4(), QuantOptions::int4().double_quant()].map(BaseFormat::Quantize);
    [BaseFormat::AsIs].into_iter().chain(quantized)
}

/// Decodes a matrix that was requested with this shape.
fn decode(matrix: Result<HostMatrix>, rows: usize, cols: usize) {
    let Ok(matrix) = matrix else { return };
    assert_eq!((matrix.rows(), matrix.cols()), (rows, cols));
    matrix.dequantize_rows(0..rows, &mut vec![0.0; rows * cols]);
}

/// Visits every value in a value.
fn walk(value: Value<'_>) {
    if let Value::Array(array) = value {
        assert_eq!(array.iter().count(), array.len());
        array.iter().for_each(walk);
    }
}
