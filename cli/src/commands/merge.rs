//! `qlora merge`: merges an adapter into its model, for other programs.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use bytesize::ByteSize;
use clap::{Args, ValueEnum, ValueHint};
use indicatif::{HumanBytes, ProgressBar};
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::export::{DirectoryOptions, Merged, Progress};
use qlora_wgpu::internal::gguf::{TensorType, is_gguf_name};
use qlora_wgpu::quant::{Dtype, QuantOptions};
use serde::Serialize;

use crate::interrupt::{INTERRUPTED, interrupts};
use crate::model::{ModelArgs, misfit, read_adapter, warn_other_base};
use crate::output::{self, print_json};
use crate::paths::{check_model_inputs, check_model_output};

/// Merges an adapter into its model: a directory that transformers loads, or a GGUF file.
///
/// W of every linear layer with an adapter becomes W + s B A, with DoRA's row lengths if it uses
/// DoRA. For a dense model, W is the model's own weights. For a 4-bit model, W is the dequantized
/// weights, which the adapter was trained beside. Tokenizer, chat templates, generation settings
/// and licences are copied. Needs memory for about one matrix, or with --requantize for the 4-bit
/// matrices of a shard.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora merge --model MODEL_DIR --adapter my-adapter --output merged --dtype bf16\n  \
    qlora merge --model model.gguf --adapter my-adapter --output merged.gguf --dtype q8_0\n  \
    qlora merge --model MODEL_DIR --adapter my-adapter --output merged-nf4 --requantize nf4")]
