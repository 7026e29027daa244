//! `qlora quantize` and `qlora dequantize`: convert safetensors files to 4 bits and back.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use half::{bf16, f16};
use indicatif::{HumanBytes, ProgressBar};
use rayon::prelude::*;
use regex::Regex;
use serde::Serialize;

use super::{output, print_json, say};
use crate::error::{Error, Result};
use crate::formats::bitsandbytes;
use crate::formats::safetensors::{self, OutData, OutTensor, SafetensorsFile, TensorType};
use crate::memory;
use crate::quant::{Dtype, Format, QuantOptions, QuantizedMatrix};

const BAR: &str = "{bar:10} {pos}/{len} {wide_msg}";

/// Quantizes the weights of a safetensors file to 4 bits, in bitsandbytes' serialization.
///
/// Takes every 2-D tensor of type F32, F16 or BF16 named `weight` or `*.weight`. All other tensors
/// are copied unchanged, including weights that are 4-bit already.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora quantize model.safetensors model-nf4.safetensors --double-quant\n  \
    qlora quantize model.safetensors out.safetensors --format fp4 --exclude embed_tokens --exclude '^lm_head'")]
pub struct QuantizeArgs {
    /// The safetensors file to read.
    #[arg(value_hint = ValueHint::FilePath)]
    pub input: PathBuf,
    /// The safetensors file to write.
    #[arg(value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// 4-bit format: nf4, fp4, or int4 (which only this program reads).
    #[arg(long, default_value_t = Format::Nf4)]
    pub format: Format,
    /// Quantize the scales too: 4.127 bits per weight instead of 4.5.
    #[arg(long)]
    pub double_quant: bool,
    /// Weights per scale: a power of two from 32 to 4096.
    #[arg(long, default_value_t = 64)]
    pub block: usize,
    /// Quantize only weights whose names match this regular expression; may be repeated.
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    pub include: Vec<Regex>,
    /// Skip weights whose names match this regular expression; may be repeated.
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    pub exclude: Vec<Regex>,
    /// Replace existing output.
    #[arg(long)]
    pub force: bool,
    /// Print JSON: output, format, bits_per_weight, tensors (quantized), copied, input_bytes,
    /// output_bytes.
    #[arg(long)]
    pub json: bool,
}

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

/// Result of quantizing or dequantizing a file.
#[derive(Serialize)]
struct Report<'a> {
    output: &'a Path,
    /// Format of the quantized weights. Like `bits_per_weight`, absent after dequantizing.
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bits_per_weight: Option<f64>,
    /// Number of tensors that were quantized or dequantized.
    tensors: usize,
    copied: usize,
    input_bytes: u64,
    output_bytes: u64,
}

