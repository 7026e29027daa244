//! The flags of a training run, which `finetune` and `plan` share, and the options that they stand
//! for.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::{Args, ValueEnum, ValueHint};
use qlora_wgpu::device::Device;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::formats::peft::{PeftAdapter, PeftConfig, TargetModules, Targets};
use qlora_wgpu::internal::Setting;
use qlora_wgpu::nn::ModelSpec;
use qlora_wgpu::optim::{AdamW, Decay, Schedule};
use qlora_wgpu::train::TrainOptions;
use qlora_wgpu::train::batches::BatchOptions;
use qlora_wgpu::train::plan::{MicroBatches, Plan};

use super::model::{ModelArgs, read_adapter};

/// Default tokens per row.
const SEQ_LEN: usize = 512;

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

/// Options for training.
#[derive(Args, Debug)]
pub struct TrainingArgs {
    #[command(flatten)]
    pub adapter: NewAdapterArgs,
    /// Rows per micro-batch. Default: the largest of 1, 2, 4, 8 that fits; 1 if the memory is
    /// unknown.
    #[arg(long, value_name = "ROWS", value_parser = at_least::<1>, help_heading = "Batches and memory")]
    pub batch_size: Option<usize>,
    /// Memory to plan for, such as 8GiB. Default: what the device reports (Metal, DX12 and GL
    /// report none).
    #[arg(long, value_name = "SIZE", help_heading = "Batches and memory")]
    pub memory: Option<ByteSize>,
    /// Micro-batches per step.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least::<1>, help_heading = "Batches and memory")]
    pub grad_accum: usize,
    /// Maximum tokens per row; longer examples are cut. Default: 512, or the longest example if it
    /// is shorter.
    #[arg(long, value_name = "TOKENS", value_parser = at_least::<2>, help_heading = "Batches and memory")]
    pub seq_len: Option<usize>,
    /// Pad one example per row instead of packing several, which don't see each other.
    #[arg(long, help_heading = "Batches and memory")]
    pub no_packing: bool,
    /// Keep the file's order in every epoch.
    #[arg(long, help_heading = "Batches and memory")]
    pub no_shuffle: bool,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-4, value_parser = not_negative, help_heading = "Optimizer")]
    pub lr: f64,
    /// How the learning rate falls after warm-up.
    #[arg(long, value_enum, default_value_t = DecayArg::Cosine, help_heading = "Optimizer")]
    pub schedule: DecayArg,
    /// Warm-up steps, during which the learning rate rises; below 1, a share of all steps.
    #[arg(long, value_name = "STEPS|SHARE", default_value_t = 0.03, value_parser = not_negative, help_heading = "Optimizer")]
    pub warmup: f64,
    /// AdamW's weight decay.
    #[arg(long, default_value_t = 0.0, value_parser = not_negative, help_heading = "Optimizer")]
    pub weight_decay: f64,
    /// Clip gradients to this norm; 0: don't clip.
    #[arg(long, value_name = "NORM", default_value_t = 1.0, value_parser = not_negative, help_heading = "Optimizer")]
    pub clip: f64,
    /// Seed for the adapter's initial values, data order and dropout.
    #[arg(long, default_value_t = 0, help_heading = "Optimizer")]
    pub seed: u64,
    /// Save memory by keeping only each layer's input and recomputing the layer in the backward
    /// pass.
    #[arg(long, help_heading = "Batches and memory")]
    pub checkpoint_activations: bool,
}

/// The adapter to train.
#[derive(Args, Debug)]
#[command(next_help_heading = "Adapter")]
pub struct NewAdapterArgs {
    /// Rank of the adapter.
    #[arg(long, default_value_t = 16, value_parser = at_least::<1>)]
    pub rank: usize,
    /// alpha; the adapter's output is scaled by alpha / rank.
    #[arg(long, default_value_t = 32.0)]
    pub alpha: f32,
    /// Probability of dropping a value before A.
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f32,
    /// Linear layers that get an adapter: all-linear, or names such as q_proj,v_proj.
    #[arg(long, value_delimiter = ',', default_value = "all-linear")]
    pub targets: Vec<String>,
    /// Use rsLoRA: scale by alpha / sqrt(rank).
    #[arg(long)]
    pub rslora: bool,
    /// Use DoRA: train magnitudes too.
    #[arg(long)]
    pub dora: bool,
    /// Continue training the PEFT adapter in this directory, with its own rank, alpha and targets.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with_all = ["rank", "alpha", "dropout", "targets", "rslora", "dora"])]
    pub init_adapter: Option<PathBuf>,
}

/// Decay of the learning rate.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum DecayArg {
    /// Doesn't fall.
    Constant,
    /// Falls linearly to 0.
    Linear,
    /// Follows a half cosine to 0.
    Cosine,
}

impl RunArgs {
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

impl NewAdapterArgs {
    /// Reads the adapter to continue training, if there is one. Also returns its path.
    pub fn initial(&self) -> Result<Option<(&Path, PeftAdapter)>> {
        self.init_adapter.as_deref().map(|path| Ok((path, read_adapter(path)?))).transpose()
    }

