//! `qlora finetune`: trains an adapter on data.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::error::ErrorKind::MissingRequiredArgument;
use clap::{Args, Command};
use qlora_wgpu::error::Result;
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::train::batches::Batches;
use qlora_wgpu::train::metrics::{FILE, Record};
use qlora_wgpu::train::run::{End, Run, RunFolder, RunOptions, Summary};
use serde::Serialize;

use crate::interrupt::{INTERRUPTED, interrupts};
use crate::model::{misfit, warn_other_base};
use crate::output::{self, bytes, print_json};
use crate::paths;
use crate::prepare::{Data, Prepared};
use crate::progress::train;
use crate::training::RunArgs;

/// Trains a LoRA adapter on your data.
///
/// Data is plain text, or JSON objects (one per line, or in a list) with {"prompt", "completion"},
/// {"messages"}, {"conversations"}, {"text"}, {"instruction", "input", "output"} or {"input_ids",
/// "labels"}. For pairs and chats, only the answers carry loss; `qlora data` shows which tokens
/// these are. The output directory gets metrics.jsonl, loss.svg and loss.png, checkpoints, and at
/// the end the PEFT adapter. Ctrl-C saves a checkpoint and ends with status 130; --resume
/// continues from there.
#[derive(Args, Debug)]
#[command(override_usage = "qlora finetune --model PATH|ID --data FILE --output DIR [OPTIONS]")]
#[command(after_help = "Examples:\n  \
    qlora finetune --model model.gguf --data train.jsonl --output my-adapter\n  \
    qlora finetune --model DIR --data train.jsonl --eval-split 0.1 --epochs 3 --rank 32 --output my-adapter\n  \
    qlora finetune --config run.toml --resume")]
pub struct FinetuneArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Print JSON at the end: output, end (finished, early_stop or interrupted), steps, loss,
    /// eval_loss_before, eval_loss, best_eval_loss, tokens, tokens_per_second, peak_bytes; null if
    /// there is none.
    #[arg(long, help_heading = None)]
    json: bool,
}

/// Result of a run. `loss` and `eval_loss` are from the last step and the last evaluation.
#[derive(Serialize)]
struct Report<'a> {
    output: &'a Path,
    end: End,
    steps: u32,
    loss: Option<f32>,
    eval_loss_before: Option<f64>,
    eval_loss: Option<f64>,
    best_eval_loss: Option<f64>,
    tokens: u64,
    /// Average over all steps, without evaluations and checkpoints.
    tokens_per_second: Option<f64>,
    peak_bytes: u64,
}

