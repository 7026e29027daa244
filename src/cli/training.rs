//! What commands about training runs share.

use clap::Args;

use super::model::Base;
use crate::formats::checkpoint::BaseFormat;
use crate::formats::peft::{PeftConfig, TargetModules, Targets};
use crate::nn::ModelConfig;
use crate::optim::{AdamW, Schedule};
use crate::train::TrainOptions;
use crate::train::plan::MicroBatches;

/// The tokens of a sequence where none are given.
const SEQ_LEN: usize = 512;
/// The largest number of a size: products of three stay within bounds.
const MAX_SIZE: usize = 1 << 20;

/// A training run.
#[derive(Args, Debug)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Rank of the adapters.
    #[arg(long, default_value_t = 16, value_parser = size)]
    rank: usize,
    /// alpha: adapters count alpha / rank times.
    #[arg(long, default_value_t = 32.0, value_parser = finite)]
    alpha: f32,
    /// Linear layers that get an adapter, such as q_proj,v_proj.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = ALL_LINEAR)]
    targets: Vec<String>,
    /// Scale by alpha / sqrt(rank).
    #[arg(long)]
    rslora: bool,
    /// Train magnitudes too: DoRA.
    #[arg(long)]
    dora: bool,
    /// Sequences of a micro-batch; by default the most of 1, 2, 4 and 8 that fit.
    #[arg(long, value_parser = size)]
    batch_size: Option<usize>,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 1, value_parser = size)]
    grad_accumulation: usize,
    /// Tokens of a sequence; by default 512, or the model's positions where they are fewer.
    #[arg(long, value_parser = size)]
    seq_len: Option<usize>,
    /// Keep only layer inputs for the way back: less memory, a third more time.
    #[arg(long)]
    checkpoint_activations: bool,
    /// What becomes of linear layers that are not 4-bit in the file.
    #[arg(long, value_enum, default_value_t = Base::Nf4)]
    base_format: Base,
}

const ALL_LINEAR: &str = "all-linear";

/// A whole number of at least 1.
fn size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size @ 1..=MAX_SIZE) => Ok(size),
        _ => Err(format!("must be a whole number in 1..={MAX_SIZE}")),
    }
}

fn finite(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|value: &f32| value.is_finite()).ok_or_else(|| "must be a number".into())
}

impl TrainingArgs {
    /// The adapters.
    pub fn adapter(&self) -> PeftConfig {
        let modules = match &self.targets[..] {
            [all] if all == ALL_LINEAR => TargetModules::AllLinear,
            names => TargetModules::names(names.iter().cloned()),
        };
        PeftConfig {
            use_rslora: self.rslora,
            use_dora: self.dora,
            targets: Targets::new(modules),
            ..PeftConfig::new(self.rank, self.alpha)
        }
    }

    /// How to train.
    pub fn options(&self) -> TrainOptions {
        TrainOptions {
            optimizer: AdamW::default(),
            schedule: Schedule::constant(),
            max_norm: Some(1.0),
            checkpoint_activations: self.checkpoint_activations,
            seed: 0,
        }
    }

    /// What becomes of the base.
    pub fn base(&self) -> BaseFormat {
        self.base_format.into()
    }

    /// Rows of a micro-batch, if they are given.
    pub fn batch_size(&self) -> Option<usize> {
        self.batch_size
    }

    /// The micro-batches of a step; of one row each where none are given.
    pub fn batches(&self, config: &ModelConfig) -> MicroBatches {
        MicroBatches {
            count: self.grad_accumulation,
            rows: self.batch_size.unwrap_or(1),
            tokens: self.seq_len.unwrap_or(SEQ_LEN.min(config.max_position_embeddings)),
        }
    }
}
