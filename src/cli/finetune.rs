//! `qlora finetune`: trains an adapter on data.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::error::ErrorKind::MissingRequiredArgument;
use clap::{Args, CommandFactory};
use serde::Serialize;

use super::model::{misfit, warn_other_base};
use super::progress::{bytes, train};
use super::run::{Data, Prepared, RunArgs};
use super::{Cli, INTERRUPTED, interrupts, output, print_json, say, settings};
use crate::error::Result;
use crate::formats::checkpoint::BaseFormat;
use crate::nn::{Decoder, ModelSpec};
use crate::train::batches::Batches;
use crate::train::metrics::{FILE, Record};
use crate::train::run::{End, Run, RunFolder, RunOptions, Summary};

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

/// Inserts the flags of a settings file, if the arguments name one.
pub(super) fn with_settings(
    arguments: Vec<OsString>,
    command: impl FnOnce() -> clap::Command,
) -> Result<Vec<OsString>> {
    // Required flags may be in the file, so look only for its path and the command.
    let Some(path) = config_path(&arguments) else { return Ok(arguments) };
    let command = command();
    let named = |word: &OsString| command.find_subcommand(word.to_str()?);
    let found = arguments.iter().enumerate().skip(1).find_map(|(at, word)| Some((at, named(word)?)));
    let Some((at, command)) = found.filter(|(_, command)| ["finetune", "plan"].contains(&command.get_name())) else {
        return Ok(arguments);
    };
    let typed: Vec<String> = arguments.iter().filter_map(long_name).collect();
    let mut all = arguments;
    // Insert after the command's name.
    all.splice(at + 1..at + 1, settings::arguments(&path, command, &typed)?);
    Ok(all)
}

/// Returns `name` for `--name` and `--name=value`.
fn long_name(argument: &OsString) -> Option<String> {
    let name = argument.to_str()?.strip_prefix("--")?;
    Some(name.split_once('=').map_or(name, |(name, _)| name).to_owned())
}

fn config_path(arguments: &[OsString]) -> Option<PathBuf> {
    arguments.iter().enumerate().find_map(|(at, argument)| match argument.to_str()? {
        "--config" => arguments.get(at + 1).map(PathBuf::from),
        other => other.strip_prefix("--config=").map(PathBuf::from),
    })
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
        say::progress(format!("{}: nothing saved yet; the run starts from the beginning", output.display()));
    }
    if !goes_on {
        folder.check_unused()?;
    }
    let prepared = args.prepare()?;
    args.check_memory(&prepared, goes_on)?;
    let Prepared { path, device, base, spec, initial, config, plan, data } = prepared;
    let Some(Data { data, options }) = data else { missing("--data FILE") };
    let steps = options.steps;

    say::progress(format!("device: {}", device.name()));
    describe(&data.batches, data.eval.len(), &options);
    say::progress(format!("memory: {} for the base, {} at the peak", bytes(plan.most.base), bytes(plan.held_bytes)));

    let mut model = Decoder::load(&device, &path, &base)?;

    let begin = if args.resume { Run::resume } else { Run::start };
    let adapter = initial.as_ref().map(|(_, adapter)| adapter);
    let mut run = begin(&mut model, config, adapter, data, options, folder).map_err(|error| match &initial {
        Some((path, adapter)) => misfit(path, adapter, args.as_typed(error)),
        None => args.as_typed(error),
    })?;
    if run.end().is_some() {
        say::progress(format!("{}: already finished, after {} steps", output.display(), run.step()));
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
        say::progress(format!("interrupted after {} of {steps} steps{how}", summary.steps));
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if json {
        return Ok(ExitCode::SUCCESS);
    }
    if summary.end == End::EarlyStop {
        say::summary(format!("ended after {} steps: evaluations stopped improving", summary.steps))?;
    }
    if let (Some(first), Some(last), Some(best)) = (report.eval_loss_before, report.eval_loss, report.best_eval_loss) {
        say::summary(format!("evaluation loss: {first:.4} before, {last:.4} after, {best:.4} at its best"))?;
    }
    // If training quantized the base, `generate` needs the flag for the same base.
    let as_is = ModelSpec::read(&path, &BaseFormat::AsIs)?;
    let base = if as_is.matrix_bytes(&device)? == spec.matrix_bytes(&device)? { "" } else { args.model.base_flag() };
    let name = args.model.name();
    say::summary(format!("loss plot: {output}/loss.png\nadapter:   {output}"))?;
    let [name, output] = [name, output.to_string()].map(say::quoted);
    say::summary(format!("next: qlora generate --model {name}{base} --adapter {output} --prompt TEXT"))?;
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
    output::check(std::iter::once(folder).chain(files.iter().map(PathBuf::as_path)), &inputs)
}

/// Exits like clap does if a flag is missing.
fn missing(flag: &str) -> ! {
    let mut command = Cli::command();
    command.build();
    let message = format!("{flag} must be given");
    let finetune =
        command.find_subcommand_mut("finetune").map(|finetune| finetune.error(MissingRequiredArgument, &message));
    finetune.unwrap_or_else(|| Cli::command().error(MissingRequiredArgument, &message)).exit()
}

/// Describes the run on stderr before it starts.
fn describe(batches: &Batches, eval: usize, options: &RunOptions) {
    let (data, cut) = (batches.options(), batches.cut);
    let packing = if data.packing { ", packed" } else { "" };
    say::progress(format!(
        "data: {} examples, {} tokens{packing} in rows of at most {}; {eval} examples for evaluation",
        batches.examples(),
        batches.tokens(),
        data.seq_len
    ));
    if cut.truncated > 0 {
        say::warning(format!(
            "{} examples were longer than a row and lost {} tokens; {} of them lost every label and are left out",
            cut.truncated, cut.tokens, cut.dropped
        ));
    }
    say::progress(format!(
        "run: {} steps of {} x {} rows; {} steps per epoch",
        options.steps,
        data.grad_accum,
        data.batch_size,
        batches.steps_per_epoch()
    ));
}
