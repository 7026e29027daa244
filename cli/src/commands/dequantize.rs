//! `qlora dequantize`: restores the 4-bit weights of a safetensors file.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use half::{bf16, f16};
use indicatif::ProgressBar;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::bitsandbytes;
use qlora_wgpu::internal::safetensors::{self, OutData, OutTensor, SafetensorsFile, TensorType};
use qlora_wgpu::quant::{Dtype, QuantizedMatrix};
use rayon::prelude::*;

use super::quantize::{BAR, Report, check_input, copy};
use crate::output;
use crate::paths::check_file_output;

/// Restores the 4-bit weights of a safetensors file to their original type and shape.
///
/// All other tensors are copied unchanged.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora dequantize model-nf4.safetensors back.safetensors\n  \
    qlora dequantize model-nf4.safetensors back.safetensors --force --json")]
pub struct DequantizeArgs {
    /// The safetensors file to read, as written by `qlora quantize` or bitsandbytes.
    #[arg(value_hint = ValueHint::FilePath)]
    pub input: PathBuf,
    /// The safetensors file to write.
    #[arg(value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Replace existing output.
    #[arg(long)]
    pub force: bool,
    /// Print JSON: output, tensors (dequantized), copied, input_bytes, output_bytes.
    #[arg(long)]
    pub json: bool,
}

/// Runs `qlora dequantize`.
///
/// # Errors
/// Errors from reading and writing; [`Error::File`] if the output exists or nothing is 4-bit.
pub fn run(args: &DequantizeArgs) -> Result<()> {
    check_input(&args.input)?;
    let file = SafetensorsFile::open(&args.input)?;
    check_file_output(&args.output, &args.input, args.force)?;
    let packed = bitsandbytes::quantized_weights(&file);
    if packed.is_empty() {
        return Err(Error::File {
            path: args.input.clone(),
            message: "has no 4-bit weights (no `*.quant_state.*` tensor); nothing to dequantize".into(),
        });
    }
    let matrices =
        packed.iter().map(|name| Ok((*name, bitsandbytes::read(&file, name)?))).collect::<Result<Vec<_>>>()?;
    let bar = output::bar(matrices.len(), BAR);
    let copied = file.names().iter().filter(|name| {
        let weight = bitsandbytes::weight_of(name).unwrap_or(name);
        !packed.contains(weight)
    });
    let mut out = copied.map(|name| copy(&file, name)).collect::<Result<Vec<_>>>()?;
    let copied = out.len();
    out.extend(matrices.iter().map(|(name, matrix)| dequantized(name, matrix, &bar)));
    safetensors::write(&args.output, out, file.metadata())?;
    bar.finish_and_clear();
    Report::new(&args.input, &args.output, matrices.len(), copied).print(args.json)
}

/// The dense tensor for `matrix`, computed when it is written.
fn dequantized<'a>(name: &str, matrix: &'a QuantizedMatrix, bar: &'a ProgressBar) -> OutTensor<'a> {
    let dtype = match matrix.dtype() {
        Dtype::F32 => TensorType::F32,
        Dtype::F16 => TensorType::F16,
        Dtype::Bf16 => TensorType::BF16,
    };
    let name = name.to_owned();
    let shown = name.clone();
    let make = move || {
        output::at(bar, &shown);
        let bytes = dense_bytes(matrix);
        bar.inc(1);
        Ok(bytes)
    };
    OutTensor { name, dtype, shape: vec![matrix.rows(), matrix.cols()], data: OutData::Lazy(Box::new(make)) }
}

