//! `qlora export`: an adapter for llama.cpp.

use std::fs;
use std::path::PathBuf;

use clap::{Args, ValueHint};
use indicatif::HumanBytes;
use serde::Serialize;

use super::merge::{check_inputs, check_output, is_gguf_name};
use super::model::{ModelArgs, misfit, read_adapter, warn_other_base};
use super::{print_json, say};
use crate::error::{Error, Result};
use crate::export::write_gguf_adapter;
use crate::formats::checkpoint::BaseFormat;
use crate::nn::ModelSpec;

/// Writes an adapter as a GGUF file, which llama.cpp loads beside the model (`--lora`).
///
/// The scale of rsLoRA and ranks and alphas of single modules are folded in. DoRA has no place in such a file: merge it.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora export --model model.gguf --adapter my-adapter --output my-adapter.gguf\n  \
    qlora export --model MODEL_DIR --adapter my-adapter --output my-adapter.gguf --force")]
pub struct ExportArgs {
    /// The model that the adapter is for: a Hugging Face directory, a .gguf file, or an id on the hub. Only its headers are
    /// read.
    #[arg(long, value_name = "PATH|ID", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    /// A directory with a PEFT adapter.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    adapter: PathBuf,
    /// The file to write; its name ends in .gguf.
    #[arg(long, value_name = "FILE.gguf", value_hint = ValueHint::FilePath)]
    output: PathBuf,
    /// Replace the output if it exists.
    #[arg(long)]
    force: bool,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

/// What was written.
#[derive(Serialize)]
struct Report {
    output: String,
    modules: usize,
    bytes: u64,
}

/// Runs `qlora export`.
///
/// # Errors
/// Whatever reading or writing gives; [`Error::File`] for an output that exists or is called otherwise.
pub fn run(args: &ExportArgs) -> Result<()> {
    if !is_gguf_name(&args.output) {
        let message = "must end in .gguf; PEFT's own files are what the adapter is in already".into();
        return Err(Error::File { path: args.output.clone(), message });
    }
    check_output(&args.output, &args.model, &args.adapter, args.force)?;
    let path = ModelArgs::of(args.model.clone()).path()?;
    check_inputs(&args.output, &path, &args.adapter)?;
    let adapter = read_adapter(&args.adapter)?;
    let model = ModelSpec::read(&path, &BaseFormat::AsIs)?;
    // What DoRA lacks is no matter of the model.
    let explain = |error| if adapter.config.use_dora { error } else { misfit(&args.adapter, &adapter, error) };
    write_gguf_adapter(&adapter, &model, &args.output).map_err(explain)?;
    warn_other_base(&args.adapter, &adapter.config, &args.model.display().to_string());

    let bytes = fs::metadata(&args.output).map_or(0, |data| data.len());
    let report = Report { output: args.output.display().to_string(), modules: adapter.modules.len(), bytes };
    if args.json {
        return print_json(&report);
    }
    say::summary(format!("{}: an adapter of {} modules, {}", report.output, report.modules, HumanBytes(bytes)))
}