pub struct MergeArgs {
    /// The model that the adapter was trained on, or the one that it was quantized from: a Hugging
    /// Face directory, a .gguf file, or an id on the hub.
    #[arg(long, value_name = "PATH|ID", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    /// A PEFT adapter directory.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    adapter: PathBuf,
    /// A directory to write, or a file whose name ends in .gguf.
    #[arg(long, value_name = "DIR|FILE.gguf", value_hint = ValueHint::AnyPath)]
    output: PathBuf,
    /// Type of the result. Default: the model's own for a directory, f16 for a GGUF file.
    #[arg(long, value_enum)]
    dtype: Option<MergeType>,
    /// Quantize linear layers to 4 bits again, in bitsandbytes' serialization (loses part of what
    /// the adapter learned).
    #[arg(long, value_enum)]
    requantize: Option<Requantize>,
    /// Maximum size of a shard.
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: ByteSize,
    /// Replace existing output.
    #[arg(long)]
    force: bool,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum MergeType {
    F32,
    F16,
    Bf16,
    /// 8.5 bits per weight, GGUF only.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4.5 bits per weight, embedding and head as q8_0, GGUF only.
    #[value(name = "q4_0")]
    Q4_0,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Requantize {
    /// NF4 with double-quantized scales.
    Nf4,
    /// NF4 with plain scales.
    Nf4Plain,
    /// FP4 with double-quantized scales.
    Fp4,
}

impl MergeType {
    fn gguf(self) -> TensorType {
        match self {
            MergeType::F32 => TensorType::F32,
            MergeType::F16 => TensorType::F16,
            MergeType::Bf16 => TensorType::Bf16,
            MergeType::Q8_0 => TensorType::Q8_0,
            MergeType::Q4_0 => TensorType::Q4_0,
        }
    }

    /// The corresponding type in safetensors, if there is one.
    fn dtype(self) -> Option<Dtype> {
        match self {
            MergeType::F32 => Some(Dtype::F32),
            MergeType::F16 => Some(Dtype::F16),
            MergeType::Bf16 => Some(Dtype::Bf16),
            MergeType::Q8_0 | MergeType::Q4_0 => None,
        }
    }
}

/// Files and counts of a merge.
#[derive(Serialize)]
struct Report<'a> {
    output: String,
    dtype: String,
    tensors: usize,
    merged: usize,
    bytes: u64,
    requantized: Option<&'a str>,
}

/// Runs `qlora merge`.
///
/// # Errors
/// Errors from reading, merging and writing; [`Error::File`] if the output exists,
/// [`Error::Invalid`] for options that exclude each other.
pub fn run(args: &MergeArgs) -> Result<ExitCode> {
    let to_gguf = is_gguf_name(&args.output);
    check_options(args, to_gguf)?;
    check_model_output(&args.output, &args.model, &args.adapter, args.force)?;
    let files = ModelArgs::of(args.model.clone()).open()?;
    check_model_inputs(&args.output, files.path(), &args.adapter)?;
    let adapter = read_adapter(&args.adapter)?;
    let merged = Merged::new(&files, &adapter).map_err(|error| misfit(&args.adapter, &adapter, error))?;
    warn_other_base(&args.adapter, &adapter.config, &args.model.display().to_string());

    let (bar, watch) = watched(merged.tensor_count());
    let (dtype, requantized, written);
    if to_gguf {
        let kind = args.dtype.unwrap_or(MergeType::F16).gguf();
        (dtype, requantized) = (kind.to_string(), None);
        written = merged.write_gguf(&args.output, kind, &watch);
    } else {
        let stored = args.dtype.and_then(MergeType::dtype).or(merged.config().dtype).unwrap_or(Dtype::F16);
        let max_shard_bytes = args.max_shard_size.as_u64();
        let options =
            DirectoryOptions { requantize: args.quant_options(), max_shard_bytes, ..DirectoryOptions::new(stored) };
        (dtype, requantized) = (stored.to_string(), options.requantize.map(|quant| quant.format.to_string()));
        if let Some(format) = &requantized {
            output::warning(format!(
                "quantizing merged weights to {format} again loses part of what the adapter learned; evaluate the result"
            ));
        }
        tell_companions(&merged)?;
        written = merged.write_directory(&args.output, &options, &watch);
    }
    bar.finish_and_clear();
    match written {
        Err(error @ Error::Interrupted { .. }) => {
            output::error(error);
            return Ok(ExitCode::from(INTERRUPTED));
        }
        written => written?,
    }
    let report = Report {
        output: args.output.display().to_string(),
        dtype,
        tensors: merged.tensor_count(),
        merged: merged.merged_count(),
        bytes: size(&args.output),
        requantized: requantized.as_deref(),
    };
    if args.json {
        print_json(&report)?;
    } else {
        let Report { output, dtype, tensors, merged, bytes, .. } = &report;
        let format = report.requantized.map(|format| format!(", linear layers {format}")).unwrap_or_default();
        let bytes = HumanBytes(*bytes);
        output::summary(format!("{output}: {tensors} tensors as {dtype}{format}, {merged} of them merged, {bytes}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl MergeArgs {
    fn quant_options(&self) -> Option<QuantOptions> {
        self.requantize.map(|requantize| match requantize {
            Requantize::Nf4 => QuantOptions::nf4().double_quant(),
            Requantize::Nf4Plain => QuantOptions::nf4(),
            Requantize::Fp4 => QuantOptions::fp4().double_quant(),
        })
    }
}

fn check_options(args: &MergeArgs, to_gguf: bool) -> Result<()> {
    let invalid = |what, got: &str, expected: &str| Err(Error::invalid("merge", what, got, expected));
    match args.dtype {
        _ if to_gguf && args.requantize.is_some() => invalid(
            "--requantize",
            "given",
            "GGUF files don't have these types; use --dtype q4_0, or a directory as --output",
        ),
        Some(dtype) if !to_gguf && dtype.dtype().is_none() => {
            let name = dtype.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
            invalid("--dtype", &name, "only GGUF files have this type; use an --output that ends in .gguf")
        }
        _ if args.max_shard_size.as_u64() == 0 => invalid("--max-shard-size", "0", "it must be at least 1 byte"),
        _ => Ok(()),
    }
}

/// Reports files beside the weights that come from elsewhere, and files that aren't copied.
fn tell_companions(merged: &Merged<'_>) -> Result<()> {
    let companions = merged.companions()?;
    for (name, real) in &companions.outside {
        output::warning(format!("{name} leads out of the model's folder; copying {}", real.display()));
    }
    if !companions.left_out.is_empty() {
        output::progress(format!("not copied: {}", companions.left_out.join(", ")));
    }
    Ok(())
}

/// Returns a bar, and a callback for each tensor that updates it and ends the work after Ctrl-C.
fn watched(total: usize) -> (ProgressBar, impl Fn(Progress<'_>) -> ControlFlow<()>) {
    let stop = interrupts("stopping after this tensor; press Ctrl-C again to stop at once");
    let bar = output::bar(total, "{bar:10} {pos}/{len} {wide_msg}");
    let shown = bar.clone();
    let watch = move |progress: Progress<'_>| {
        shown.set_length(progress.total as u64);
        shown.set_position(progress.done as u64);
        output::at(&shown, progress.name);
        if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    (bar, watch)
}

/// Size of a file, or of all files in a folder, in bytes.
fn size(path: &Path) -> u64 {
    match path.read_dir() {
        Ok(entries) => entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|data| data.len()).sum(),
        Err(_) => fs::metadata(path).map_or(0, |data| data.len()),
    }
}