impl<'a> Report<'a> {
    fn new(input: &Path, output: &'a Path, tensors: usize, copied: usize) -> Report<'a> {
        let size = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
        let (input_bytes, output_bytes) = (size(input), size(output));
        Report { output, format: None, bits_per_weight: None, tensors, copied, input_bytes, output_bytes }
    }

    /// Prints one JSON value or one line on standard output.
    fn print(&self, json: bool) -> Result<()> {
        if json {
            return print_json(self);
        }
        let done = match (&self.format, self.bits_per_weight) {
            (Some(format), Some(bits)) => format!("quantized to {format} ({bits:.3} bits per weight)"),
            _ => "dequantized".into(),
        };
        let (tensors, plural) = (self.tensors, if self.tensors == 1 { "" } else { "s" });
        let [before, after] = [self.input_bytes, self.output_bytes].map(HumanBytes);
        let (output, copied) = (self.output.display(), self.copied);
        say::summary(format!("{output}: {tensors} tensor{plural} {done}, {copied} copied, {before} -> {after}"))
    }
}

/// Runs `qlora quantize`.
///
/// # Errors
/// Errors from reading, quantizing and writing; [`Error::File`] if the output exists or no tensor
/// matches.
pub fn quantize(args: &QuantizeArgs) -> Result<()> {
    check_input(&args.input)?;
    let file = SafetensorsFile::open(&args.input)?;
    check_output(&args.input, &args.output, args.force)?;
    let options = QuantOptions { format: args.format, block: args.block, ..QuantOptions::default() };
    let options = if args.double_quant { options.double_quant() } else { options };

    let packed = bitsandbytes::quantized_weights(&file);
    let (chosen, copied): (Vec<&String>, Vec<&String>) = file
        .names()
        .iter()
        .partition(|name| !packed.contains(name.as_str()) && args.matches(name) && is_matrix(&file, name));
    if chosen.is_empty() {
        return Err(Error::File {
            path: args.input.clone(),
            message: "no 2-D float tensor named `weight` or `*.weight` matches; nothing to quantize".into(),
        });
    }
    check_memory(&file, &chosen, options.block)?;
    let bar = say::bar(chosen.len(), BAR);
    let mut matrices = Vec::with_capacity(chosen.len());
    for name in chosen {
        say::at(&bar, name);
        matrices.push((name, quantize_tensor(&file, name, &options)?));
        bar.inc(1);
    }
    bar.finish_and_clear();

    let mut out = copied.iter().map(|name| copy(&file, name)).collect::<Result<Vec<_>>>()?;
    for (name, matrix) in &matrices {
        out.extend(bitsandbytes::tensors(name, matrix)?);
    }
    safetensors::write(&args.output, out, file.metadata())?;
    let weights: usize = matrices.iter().map(|(_, m)| m.len()).sum();
    let bits: f64 = matrices.iter().map(|(_, m)| m.bits_per_weight() * m.len() as f64).sum();
    let report = Report {
        format: Some(args.format.to_string()),
        bits_per_weight: Some(bits / weights.max(1) as f64),
        ..Report::new(&args.input, &args.output, matrices.len(), copied.len())
    };
    report.print(args.json)
}

/// Runs `qlora dequantize`.
///
/// # Errors
/// Errors from reading and writing; [`Error::File`] if the output exists or nothing is 4-bit.
pub fn dequantize(args: &DequantizeArgs) -> Result<()> {
    check_input(&args.input)?;
    let file = SafetensorsFile::open(&args.input)?;
    check_output(&args.input, &args.output, args.force)?;
    let packed = bitsandbytes::quantized_weights(&file);
    if packed.is_empty() {
        return Err(Error::File {
            path: args.input.clone(),
            message: "has no 4-bit weights (no `*.quant_state.*` tensor); nothing to dequantize".into(),
        });
    }
    let matrices =
        packed.iter().map(|name| Ok((*name, bitsandbytes::read(&file, name)?))).collect::<Result<Vec<_>>>()?;
    let bar = say::bar(matrices.len(), BAR);
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

impl QuantizeArgs {
    fn matches(&self, name: &str) -> bool {
        let finds = |regex: &Regex| regex.is_match(name);
        (name == "weight" || name.ends_with(".weight"))
            && (self.include.is_empty() || self.include.iter().any(finds))
            && !self.exclude.iter().any(finds)
    }
}

/// Refuses a directory, and suggests the files in it.
fn check_input(input: &Path) -> Result<()> {
    if !input.is_dir() {
        return Ok(());
    }
    let is_tensors = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    let mut files: Vec<PathBuf> = output::files(input).into_iter().filter(is_tensors).collect();
    files.sort();
    let hint = match files.as_slice() {
        [] => "it has no .safetensors file".into(),
        [one] => format!("give the file in it, {}", one.display()),
        [first, ..] => {
            format!("give the {} files in it one by one, such as {}", files.len(), first.display())
        }
    };
    Err(Error::File { path: input.into(), message: format!("is a directory; {hint}") })
}

/// Refuses to replace a file without --force, and to replace the input at all.
fn check_output(input: &Path, output: &Path, force: bool) -> Result<()> {
    output::check([output], &[(input, "the input")])?;
    if !force && output::would_replace(output) {
        let message = "exists; pass --force to replace it".into();
        return Err(Error::File { path: output.into(), message });
    }
    Ok(())
}

fn is_matrix(file: &SafetensorsFile, name: &str) -> bool {
    file.get(name).is_some_and(|tensor| tensor.shape.len() == 2 && tensor.dtype().is_some())
}

/// Checks that the 4-bit weights fit into memory. All of them are made before the first is
/// written.
fn check_memory(file: &SafetensorsFile, chosen: &[&String], block: usize) -> Result<()> {
    let bytes = |name: &&String| file.get(name).map_or(0, |tensor| tensor.shape.iter().product::<usize>() as u64);
    let values: u64 = chosen.iter().map(bytes).sum();
    // Half a byte per weight, plus scales.
    let needed = values / 2 + values / block.max(1) as u64 * 4;
    memory::check(needed).map_err(|e| Error::File { path: file.path().into(), message: format!("quantizing {e}") })
}

fn quantize_tensor(file: &SafetensorsFile, name: &str, options: &QuantOptions) -> Result<QuantizedMatrix> {
    let tensor = file.tensor(name)?;
    let (Some(source), &[rows, cols]) = (tensor.source(), tensor.shape) else {
        return Err(file.tensor_error(name, "is not a 2-D float tensor"));
    };
    QuantizedMatrix::quantize(source, rows, cols, options).map_err(|e| file.tensor_error(name, e))
}

fn copy<'a>(file: &'a SafetensorsFile, name: &str) -> Result<OutTensor<'a>> {
    let tensor = file.tensor(name)?;
    Ok(OutTensor {
        name: name.into(),
        dtype: tensor.dtype,
        shape: tensor.shape.to_vec(),
        data: OutData::Bytes(tensor.bytes.into()),
    })
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
        say::at(bar, &shown);
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

    use clap::Parser;
    use tempfile::TempDir;

    use super::*;

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
            Command::Quantize(args) => quantize(&args),
            Command::Dequantize(args) => dequantize(&args),
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
