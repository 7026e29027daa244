//! The flags of a training run, which `finetune` and `plan` share, and the run that they describe.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::{Args, ValueHint};

use super::data::{check, read};
use super::model::{Base, ModelArgs};
use super::say;
use super::training::TrainingArgs;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::checkpoint::BaseFormat;
use crate::formats::peft::{PeftAdapter, PeftConfig};
use crate::nn::ModelSpec;
use crate::text::Tokenizer;
use crate::train::batches::Batches;
use crate::train::data::{Dataset, Example};
use crate::train::plan::{MEMORY_PERCENT, MicroBatches, Plan};
use crate::train::run::{RunData, RunOptions, Setting, saved_batch_size};

// No doc comment here: clap would show it as the commands' help.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Training data: JSON Lines, a JSON list, comma- or tab-separated values, or plain text; -
    /// for standard input.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub data: Option<PathBuf>,
    /// Output directory; must not contain another run.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub output: Option<PathBuf>,
    /// Skip lines that can't be read, and count them.
    #[arg(long)]
    pub skip_bad_lines: bool,
    /// Passes over the data; 1 by default, unless --max-steps is given.
    #[arg(long, value_name = "N", conflicts_with = "max_steps", value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: Option<u32>,
    /// Number of updates; data repeat as needed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_steps: Option<u32>,
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Evaluation data; - for standard input.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "eval_split", help_heading = "Evaluation and checkpoints")]
    pub eval_data: Option<PathBuf>,
    /// Evaluate on this share of the examples instead of training on them.
    #[arg(long, value_name = "SHARE", value_parser = share, help_heading = "Evaluation and checkpoints")]
    pub eval_split: Option<f64>,
    /// Steps between evaluations. Default: a tenth of the run. 0: only before the first step and
    /// after the last.
    #[arg(long, value_name = "STEPS", help_heading = "Evaluation and checkpoints")]
    pub eval_every: Option<u32>,
    /// Stop after N evaluations without improvement, and keep the best adapter.
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    pub early_stop: Option<u32>,
    /// Steps between checkpoints; 0: only at the end.
    #[arg(long, value_name = "STEPS", default_value_t = 100, help_heading = "Evaluation and checkpoints")]
    pub save_every: u32,
    /// Number of checkpoints to keep.
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Evaluation and checkpoints")]
    pub keep: usize,
    /// Continue from the newest checkpoint in --output, or start if there is none. Other options
    /// must be unchanged.
    #[arg(long, help_heading = "Evaluation and checkpoints")]
    pub resume: bool,
    /// A TOML file with any of these options, such as max-steps = 100; the command line overrides
    /// it.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = None)]
    pub config: Option<PathBuf>,
}

/// A checked run that is ready to start; everything but the weights has been read.
pub(super) struct Prepared<'a> {
    /// Path of the model.
    pub path: PathBuf,
    pub device: Device,
    pub base: BaseFormat,
    pub spec: ModelSpec,
    /// The adapter to continue training.
    pub initial: Option<(&'a Path, PeftAdapter)>,
    pub config: PeftConfig,
    pub plan: Plan,
    /// The data, if given.
    pub data: Option<Data>,
}

/// Data for training and evaluation, and options.
pub(super) struct Data {
    pub data: RunData,
    pub options: RunOptions,
}

impl RunArgs {
    /// Checks everything that can be checked before the weights are loaded.
    pub(super) fn prepare(&self) -> Result<Prepared<'_>> {
        check([&self.data, &self.eval_data].into_iter().flatten().map(PathBuf::as_path))?;
        let path = self.model.path()?;
        let initial = self.training.adapter.initial()?;
        let (device, base) = (self.model.device()?, self.model.base(Base::Nf4));
        let spec = ModelSpec::read(&path, &base)?;

