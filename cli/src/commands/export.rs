//! `qlora export`: an adapter for llama.cpp.

use std::fs;
use std::path::PathBuf;

use clap::{Args, ValueHint};
use indicatif::HumanBytes;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::export::write_gguf_adapter;
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::internal::gguf::is_gguf_name;
use serde::Serialize;

use crate::model::{ModelArgs, misfit, read_adapter, warn_other_base};
use crate::output::{self, print_json};
use crate::paths::{check_model_inputs, check_model_output};

/// Writes an adapter as a GGUF file, which llama.cpp loads beside the model (`--lora`).
///
/// Folds in rsLoRA's scale, and ranks and alphas of single modules. A GGUF adapter can't represent
/// DoRA; use `qlora merge`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora export --model model.gguf --adapter my-adapter --output my-adapter.gguf\n  \
    qlora export --model MODEL_DIR --adapter my-adapter --output my-adapter.gguf --force")]
pub struct ExportArgs {
    /// The adapter's model: a Hugging Face directory, a .gguf file, or an id on the hub. Only its
    /// headers are read.
    #[arg(long, value_name = "PATH|ID", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    /// A PEFT adapter directory.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    adapter: PathBuf,
    /// The file to write; its name must end in .gguf.
    #[arg(long, value_name = "FILE.gguf", value_hint = ValueHint::FilePath)]
    output: PathBuf,
    /// Replace existing output.
    #[arg(long)]
    force: bool,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

/// Files and counts of an export.
#[derive(Serialize)]
struct Report {
    output: String,
    modules: usize,
    bytes: u64,
}

/// Runs `qlora export`.
///
/// # Errors
/// Errors from reading and writing; [`Error::File`] if the output exists or its name doesn't end
/// in .gguf.
pub fn run(args: &ExportArgs) -> Result<()> {
    if !is_gguf_name(&args.output) {
        let message = "must end in .gguf; the adapter is already in PEFT's format".into();
        return Err(Error::File { path: args.output.clone(), message });
    }
    check_model_output(&args.output, &args.model, &args.adapter, args.force)?;
    let files = ModelArgs::of(args.model.clone()).open()?;
    check_model_inputs(&args.output, files.path(), &args.adapter)?;
    let adapter = read_adapter(&args.adapter)?;
    let model = files.spec(&BaseFormat::AsIs)?;
    // Failing because of DoRA has nothing to do with the model.
    let explain = |error| if adapter.config.use_dora { error } else { misfit(&args.adapter, &adapter, error) };
    write_gguf_adapter(&adapter, &model, &args.output).map_err(explain)?;
    warn_other_base(&args.adapter, &adapter.config, &args.model.display().to_string());

    let bytes = fs::metadata(&args.output).map_or(0, |data| data.len());
    let report = Report { output: args.output.display().to_string(), modules: adapter.modules.len(), bytes };
    if args.json {
        return print_json(&report);
    }
    output::summary(format!("{}: an adapter of {} modules, {}", report.output, report.modules, HumanBytes(bytes)))
}
