//! Training: one optimizer step over micro-batches.
//!
//! ```no_run
//! use qlora_wgpu::{Device, ModelFiles};
//! use qlora_wgpu::formats::checkpoint::BaseFormat;
//! use qlora_wgpu::formats::peft::PeftConfig;
//! use qlora_wgpu::nn::{Tokens, shifted_labels};
//! use qlora_wgpu::optim::{AdamW, Schedule};
//! use qlora_wgpu::quant::QuantOptions;
//! use qlora_wgpu::train::{TrainOptions, Trainer};
//!
//! # fn main() -> qlora_wgpu::Result<()> {
//! let base = BaseFormat::Quantize(QuantOptions::nf4().double_quant());
//! let mut model = ModelFiles::open("path/to/model")?.load(&Device::best()?, &base)?;
//! let config = PeftConfig::new(16, 32.0); // rank, alpha; all linear layers
//! model.attach("default", &config, 0)?;
//!
//! let tokens = Tokens::new(vec![1, 42, 7, 2], 1)?; // one sequence
//! let labels = shifted_labels(&tokens, &[-100, 42, 7, 2], model.config().vocab_size)?;
//! let batch = model.batch(&tokens, Some(&labels))?;
//!
//! let mut trainer = Trainer::new(TrainOptions {
//!     optimizer: AdamW { lr: 2e-4, weight_decay: 0.0, ..AdamW::default() },
//!     schedule: Schedule::constant(),
//!     max_norm: Some(1.0),
//!     checkpoint_activations: true,
//!     seed: 0,
//! });
//! for _ in 0..10 {
//!     let report = trainer.step(&mut model, std::slice::from_ref(&batch))?;
//!     println!("{} {:.4} {:.4}", report.step, report.loss, report.grad_norm);
//! }
//! model.to_peft("default", &config)?.write("path/to/adapter")?; // PEFT loads it
//! # Ok(())
//! # }
//! ```

pub mod batches;
mod chat_mask;
mod checkpoint;
pub mod data;
mod example;
mod folder;
pub mod metrics;
pub mod plan;
pub mod run;
pub(crate) mod settings;

use crate::autograd::{Gradients, Tape};
use crate::device::ledger::Moment;
use crate::error::{Error, Result};
use crate::kernels::elementwise::add_assign::add_assign;
use crate::kernels::optim::grad_norm::{EACH, grad_norm};
use crate::nn::{Batch, Decoder, Pass};
use crate::optim::{AdamW, Optimizer, Schedule};
use crate::seed::mix;
use crate::tensor::Tensor;

const OP: &str = "training step";

/// Training options.
#[derive(Clone, Copy, Debug)]
pub struct TrainOptions {
    /// Learning rate, betas, eps and weight decay.
    pub optimizer: AdamW,
    /// Factor for the learning rate, by step.
    pub schedule: Schedule,
    /// Maximum gradient norm; larger gradients are clipped like in torch's `clip_grad_norm_`.
    pub max_norm: Option<f32>,
    /// Save only each decoder layer's input and recompute the layer in the backward pass.
    pub checkpoint_activations: bool,
    /// Seed for dropout.
    pub seed: u64,
}

/// Result of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Index of the step, from 0.
    pub step: u32,
    /// Cross-entropy summed over all micro-batches, divided by their label tokens; before the
    /// update.
    pub loss: f32,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f32,
    /// Learning rate of the step.
    pub lr: f32,
    /// Number of tokens, padding included.
    pub tokens: usize,
    /// Number of tokens with loss.
    pub label_tokens: usize,
}

/// State of training besides the model: optimizer moments and the step.
#[derive(Clone, Debug)]
pub struct Trainer {
    options: TrainOptions,
    optimizer: Optimizer,
}

impl Trainer {
    /// Creates a trainer at step 0.
    pub fn new(options: TrainOptions) -> Trainer {
        Trainer { options, optimizer: Optimizer::new(options.optimizer) }
    }