/// The weights in their original type (rounded to nearest, ties to even), little-endian.
fn dense_bytes(matrix: &QuantizedMatrix) -> Vec<u8> {
    let size = matrix.dtype().bytes();
    let mut out = vec![0; matrix.len() * size];
    out.par_chunks_mut((matrix.cols() * size).max(1)).enumerate().for_each_init(
        || vec![0.0; matrix.cols()],
        |values, (row, bytes)| {
            matrix.dequantize_rows(row..row + 1, values);
            for (bytes, &value) in bytes.chunks_exact_mut(size).zip(&*values) {
                match matrix.dtype() {
                    Dtype::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
                    Dtype::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                    Dtype::Bf16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                }
            }
        },
    );
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use clap::Parser;
    use tempfile::TempDir;

    use super::super::quantize::{self, QuantizeArgs};
    use super::*;
    use qlora_wgpu::quant::Format;

    #[derive(Parser)]
    enum Command {
        Quantize(QuantizeArgs),
        Dequantize(DequantizeArgs),
    }

    /// Runs a `qlora` command line in which `@x` is the file `x` in `folder`.
    fn run(folder: &TempDir, line: &str) -> Result<()> {
        let words = line.split(' ').map(|word| match word.strip_prefix('@') {
            Some(name) => folder.path().join(name).to_str().unwrap().to_owned(),
            None => word.to_owned(),
        });
        match Command::parse_from(["qlora".to_owned()].into_iter().chain(words)) {
            Command::Quantize(args) => quantize::run(&args),
            Command::Dequantize(args) => super::run(&args),
        }
    }

    fn open(folder: &TempDir, name: &str) -> SafetensorsFile {
        SafetensorsFile::open(folder.path().join(name)).unwrap()
    }

    fn tensor(name: &str, dtype: TensorType, shape: &[usize], bytes: Vec<u8>) -> OutTensor<'static> {
        OutTensor { name: name.into(), dtype, shape: shape.into(), data: OutData::Bytes(bytes.into()) }
    }

    /// A folder with the file `in`: two matrices to quantize and four tensors to leave alone.
    fn folder() -> TempDir {
        let folder = TempDir::new().unwrap();
        let values = |n: usize| (0..n).map(|i| (i as f32 * 0.3).cos());
        let f32s = |n| values(n).flat_map(f32::to_le_bytes).collect();
        let bf16s = |n| values(n).flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
        let tensors = vec![
            tensor("a.weight", TensorType::BF16, &[5, 33], bf16s(165)),
            tensor("b.weight", TensorType::F32, &[64, 2], f32s(128)),
            tensor("b.bias", TensorType::F32, &[64], f32s(64)),
            tensor("norm.weight", TensorType::F32, &[7], f32s(7)),
            tensor("table", TensorType::F32, &[2, 2], f32s(4)),
            tensor("ids.weight", TensorType::U8, &[2, 2], vec![1, 2, 3, 4]),
        ];
        let metadata = BTreeMap::from([("license".into(), "MIT".into())]);
        safetensors::write(&folder.path().join("in"), tensors, metadata).unwrap();
        folder
    }

    #[test]
    fn there_and_back() {
        let folder = folder();
        for (format, flags) in [("nf4", "--double-quant"), ("fp4", "--block 128"), ("int4", "--double-quant --json")] {
            run(&folder, &format!("quantize @in @packed --force --format {format} {flags}")).unwrap();
            run(&folder, "dequantize @packed @out --force").unwrap();
            let (input, packed, out) = (open(&folder, "in"), open(&folder, "packed"), open(&folder, "out"));
            assert_eq!(
                bitsandbytes::quantized_weights(&packed).into_iter().collect::<Vec<_>>(),
                ["a.weight", "b.weight"]
            );
            assert_eq!((packed.metadata(), out.metadata()), (input.metadata(), input.metadata()));
            assert_eq!(out.names(), input.names());
            for name in input.names() {
                let [before, after] = [&input, &out].map(|file| file.tensor(name).unwrap());
                assert_eq!((after.dtype, after.shape), (before.dtype, before.shape));
                let weight = ["a.weight", "b.weight"].contains(&name.as_str());
                assert_eq!(after.bytes != before.bytes, weight, "{name}");
                if weight {
                    let matrix = bitsandbytes::read(&packed, name).unwrap();
                    assert_eq!(matrix.format().to_string(), format);
                    assert_eq!(after.bytes, dense_bytes(&matrix));
                }
            }
        }
    }

    #[test]
    fn expressions_choose_the_weights() {
        let folder = folder();
        let chosen = |flags: &str| {
            run(&folder, &format!("quantize @in @out --force {flags}")).unwrap();
            let file = open(&folder, "out");
            bitsandbytes::quantized_weights(&file).into_iter().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(chosen("--include ^a"), "a.weight");
        assert_eq!(chosen("--include ^a --include ^b"), "a.weight b.weight");
        assert_eq!(chosen("--exclude ^a"), "b.weight");
        let error = run(&folder, "quantize @in @none --include norm").unwrap_err();
        assert!(error.to_string().contains("nothing to quantize"), "{error}");
        assert!(!folder.path().join("none").exists());
        let error = run(&folder, "dequantize @in @none").unwrap_err();
        assert!(error.to_string().contains("nothing to dequantize"), "{error}");
    }

    #[test]
    fn files_are_replaced_only_when_asked() {
        let folder = folder();
        let before = fs::read(folder.path().join("in")).unwrap();
        for line in ["quantize @in @in --force", "quantize @in @./in --force", "dequantize @in @in"] {
            let error = run(&folder, line).unwrap_err().to_string();
            assert!(error.contains("is the input too"), "{error}");
        }
        assert_eq!(fs::read(folder.path().join("in")).unwrap(), before);
        run(&folder, "quantize @in @out").unwrap();
        for line in ["quantize @in @out", "dequantize @in @out"] {
            let error = run(&folder, line).unwrap_err().to_string();
            assert!(error.contains("--force"), "{error}");
        }
        run(&folder, "quantize @in @out --force").unwrap();
    }

    #[test]
    fn a_bad_weight_is_named_and_nothing_is_written() {
        let folder = TempDir::new().unwrap();
        let bytes = [1.0, f32::NAN].map(f32::to_le_bytes).concat();
        let tensors = vec![tensor("x.weight", TensorType::F32, &[1, 2], bytes)];
        safetensors::write(&folder.path().join("in"), tensors, BTreeMap::new()).unwrap();
        let error = run(&folder, "quantize @in @out").unwrap_err().to_string();
        assert!(error.contains("\"x.weight\"") && error.contains("flat index 1"), "{error}");
        let error = run(&folder, "quantize @in @out --block 48").unwrap_err().to_string();
        assert!(error.contains("block is 48"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn packed_weights_are_copied() {
        let folder = folder();
        run(&folder, "quantize @in @half --include ^a").unwrap();
        run(&folder, "quantize @half @out --format int4").unwrap();
        let (half, out) = (open(&folder, "half"), open(&folder, "out"));
        for name in half.names().iter().filter(|name| name.starts_with("a.weight")) {
            assert_eq!(half.tensor(name).unwrap().bytes, out.tensor(name).unwrap().bytes);
        }
        assert_eq!(bitsandbytes::read(&out, "b.weight").unwrap().format(), Format::Int4);
    }
}
