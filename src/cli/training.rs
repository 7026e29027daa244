//! Training options, which `finetune` and `plan` share.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::{Args, ValueEnum, ValueHint};

use super::model::read_adapter;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::peft::{PeftAdapter, PeftConfig, TargetModules, Targets};
use crate::nn::ModelSpec;
use crate::optim::{AdamW, Decay, Schedule};
use crate::train::TrainOptions;
use crate::train::batches::BatchOptions;
use crate::train::plan::{MicroBatches, Plan};

/// Default tokens per row.
const SEQ_LEN: usize = 512;

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
        Err(Error::Invalid { op: "training", what: "--seq-len", got: tokens.to_string(), expected })
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
        Error::Invalid { op: "memory", what: "the run's memory", got, expected }
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