    /// The optimizer and its moments.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Runs forward and backward on all micro-batches, then updates the active adapters once. The
    /// loss is the mean over the label tokens of all micro-batches together.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the loss or a gradient isn't finite; adapters and optimizer are then
    /// unchanged. [`Error::Invalid`] without batches, labels or an active adapter; errors of the
    /// device.
    pub fn step(&mut self, model: &mut Decoder, micro_batches: &[Batch]) -> Result<StepReport> {
        let step = self.optimizer.steps();
        let label_tokens: usize = micro_batches.iter().map(Batch::label_tokens).sum();
        if label_tokens == 0 {
            let got = format!("{} micro-batches without labels", micro_batches.len());
            return Err(Error::invalid(OP, "the data", got, "at least one token must carry loss"));
        }
        let (loss, gradients) = self.gradients(model, micro_batches, 1.0 / label_tokens as f32)?;

        model.device().begin(Moment::Update);
        // A tensor that no token reached has no gradient and, like in torch, no update.
        let reached = model.parameters_mut().filter_map(|(name, parameter)| {
            let gradient = gradients.get(parameter)?;
            Some((name, parameter, gradient))
        });
        let mut parameters: Vec<_> = reached.collect();
        let found: Vec<&Tensor> = parameters.iter().map(|(.., gradient)| *gradient).collect();
        let norm = grad_norm(&found, Some(&loss), self.options.max_norm)?;
        let factor = self.options.schedule.factor(step);
        self.optimizer.begin();
        let updates = parameters.iter_mut().map(|(_, parameter, gradient)| (&mut **parameter, *gradient)).collect();
        self.optimizer.update_all(updates, factor, &norm)?;
        // One read for all: each read waits for the device.
        let values = norm.read()?;
        let (total, loss, each) = (values[0], values[2], &values[EACH..]);
        if !loss.is_finite() || !total.is_finite() {
            // The device has changed nothing.
            self.optimizer.undo();
            let culprit = parameters.iter().zip(each).find(|(_, norm)| !norm.is_finite());
            let (what, value) = match culprit {
                Some(((name, ..), norm)) if loss.is_finite() => (format!("the gradient of {name}"), *norm),
                _ if !loss.is_finite() => ("the loss".to_owned(), loss),
                _ => ("the gradient's norm".to_owned(), total),
            };
            return Err(Error::Diverged { step, what, value });
        }
        Ok(StepReport {
            step,
            loss,
            grad_norm: total,
            lr: (self.options.optimizer.lr * factor) as f32,
            tokens: micro_batches.iter().map(Batch::len).sum(),
            label_tokens,
        })
    }

    /// Computes the loss, which is `scale` times the summed cross-entropy of all micro-batches,
    /// and its gradients. Updates nothing.
    pub fn gradients(&self, model: &Decoder, micro_batches: &[Batch], scale: f32) -> Result<(Tensor, Gradients)> {
        let mut gradients = Gradients::new();
        let mut total: Option<Tensor> = None;
        for (index, batch) in micro_batches.iter().enumerate() {
            let pass = Pass {
                // A different mask for every micro-batch of every step.
                dropout_seed: Some(mix(self.options.seed, u64::from(self.optimizer.steps()) << 32 | index as u64)),
                checkpoint: self.options.checkpoint_activations,
            };
            let mut tape = Tape::new();
            let loss = model.loss(&mut tape, batch, scale, pass)?;
            let value = loss.value().clone();
            tape.backward(&loss, &mut gradients)?;
            drop(loss);
            total = Some(match total.take() {
                Some(mut sum) => {
                    add_assign(&mut sum, &value)?;
                    sum
                }
                None => value,
            });
        }
        let no_batch = || Error::invalid(OP, "the data", "no micro-batches", "a step needs at least one");
        Ok((total.ok_or_else(no_batch)?, gradients))
    }
}
