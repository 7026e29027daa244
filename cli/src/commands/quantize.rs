//! `qlora quantize`: converts the weights of a safetensors file to 4 bits.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use indicatif::HumanBytes;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal;
use qlora_wgpu::internal::bitsandbytes;
use qlora_wgpu::internal::safetensors::{self, OutData, OutTensor, SafetensorsFile};
use qlora_wgpu::quant::{Format, QuantOptions, QuantizedMatrix};
use regex::Regex;
use serde::Serialize;

use crate::output::{self, print_json};
use crate::paths::{self, check_file_output};

pub(super) const BAR: &str = "{bar:10} {pos}/{len} {wide_msg}";

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

/// Result of quantizing or dequantizing a file.
#[derive(Serialize)]
pub(super) struct Report<'a> {
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
    pub(super) fn new(input: &Path, output: &'a Path, tensors: usize, copied: usize) -> Report<'a> {
        let size = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
        let (input_bytes, output_bytes) = (size(input), size(output));
        Report { output, format: None, bits_per_weight: None, tensors, copied, input_bytes, output_bytes }
    }

    /// Prints one JSON value or one line on standard output.
    pub(super) fn print(&self, json: bool) -> Result<()> {
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
        output::summary(format!("{output}: {tensors} tensor{plural} {done}, {copied} copied, {before} -> {after}"))
    }
}

/// Runs `qlora quantize`.
///
/// # Errors
/// Errors from reading, quantizing and writing; [`Error::File`] if the output exists or no tensor
/// matches.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    check_input(&args.input)?;
    let file = SafetensorsFile::open(&args.input)?;
    check_file_output(&args.output, &args.input, args.force)?;
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
    let bar = output::bar(chosen.len(), BAR);
    let mut matrices = Vec::with_capacity(chosen.len());
    for name in chosen {
        output::at(&bar, name);
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

impl QuantizeArgs {
    fn matches(&self, name: &str) -> bool {
        let finds = |regex: &Regex| regex.is_match(name);
        (name == "weight" || name.ends_with(".weight"))
            && (self.include.is_empty() || self.include.iter().any(finds))
            && !self.exclude.iter().any(finds)
    }
}

/// Refuses a directory, and suggests the files in it.
pub(super) fn check_input(input: &Path) -> Result<()> {
    if !input.is_dir() {
        return Ok(());
    }
    let is_tensors = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    let mut files: Vec<PathBuf> = paths::files(input).into_iter().filter(is_tensors).collect();
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
    internal::check_memory(needed)
        .map_err(|e| Error::File { path: file.path().into(), message: format!("quantizing {e}") })
}

fn quantize_tensor(file: &SafetensorsFile, name: &str, options: &QuantOptions) -> Result<QuantizedMatrix> {
    let tensor = file.tensor(name)?;
    let (Some(source), &[rows, cols]) = (tensor.source(), tensor.shape) else {
        return Err(file.tensor_error(name, "is not a 2-D float tensor"));
    };
    QuantizedMatrix::quantize(source, rows, cols, options).map_err(|e| file.tensor_error(name, e))
}

pub(super) fn copy<'a>(file: &'a SafetensorsFile, name: &str) -> Result<OutTensor<'a>> {
    let tensor = file.tensor(name)?;
    Ok(OutTensor {
        name: name.into(),
        dtype: tensor.dtype,
        shape: tensor.shape.to_vec(),
        data: OutData::Bytes(tensor.bytes.into()),
    })
}
