//! `qlora finetune`: from a model and a text to a trained adapter.

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::model::{Base, ModelArgs, exists, misfit};
use super::progress::{Progress, bytes};
use super::training::TrainingArgs;
use super::{plot, print_line, settings};
use crate::error::{Error, Result};
use crate::formats::checkpoint::BaseFormat;
use crate::formats::peft::PeftConfig;
use crate::nn::{Decoder, ModelSpec};
use crate::text::Tokenizer;
use crate::train::batches::Batches;
use crate::train::data::{DataOptions, Dataset};
use crate::train::metrics;
use crate::train::run::{End, Run, RunOptions, check_unused};

/// The status of a run that was interrupted, as shells have it for Ctrl-C.
const INTERRUPTED: u8 = 130;

/// Trains an adapter of a model on a text.
///
/// Data: plain text, or JSON lines of {"prompt", "completion"}, {"messages"}, {"text"}, {"instruction", "input", "output"} or
/// {"input_ids", "labels"}. Of pairs and chats only the answers carry loss. The output directory gets metrics.jsonl,
/// loss.svg and loss.png, checkpoints, and in the end the adapter as PEFT has it. Ctrl-C saves a checkpoint and ends with status 130;
/// --resume goes on from there.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora finetune --model model.gguf --data train.jsonl --output my-adapter\n  \
    qlora finetune --model DIR --data train.jsonl --eval-split 0.1 --epochs 3 --rank 32 --output my-adapter\n  \
    qlora finetune --config run.toml --resume")]
pub struct FinetuneArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What to train on; .jsonl for JSON lines, anything else is plain text.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// The directory of the run, which must not hold another.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Leave out lines that cannot be read, and count them.
    #[arg(long)]
    skip_bad_lines: bool,
    /// How often every example is seen; 1 if --max-steps is not given either.
    #[arg(long, value_name = "N", conflicts_with = "max_steps", value_parser = clap::value_parser!(u32).range(1..))]
    epochs: Option<u32>,
    /// Updates in all; the data are repeated as needed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_steps: Option<u32>,
    #[command(flatten)]
    training: TrainingArgs,
    /// What to evaluate on.
    #[arg(long, value_name = "FILE", conflicts_with = "eval_split", help_heading = "Evaluation and checkpoints")]
    eval_data: Option<PathBuf>,
    /// Evaluate on this share of the examples instead of training on them.
    #[arg(long, value_name = "SHARE", value_parser = share, help_heading = "Evaluation and checkpoints")]
    eval_split: Option<f64>,
    /// Steps between evaluations; by default a tenth of the run. 0: only before the first step and after the last.
    #[arg(long, value_name = "STEPS", help_heading = "Evaluation and checkpoints")]
    eval_every: Option<u32>,
    /// End after so many evaluations that were no better than the best, whose adapter is then the result.
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    early_stop: Option<u32>,
    /// Steps between checkpoints; 0: only at the end.
    #[arg(long, value_name = "STEPS", default_value_t = 100, help_heading = "Evaluation and checkpoints")]
    save_every: u32,
    /// Checkpoints to keep.
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Evaluation and checkpoints")]
    keep: usize,
    /// Go on from the newest checkpoint in --output; the other flags are to be as they were.
    #[arg(long, help_heading = "Evaluation and checkpoints")]
    resume: bool,
    /// A TOML file with any of these flags (max-steps = 100); those that are typed win.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Arguments with those of a settings file before them, if `typed` names one.
pub(super) fn with_settings(arguments: Vec<OsString>, command: &clap::Command) -> Result<Vec<OsString>> {
    // Required flags may be in the file, so that only the path can be looked for.
    let Some(path) = config_path(&arguments) else { return Ok(arguments) };
    let Some(finetune) = command.find_subcommand("finetune") else { return Ok(arguments) };
    let typed: Vec<String> = arguments.iter().filter_map(long_name).collect();
    let mut all = arguments;
    // After the program's name and the command's.
    all.splice(2..2, settings::arguments(&path, finetune, &typed)?);
    Ok(all)
}

/// `name` of `--name` or `--name=value`.
fn long_name(argument: &OsString) -> Option<String> {
    let name = argument.to_str()?.strip_prefix("--")?;
    Some(name.split_once('=').map_or(name, |(name, _)| name).to_owned())
}

fn config_path(arguments: &[OsString]) -> Option<PathBuf> {
    if arguments.get(1)? != "finetune" {
        return None;
    }
    arguments.iter().enumerate().find_map(|(at, argument)| match argument.to_str()? {
        "--config" => arguments.get(at + 1).map(PathBuf::from),
        other => other.strip_prefix("--config=").map(PathBuf::from),
    })
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| *share > 0.0 && *share < 1.0).ok_or_else(|| "it must be between 0 and 1".into())
}