impl<'a> Report<'a> {
    fn new(output: &'a Path, summary: &Summary, records: &[Record]) -> Report<'a> {
        let evals = || records.iter().filter_map(|record| record.eval_loss);
        let before = std::iter::once(0).chain(records.iter().map(|record| record.tokens));
        let seconds: f64 = before
            .zip(records)
            .filter_map(|(before, record)| Some((record.tokens - before) as f64 / record.tokens_per_second?))
            .sum();
        let tokens = records.last().map_or(0, |record| record.tokens);
        Report {
            output,
            end: summary.end,
            steps: summary.steps,
            loss: records.iter().rev().find_map(|record| record.loss),
            eval_loss_before: evals().next(),
            eval_loss: evals().next_back(),
            best_eval_loss: summary.best_eval_loss,
            tokens,
            tokens_per_second: (seconds > 0.0).then(|| tokens as f64 / seconds),
            peak_bytes: records.iter().map(|record| record.peak_bytes).max().unwrap_or(0),
        }
    }
}

pub fn run(args: &FinetuneArgs) -> Result<ExitCode> {
    let (args, json) = (&args.run, args.json);
    // clap doesn't require these, as `plan` can do without.
    let (Some(_), Some(output)) = (&args.data, &args.output) else {
        missing("--data FILE and --output DIR");
    };
    check_apart(args, output)?;
    let folder = RunFolder::claim(output)?;
    let goes_on = args.resume && folder.has_checkpoint()?;
    if args.resume && !goes_on {
        output::progress(format!("{}: nothing saved yet; the run starts from the beginning", output.display()));
    }
    if !goes_on {
        folder.check_unused()?;
    }
    let prepared = args.prepare()?;
    args.check_memory(&prepared, goes_on)?;
    let Prepared { files, device, base, spec, initial, config, plan, data } = prepared;
    let Some(Data { data, options }) = data else { missing("--data FILE") };
    let steps = options.steps;

    output::progress(format!("device: {}", device.name()));
    describe(&data.batches, data.eval.len(), &options);
    output::progress(format!("memory: {} for the base, {} at the peak", bytes(plan.most.base), bytes(plan.held_bytes)));

    let mut model = files.load(&device, &base)?;
    // If training quantizes the base, `generate` needs the flag for the same base.
    let as_is = files.spec(&BaseFormat::AsIs)?;
    let base = if as_is.matrix_bytes(&device)? == spec.matrix_bytes(&device)? { "" } else { args.model.base_flag() };
    drop(files);

    let begin = if args.resume { Run::resume } else { Run::start };
    let adapter = initial.as_ref().map(|(_, adapter)| adapter);
    let mut run = begin(&mut model, config, adapter, data, options, folder).map_err(|error| match &initial {
        Some((path, adapter)) => misfit(path, adapter, args.as_typed(error)),
        None => args.as_typed(error),
    })?;
    if run.end().is_some() {
        output::progress(format!("{}: already finished, after {} steps", output.display(), run.step()));
    }
    if let Some((path, adapter)) = &initial {
        warn_other_base(path, &adapter.config, &args.model.name());
    }
    let interrupted = interrupts("stopping after this step; press Ctrl-C again to stop at once");
    let (summary, records) = train(&mut run, steps, output, || interrupted.load(Ordering::Relaxed))?;
    let report = Report::new(output, &summary, &records);
    if json {
        print_json(&report)?;
    }
    let output = output.display();
    if summary.end == End::Interrupted {
        let how = if summary.steps > 0 { "; to continue, run the same command with --resume" } else { "" };
        output::progress(format!("interrupted after {} of {steps} steps{how}", summary.steps));
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if json {
        return Ok(ExitCode::SUCCESS);
    }
    if summary.end == End::EarlyStop {
        output::summary(format!("ended after {} steps: evaluations stopped improving", summary.steps))?;
    }
    if let (Some(first), Some(last), Some(best)) = (report.eval_loss_before, report.eval_loss, report.best_eval_loss) {
        output::summary(format!("evaluation loss: {first:.4} before, {last:.4} after, {best:.4} at its best"))?;
    }
    let name = args.model.name();
    output::summary(format!("loss plot: {output}/loss.png\nadapter:   {output}"))?;
    let [name, output] = [name, output.to_string()].map(output::quoted);
    output::summary(format!("next: qlora generate --model {name}{base} --adapter {output} --prompt TEXT"))?;
    Ok(ExitCode::SUCCESS)
}

/// Refuses an output folder where the run would overwrite its inputs.
fn check_apart(args: &RunArgs, folder: &Path) -> Result<()> {
    let names = [FILE, "loss.svg", "loss.png", "adapter_config.json", "adapter_model.safetensors"];
    let files = names.map(|name| folder.join(name));
    let model = Some(args.model.name().into());
    let inputs = [
        (&args.data, "the data"),
        (&args.eval_data, "the evaluation data"),
        (&args.training.adapter.init_adapter, "the adapter"),
        (&args.config, "the settings file"),
        (&model, "the model"),
    ];
    let inputs: Vec<_> = inputs.into_iter().filter_map(|(path, what)| Some((path.as_deref()?, what))).collect();
    paths::check(std::iter::once(folder).chain(files.iter().map(PathBuf::as_path)), &inputs)
}

/// Exits like clap does if a flag is missing.
fn missing(flag: &str) -> ! {
    let mut command = FinetuneArgs::augment_args(Command::new("finetune"));
    command.error(MissingRequiredArgument, format!("{flag} must be given")).exit()
}

/// Describes the run on stderr before it starts.
fn describe(batches: &Batches, eval: usize, options: &RunOptions) {
    let (data, cut) = (batches.options(), batches.cut);
    let packing = if data.packing { ", packed" } else { "" };
    output::progress(format!(
        "data: {} examples, {} tokens{packing} in rows of at most {}; {eval} examples for evaluation",
        batches.examples(),
        batches.tokens(),
        data.seq_len
    ));
    if cut.truncated > 0 {
        output::warning(format!(
            "{} examples were longer than a row and lost {} tokens; {} of them lost every label and are left out",
            cut.truncated, cut.tokens, cut.dropped
        ));
    }
    output::progress(format!(
        "run: {} steps of {} x {} rows; {} steps per epoch",
        options.steps,
        data.grad_accum,
        data.batch_size,
        batches.steps_per_epoch()
    ));
}