        let tokenizer = self.model.tokenizer(&path, spec.config().vocab_size);
        let read = |path: &Path| read(path, tokenizer.as_ref(), self.skip_bad_lines, spec.config().vocab_size);
        let mut data = self.data.as_deref().map(read).transpose()?;
        let eval = match (&self.eval_data, self.eval_split, &mut data) {
            (Some(path), _, _) => read(path)?.examples,
            (None, Some(share), Some(data)) => data.split(share, self.training.seed)?,
            _ => Vec::new(),
        };
        let lengths = data.iter().flat_map(|data| &data.examples).map(|example| example.ids().len());
        let tokens =
            self.training.row_tokens(lengths.max().unwrap_or(usize::MAX), spec.config().max_position_embeddings)?;
        let config = self.training.adapter.config(initial.as_ref());
        let config = PeftConfig { base_model_name_or_path: Some(self.model.name()), ..config };
        let rows = match (self.training.batch_size, &self.output) {
            // Free memory may have changed since, so keep the batch size.
            (None, Some(output)) if self.resume => saved_batch_size(output)?,
            (given, _) => given,
        };
        let plan = self.training.plan(&spec, &config, rows, tokens, &device).map_err(|error| match (rows, error) {
            (Some(rows), error @ Error::TooLarge { .. }) => {
                let fitting = self.training.fewer_rows(&spec, &config, rows, tokens, &device);
                let got = format!("too large with micro-batches of {rows} rows ({error})");
                self.training.too_large(got, rows, fitting.as_ref())
            }
            (_, error) => error,
        })?;
        // Data of token ids need no tokenizer.
        let tokenizer = tokenizer.as_ref().ok().map(Tokenizer::fingerprint).transpose()?;
        let data = data.map(|data| self.arrange(data, eval, tokenizer, &plan)).transpose()?;
        // A micro-batch has no more rows than the data.
        let rows = data.as_ref().map_or(usize::MAX, |data| data.data.batches.rows());
        let too_large = self.training.memory(&device).is_some_and(|memory| !plan.fits(memory));
        let plan = if too_large && rows < plan.batches.rows {
            self.training.plan(&spec, &config, Some(rows), tokens, &device)?
        } else {
            plan
        };
        Ok(Prepared { path, device, base, spec, initial, config, plan, data })
    }

    fn arrange(&self, data: Dataset, eval: Vec<Example>, tokenizer: Option<String>, plan: &Plan) -> Result<Data> {
        let batches =
            Batches::new(data, self.training.batches(&plan.batches)).map_err(|error| match (error, &self.data) {
                (Error::Invalid { what, got, expected, .. }, Some(path)) => {
                    Error::File { path: path.clone(), message: format!("{what} is {got}: {expected}") }
                }
                (error, _) => error,
            })?;
        let epochs = self.epochs.unwrap_or(1);
        let steps = self.max_steps.unwrap_or_else(|| batches.steps_per_epoch().saturating_mul(epochs));
        let options = RunOptions {
            train: self.training.options(steps),
            steps,
            eval_every: self.eval_every.unwrap_or(steps.div_ceil(10)),
            early_stop: self.early_stop,
            save_every: self.save_every,
            keep: self.keep,
        };
        Ok(Data { data: RunData { batches, eval, tokenizer }, options })
    }

    /// Returns an error with a fitting batch size if the run doesn't fit into the device's memory.
    /// A resumed run must keep its batch size, so it only gets a warning.
    pub(super) fn check_memory(&self, prepared: &Prepared<'_>, goes_on: bool) -> Result<()> {
        let Prepared { device, spec, config, plan, .. } = prepared;
        let Some(memory) = self.training.memory(device) else { return Ok(()) };
        if plan.fits(memory) {
            return Ok(());
        }
        let MicroBatches { rows, tokens, .. } = plan.batches;
        let fitting = self.training.fewer_rows(spec, config, rows, tokens, device);
        let (held, memory) = (ByteSize(plan.held_bytes), ByteSize(memory));
        let got = format!(
            "{held} with micro-batches of {rows} x {tokens} tokens, more than the usable {MEMORY_PERCENT} % of {memory}"
        );
        let error = self.training.too_large(got, rows, fitting.as_ref());
        if goes_on {
            say::warning(error);
            return Ok(());
        }
        Err(error)
    }

    /// Names the flag or the file behind [`Error::OtherRun`].
    pub(super) fn as_typed(&self, error: Error) -> Error {
        let Error::OtherRun { path, setting, before, now } = error else { return error };
        let Some(known) = Setting::named(setting) else { return Error::OtherRun { path, setting, before, now } };
        let (flag, model) = (flag(known), self.model.name());
        let message = match known {
            Setting::Tokenizer => format!("started with a tokenizer other than {model}'s ({flag})"),
            Setting::Weights => format!("started with weights other than {model}'s ({flag})"),
            Setting::Data => {
                let data = self.data.as_deref().unwrap_or(Path::new("")).display();
                format!("started with training data other than {data} ({flag})")
            }
            Setting::EvalData => format!("started with other evaluation data, or with none ({flag})"),
            Setting::InitialAdapter => format!("started with another initial adapter, or with none ({flag})"),
            Setting::Patience if before == "none" => {
                format!("started without {flag}, so its best adapter was not kept")
            }
            _ => format!("started with {setting} {before}, now {now} ({flag})"),
        };
        Error::File { path, message: format!("{message}; resume with the original setting") }
    }
}

/// The flags that determine a setting.
fn flag(setting: Setting) -> &'static str {
    match setting {
        Setting::Architecture | Setting::Weights | Setting::Tokenizer => "--model",
        Setting::Formats => "--base-format",
        Setting::InitialAdapter => "--init-adapter",
        Setting::Rank => "--rank",
        Setting::Alpha => "--alpha",
        Setting::Dropout => "--dropout",
        Setting::Targets => "--targets",
        Setting::RsLora => "--rslora",
        Setting::Dora => "--dora",
        Setting::Adapter => "--init-adapter",
        Setting::Steps => "--max-steps, --epochs",
        Setting::BatchSize => "--batch-size",
        Setting::GradAccum => "--grad-accum",
        Setting::SeqLen => "--seq-len",
        Setting::Packing => "--no-packing",
        Setting::Shuffling => "--no-shuffle",
        Setting::LearningRate => "--lr",
        Setting::Schedule => "--schedule",
        Setting::WarmUp => "--warmup",
        Setting::WeightDecay => "--weight-decay",
        Setting::AdamW => "another version of qlora",
        Setting::Clipping => "--clip",
        Setting::Seed => "--seed",
        Setting::EvalEvery => "--eval-every",
        Setting::Patience => "--early-stop",
        Setting::Data => "--data, --eval-split, --skip-bad-lines",
        Setting::EvalData => "--eval-data, --eval-split",
    }
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| *share > 0.0 && *share < 1.0).ok_or_else(|| "it must be between 0 and 1".into())
}