pub fn run(args: &FinetuneArgs) -> Result<ExitCode> {
    let inputs = [Some(&args.data), args.eval_data.as_ref()];
    inputs.into_iter().flatten().try_for_each(|path| exists(path))?;
    if !args.resume {
        check_unused(&args.output)?;
    }
    let path = args.model.path()?;
    let initial = args.training.adapter.initial()?;
    let (device, base) = (args.model.device()?, args.model.base(Base::Nf4));

    let spec = ModelSpec::read(&path, &base)?;
    let tokenizer = args.model.tokenizer(&path, spec.config().vocab_size);
    let mut data = args.read(&args.data, tokenizer.as_ref())?;
    let eval = match (&args.eval_data, args.eval_split) {
        (Some(path), _) => args.read(path, tokenizer.as_ref())?.examples,
        (None, Some(share)) => data.split(share, args.training.seed)?,
        (None, None) => Vec::new(),
    };
    let longest = data.examples.iter().map(|example| example.ids.len()).max().unwrap_or(0);
    let data_error = |e: Error| match e {
        Error::Invalid { what, got, expected, .. } => {
            Error::File { path: args.data.clone(), message: format!("{what} is {got}: {expected}") }
        }
        other => other,
    };
    let tokens = args.training.row_tokens(longest, spec.config().max_position_embeddings)?;
    let config = args.training.adapter.config(initial.as_ref());
    let config = PeftConfig { base_model_name_or_path: Some(args.model.name()), ..config };
    let plan = args.training.plan(&spec, &config, tokens, &device)?;
    let batches = Batches::new(data, args.training.batches(&plan.batches)).map_err(data_error)?;
    let steps = args.max_steps.unwrap_or_else(|| batches.steps_per_epoch().saturating_mul(args.epochs.unwrap_or(1)));
    let options = RunOptions {
        train: args.training.options(steps),
        steps,
        eval_every: args.eval_every.unwrap_or(steps.div_ceil(10)),
        early_stop: args.early_stop,
        save_every: args.save_every,
        keep: args.keep,
    };
    eprintln!("device: {}", device.name());
    describe(&batches, eval.len(), &options);
    eprintln!("memory: {} for the base, {} at the peak", bytes(plan.most.base), bytes(plan.held_bytes));
    if args.training.memory(&device).is_some_and(|memory| !plan.fits(memory)) {
        eprintln!(
            "warning: that is more than the device has free; `qlora plan` with the same flags says what takes it"
        );
    }

    let mut model = Decoder::load(&device, &path, &base)?;

    let mut run = if args.resume {
        Run::resume(&mut model, &config, batches, eval, options, &args.output)?
    } else {
        let adapter = initial.as_ref().map(|(_, adapter)| adapter);
        let started = Run::start(&mut model, config, adapter, batches, eval, options, &args.output);
        started.map_err(|error| match &initial {
            Some((path, adapter)) => misfit(path, adapter, error),
            None => error,
        })?
    };
    let interrupted = interrupts();
    let mut progress = Progress::new(steps, run.step());
    let result = run.train(|event| {
        progress.show(event);
        if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    progress.finish();
    let summary = result?;

    let records = metrics::read(&args.output.join(metrics::FILE))?;
    if !records.is_empty() {
        plot::write(&args.output, &records)?;
    }
    let output = args.output.display();
    if summary.end == End::Interrupted {
        let how = if summary.steps > 0 { "; the same command with --resume goes on" } else { "" };
        eprintln!("interrupted after {} of {steps} steps{how}", summary.steps);
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if summary.end == End::EarlyStop {
        print_line(&format!("ended after {} steps, as evaluations got no better", summary.steps))?;
    }
    let first = records.iter().find_map(|record| record.eval_loss);
    if let (Some(first), Some(best)) = (first, summary.best_eval_loss) {
        let last = records.iter().rev().find_map(|record| record.eval_loss).unwrap_or(best);
        print_line(&format!("evaluation loss: {first:.4} before, {last:.4} after, {best:.4} at its best"))?;
    }
    print_line(&format!("loss plot: {output}/loss.png\nadapter:   {output}"))?;
    // The base that it was trained on, where the file has another.
    let as_is = ModelSpec::read(&path, &BaseFormat::AsIs)?;
    let base = if as_is.matrix_bytes(&device)? == spec.matrix_bytes(&device)? { "" } else { args.model.base_flag() };
    let name = args.model.name();
    print_line(&format!("next: qlora generate --model {name}{base} --adapter {output} --prompt TEXT"))?;
    Ok(ExitCode::SUCCESS)
}

impl FinetuneArgs {
    /// Reads and tokenizes a file, with a bar.
    fn read(&self, path: &Path, tokenizer: Result<&Tokenizer, &Error>) -> Result<Dataset> {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(
            ProgressStyle::with_template("tokenizing {bar:30} {pos}/{len} lines")
                .unwrap_or(ProgressStyle::default_bar()),
        );
        let options = DataOptions { skip_bad_lines: self.skip_bad_lines };
        let data = Dataset::read_with(path, tokenizer, &options, |lines| {
            bar.set_length(lines as u64);
            bar.inc(1);
        })?;
        bar.finish_and_clear();
        if data.bad_lines > 0 {
            eprintln!("{}: left out {} bad lines", path.display(), data.bad_lines);
        }
        Ok(data)
    }
}

/// Says on stderr what is going to happen.
fn describe(batches: &Batches, eval: usize, options: &RunOptions) {
    let (data, cut) = (batches.options(), batches.cut);
    let packing = if data.packing { ", packed" } else { "" };
    eprintln!(
        "data: {} examples, {} tokens{packing} in rows of at most {}; {eval} examples to evaluate on",
        batches.examples(),
        batches.tokens(),
        data.seq_len
    );
    if cut.truncated > 0 {
        eprintln!(
            "cut: {} examples were longer and lost {} tokens; {} of them lost every label and are left out",
            cut.truncated, cut.tokens, cut.dropped
        );
    }
    eprintln!(
        "run: {} steps of {} x {} rows, an epoch has {}",
        options.steps,
        data.grad_accum,
        data.batch_size,
        batches.steps_per_epoch()
    );
}

/// Becomes true with Ctrl-C (or a wish to terminate); the second one ends the process, which leaves nothing half-written.
fn interrupts() -> Arc<AtomicBool> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    // A handler that is there already (of a program that calls this as a library) stays.
    let _ = ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
        eprintln!("ending after this step; once more ends at once");
    });
    interrupted
}