    /// Configuration of a new adapter, or of the one to continue.
    pub fn config(&self, initial: Option<&(&Path, PeftAdapter)>) -> PeftConfig {
        if let Some((_, adapter)) = initial {
            return adapter.config.clone();
        }
        let targets = match self.targets.as_slice() {
            [all] if all == "all-linear" => TargetModules::AllLinear,
            names => TargetModules::names(names.iter().map(|name| name.trim())),
        };
        PeftConfig {
            lora_dropout: self.dropout,
            use_rslora: self.rslora,
            use_dora: self.dora,
            targets: Targets::new(targets),
            ..PeftConfig::new(self.rank, self.alpha)
        }
    }
}

impl TrainingArgs {
    /// Options of a step in a run of `steps` steps.
    pub fn options(&self, steps: u32) -> TrainOptions {
        let warmup = if self.warmup < 1.0 { (self.warmup * f64::from(steps)).ceil() } else { self.warmup };
        let decay = match self.schedule {
            DecayArg::Constant => Decay::Constant,
            DecayArg::Linear => Decay::Linear,
            DecayArg::Cosine => Decay::Cosine,
        };
        TrainOptions {
            optimizer: AdamW { lr: self.lr, weight_decay: self.weight_decay, ..AdamW::default() },
            schedule: Schedule { decay, warmup: warmup as u32, total: steps },
            max_norm: (self.clip > 0.0).then_some(self.clip as f32),
            checkpoint_activations: self.checkpoint_activations,
            seed: self.seed,
        }
    }

    /// Tokens per row, for examples of at most `longest` tokens and a model with `positions`
    /// positions.
    ///
    /// # Errors
    /// [`Error::Invalid`] for rows longer than the model's positions.
    pub fn row_tokens(&self, longest: usize, positions: usize) -> Result<usize> {
        let tokens = self.seq_len.unwrap_or(SEQ_LEN.min(longest).min(positions).max(2));
        if tokens <= positions {
            return Ok(tokens);
        }
        let expected = format!("the model has {positions} positions");
        Err(Error::invalid("training", "--seq-len", tokens, expected))
    }

    /// Plans the memory of a step with `rows` rows of `tokens` tokens on a device. `None` takes
    /// the most rows that fit.
    pub fn plan(
        &self,
        model: &ModelSpec,
        adapter: &PeftConfig,
        rows: Option<usize>,
        tokens: usize,
        device: &Device,
    ) -> Result<Plan> {
        let options = self.options(1);
        let batches = MicroBatches { count: self.grad_accum, rows: rows.unwrap_or(1), tokens };
        match (rows, self.memory(device)) {
            (None, Some(memory)) => Plan::fit(model, adapter, batches, &options, device, memory),
            _ => Plan::new(model, adapter, batches, &options, device),
        }
    }

    /// Plans with half the rows, a quarter and so on, until one fits into the device's memory.
    pub fn fewer_rows(
        &self,
        model: &ModelSpec,
        adapter: &PeftConfig,
        rows: usize,
        tokens: usize,
        device: &Device,
    ) -> Option<Plan> {
        let memory = self.memory(device).unwrap_or(u64::MAX);
        let fewer = std::iter::successors(Some(rows / 2), |rows| Some(rows / 2)).take_while(|&rows| rows > 0);
        let plans = fewer.filter_map(|rows| self.plan(model, adapter, Some(rows), tokens, device).ok());
        plans.into_iter().find(|plan| plan.fits(memory))
    }

    /// Error for a run that doesn't fit with `rows` rows. `got` states its memory; `fitting` is a
    /// plan that fits.
    pub fn too_large(&self, got: String, rows: usize, fitting: Option<&Plan>) -> Error {
        let help = match fitting.map(|plan| plan.batches) {
            Some(MicroBatches { rows: fits, count, .. }) => {
                let count = count * rows.div_ceil(fits);
                format!("--batch-size {fits} fits; add --grad-accum {count} for as many rows per step")
            }
            None => "--checkpoint-activations or a shorter --seq-len saves memory".into(),
        };
        let expected = format!("{help}. If the device has more memory, set it with --memory SIZE");
        Error::invalid("memory", "the run's memory", got, expected)
    }

    /// The device's memory in bytes, if known.
    pub fn memory(&self, device: &Device) -> Option<u64> {
        self.memory.map(|size| size.as_u64()).or_else(|| device.capacity())
    }

    /// Options for batches of this shape.
    pub fn batches(&self, shape: &MicroBatches) -> BatchOptions {
        BatchOptions {
            batch_size: shape.rows,
            grad_accum: shape.count,
            seq_len: shape.tokens,
            packing: !self.no_packing,
            shuffle: !self.no_shuffle,
            seed: self.seed,
        }
    }
}

fn at_least<const LEAST: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(value) if value >= LEAST => Ok(value),
        Ok(_) => Err(format!("it must be at least {LEAST}")),
        Err(_) => Err("it must be a whole number".into()),
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        Ok(_) => Err("it must be at least 0".into()),
        Err(_) => Err("it must be a number".into()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| *share > 0.0 && *share < 1.0).ok_or_else(|| "it must be between 0 and 1".into())
}
