//! A whole run: steps over data, evaluations, checkpoints, metrics, and the adapter at the end, all in one folder.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::batches::{Batches, MicroBatch};
use super::checkpoint::{self, Checkpoint, State};
use super::data::Example;
use super::metrics::{self, Metrics, Record};
use super::{TrainOptions, Trainer};
use crate::error::{Error, Result};
use crate::eval::evaluate;
use crate::formats::peft::{PeftAdapter, PeftConfig};
use crate::nn::{Batch, Decoder, shifted_labels};

const OP: &str = "training run";

/// The adapter's name in the model.
const NAME: &str = "default";

/// A setting's name in a checkpoint.
const BATCH_SIZE: &str = "batch size";

/// Where the adapter of the best evaluation is, within the run's folder.
const BEST: &str = "best";

/// How long to train, and what to do on the way.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions {
    /// Of every step.
    pub train: TrainOptions,
    /// Steps in all.
    pub steps: u32,
    /// Steps between evaluations; there is one before the first step and one after the last too. 0: no more than these.
    pub eval_every: u32,
    /// Ends the run after so many evaluations that were no better than the best; its adapter is then the result.
    pub early_stop: Option<u32>,
    /// Steps between checkpoints; there is one after the last step too. 0: no more than that.
    pub save_every: u32,
    /// Checkpoints to keep, the newest, at least 1.
    pub keep: usize,
}

/// What a run tells while it goes on.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A step was done (or, with step 0, the first evaluation).
    Step(&'a Record),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// All steps are done.
    Finished,
    /// Evaluations got no better.
    EarlyStop,
    /// The caller wanted it to; it can be resumed.
    Interrupted,
}

/// What a run did.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Why it ended.
    pub end: End,
    /// Updates done.
    pub steps: u32,
    /// The least evaluation loss, if there were evaluations.
    pub best_eval_loss: Option<f64>,
}

/// A run that trains an adapter of a model. Its folder holds `metrics.jsonl`, the newest checkpoints, and in the end the adapter
/// as PEFT has it.
pub struct Run<'a> {
    model: &'a mut Decoder,
    config: PeftConfig,
    trainer: Trainer,
    batches: Batches,
    eval: Vec<Example>,
    options: RunOptions,
    output: PathBuf,
    state: State,
    metrics: Metrics,
}

impl<'a> Run<'a> {
    /// Starts a run in the folder `output`, which is made if need be. The model gets a new adapter as `config` says, or `initial`
    /// with its own configuration, of which only the base's name is that of `config`. `eval` may be empty.
    ///
    /// # Errors
    /// [`Error::File`] if the folder holds a run; those of [`Decoder::attach`], [`Decoder::attach_peft`].
    pub fn start(
        model: &'a mut Decoder,
        config: PeftConfig,
        initial: Option<&PeftAdapter>,
        batches: Batches,
        eval: Vec<Example>,
        options: RunOptions,
        output: &Path,
    ) -> Result<Run<'a>> {
        check(&options, &eval)?;
        check_unused(output)?;
        let config = match initial {
            Some(adapter) => {
                model.attach_peft(NAME, adapter)?;
                let base = config.base_model_name_or_path.or_else(|| adapter.config.base_model_name_or_path.clone());
                PeftConfig { base_model_name_or_path: base, ..adapter.config.clone() }
            }
            None => {
                model.attach(NAME, &config, options.train.seed)?;
                config
            }
        };
        fs::create_dir_all(output).map_err(|e| Error::io(output, e))?;
        let settings = settings(&options, &batches);
        let state = State { step: 0, tokens: 0, best_eval_loss: None, evaluations_since_best: 0, settings };
        let (trainer, metrics) = (Trainer::new(options.train), Metrics::open(output, 0)?);
        Ok(Run { model, config, trainer, batches, eval, options, output: output.into(), state, metrics })
    }

    /// Goes on from the newest checkpoint in `output`, with the same data and options: the run is then the same, to the
    /// bit, as one that was never interrupted.
    ///
    /// # Errors
    /// [`Error::File`] if the folder holds no checkpoint, or that of a run with other settings or a finished one, and for malformed
    /// files.
    pub fn resume(
        model: &'a mut Decoder,
        config: &PeftConfig,
        batches: Batches,
        eval: Vec<Example>,
        options: RunOptions,
        output: &Path,
    ) -> Result<Run<'a>> {
        check(&options, &eval)?;
        let file_error = |message: String| Error::File { path: output.into(), message };
        let Checkpoint { adapter, optimizer, state } =
            checkpoint::load(&newest(output)?, model.device(), options.train.optimizer)?;
        let settings = settings(&options, &batches);
        for (key, value) in &settings {
            let before = state.settings.get(key).unwrap_or(&Value::Null);
            if before != value {
                return Err(file_error(format!(
                    "is a run with {key} {before}, which is {value} now; resume it as it was"
                )));
            }
        }
        if &adapter.config != config {
            return Err(file_error("is a run of an adapter with other settings; resume it with those".into()));
        }
        // A run that was killed after its last checkpoint and before its adapter was whole has that still to do.
        if end_of(&state, &options).is_some() && PeftAdapter::read(output).is_ok() {
            return Err(file_error(format!("is a run that is finished, after {} steps", state.step)));
        }
        model.attach_peft(NAME, &adapter)?;
        checkpoint::clean(output, usize::MAX)?;
        let trainer = Trainer { options: options.train, optimizer };
        let metrics = Metrics::open(output, state.step)?;
        let config = adapter.config;
        Ok(Run { model, config, trainer, batches, eval, options, output: output.into(), state, metrics })
    }

    /// Updates done so far.
    pub fn step(&self) -> u32 {
        self.state.step
    }

    /// Trains to the end, or until `each` breaks; what was done is then saved. The adapter is in the run's folder at the
    /// end, unless the run was interrupted.
    ///
    /// # Errors
    /// [`Error::Diverged`]; those of files and of the device. The newest checkpoint stays.
    pub fn train(&mut self, mut each: impl FnMut(Event<'_>) -> ControlFlow<()>) -> Result<Summary> {
        self.model.device().reset_peak();
        let mut wanted = ControlFlow::Continue(());
        if self.state.step == 0 && !self.eval.is_empty() {
            let eval_loss = Some(self.evaluate()?);
            let record = Record { eval_loss, peak_bytes: self.peak_bytes(), ..Record::default() };
            self.metrics.push(&record)?;
            wanted = each(Event::Step(&record));
        }
        let end = loop {
            if let Some(end) = end_of(&self.state, &self.options) {
                break end;
            }
            if wanted.is_break() {
                break End::Interrupted;
            }
            let mut record = self.one_step()?;
            let last = record.step == self.options.steps;
            if !self.eval.is_empty() && (last || is_due(record.step, self.options.eval_every)) {
                record.eval_loss = Some(self.evaluate()?);
                record.peak_bytes = self.peak_bytes();
            }
            self.metrics.push(&record)?;
            wanted = each(Event::Step(&record));
            if !last && wanted.is_continue() && is_due(record.step, self.options.save_every) {
                wanted = each(Event::Saved(&self.save()?));
            }
        };
        if self.state.step > 0 {
            let _ = each(Event::Saved(&self.save()?));
        }
        if end != End::Interrupted {
            self.finish()?;
        }
        Ok(Summary { end, steps: self.state.step, best_eval_loss: self.state.best_eval_loss })
    }

    fn one_step(&mut self) -> Result<Record> {
        let start = Instant::now();
        let micro_batches = self.batches.step(self.state.step)?;
        let batches: Vec<Batch> =
            micro_batches.iter().map(|micro| to_device(self.model, micro)).collect::<Result<_>>()?;
        let report = self.trainer.step(self.model, &batches)?;
        let tokens: usize = micro_batches.iter().map(MicroBatch::token_count).sum();
        self.state.step += 1;
        self.state.tokens += tokens as u64;
        Ok(Record {
            step: self.state.step,
            loss: Some(report.loss),
            eval_loss: None,
            grad_norm: Some(report.grad_norm),
            lr: Some(report.lr),
            tokens: self.state.tokens,
            tokens_per_second: Some(tokens as f64 / start.elapsed().as_secs_f64().max(1e-9)),
            peak_bytes: self.peak_bytes(),
        })
    }

    fn peak_bytes(&self) -> u64 {
        self.model.device().memory().peak_bytes
    }

    /// The loss of the evaluation data; keeps the adapter if it is the best.
    fn evaluate(&mut self) -> Result<f64> {
        let most = self.model.config().max_position_embeddings.min(self.batches.options().seq_len);
        let pieces = self.eval.iter().flat_map(|example| example.pieces(most));
        let pass = self.batches.options().batch_size * self.batches.longest_row();
        let loss = evaluate(self.model, pieces, pass, |_| ())?.loss;
        if self.state.best_eval_loss.is_none_or(|best| loss < best) {
            (self.state.best_eval_loss, self.state.evaluations_since_best) = (Some(loss), 0);
            if self.options.early_stop.is_some() {
                self.adapter()?.write(self.output.join(BEST))?;
            }
        } else {
            self.state.evaluations_since_best += 1;
        }
        Ok(loss)
    }

    fn adapter(&self) -> Result<PeftAdapter> {
        self.model.to_peft(NAME, &self.config)
    }

    fn save(&self) -> Result<PathBuf> {
        let folder = checkpoint::save(&self.output, &self.adapter()?, self.trainer.optimizer(), &self.state)?;
        checkpoint::clean(&self.output, self.options.keep)?;
        Ok(folder)
    }

    /// Writes the result.
    fn finish(&self) -> Result<()> {
        let adapter = match self.options.early_stop {
            Some(_) => PeftAdapter::read(self.output.join(BEST))?,
            None => self.adapter()?,
        };
        adapter.write(&self.output)?;
        tracing::info!(steps = self.state.step, "wrote the adapter to {}", self.output.display());
        Ok(())
    }
}

/// How a run has come to its end, if it has.
fn end_of(state: &State, options: &RunOptions) -> Option<End> {
    if state.step >= options.steps {
        Some(End::Finished)
    } else if options.early_stop.is_some_and(|most| state.evaluations_since_best >= most) {
        Some(End::EarlyStop)
    } else {
        None
    }
}

fn is_due(step: u32, every: u32) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn to_device(model: &Decoder, micro: &MicroBatch) -> Result<Batch> {
    let labels = shifted_labels(&micro.tokens, &micro.labels, model.config().vocab_size)?;
    model.batch(&micro.tokens, Some(&labels))
}

fn check(options: &RunOptions, eval: &[Example]) -> Result<()> {
    let invalid = |what, got: &str, expected: &str| {
        Err(Error::Invalid { op: OP, what, got: got.into(), expected: expected.into() })
    };
    match options {
        RunOptions { steps: 0, .. } => invalid("the number of steps", "0", "it must be at least 1"),
        RunOptions { keep: 0, .. } => invalid("the number of checkpoints to keep", "0", "it must be at least 1"),
        RunOptions { early_stop: Some(0), .. } => {
            invalid("the patience of early stopping", "0", "it must be at least 1")
        }
        RunOptions { early_stop: Some(_), .. } if eval.is_empty() => {
            invalid("early stopping", "asked for without evaluation data", "give it some")
        }
        RunOptions { early_stop: Some(_), eval_every: 0, .. } => {
            invalid("early stopping", "asked for without evaluations on the way", "evaluate every few steps")
        }
        _ => Ok(()),
    }
}

/// What decides how a run goes on, in words for messages.
fn settings(options: &RunOptions, batches: &Batches) -> Map<String, Value> {
    let (train, data) = (&options.train, batches.options());
    let (optimizer, schedule) = (&train.optimizer, &train.schedule);
    let values = [
        ("steps", json!(options.steps)),
        ("learning rate", json!(optimizer.lr)),
        ("betas", json!([optimizer.beta1, optimizer.beta2])),
        ("eps", json!(optimizer.eps)),
        ("weight decay", json!(optimizer.weight_decay)),
        ("schedule", json!(format!("{:?}", schedule.decay))),
        ("warm-up", json!(schedule.warmup)),
        ("clipping", json!(train.max_norm)),
        ("seed", json!(train.seed)),
        (BATCH_SIZE, json!(data.batch_size)),
        ("micro-batches", json!(data.grad_accum)),
        ("sequence length", json!(data.seq_len)),
        ("packing", json!(data.packing)),
        ("shuffling", json!(data.shuffle)),
        ("data of fingerprint", json!(batches.fingerprint())),
    ];
    values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The batch size of the run in a folder, by its newest checkpoint.
///
/// # Errors
/// [`Error::File`] if there is none; those of reading it.
pub fn saved_batch_size(output: &Path) -> Result<usize> {
    let state = checkpoint::state(&newest(output)?)?;
    let rows = state.settings.get(BATCH_SIZE).and_then(Value::as_u64).and_then(|rows| usize::try_from(rows).ok());
    let message = format!("holds a checkpoint without {BATCH_SIZE}");
    rows.ok_or(Error::File { path: output.into(), message })
}

/// The newest checkpoint in a folder.
fn newest(output: &Path) -> Result<PathBuf> {
    let found = if output.is_dir() { checkpoint::list(output)? } else { Default::default() };
    let message = "holds no checkpoint to resume from; start a run in an empty folder".to_owned();
    found.into_values().next_back().ok_or(Error::File { path: output.into(), message })
}

/// Checks that a run can start in this folder: it holds no other, which is never overwritten.
///
/// # Errors
/// [`Error::File`].
pub fn check_unused(output: &Path) -> Result<()> {
    if !output.exists() {
        return Ok(());
    }
    if !output.is_dir() {
        return Err(Error::File { path: output.into(), message: "is no folder".into() });
    }
    let of_a_run = [metrics::FILE, "adapter_model.safetensors", "adapter_config.json"];
    if of_a_run.iter().any(|name| output.join(name).exists()) || !checkpoint::list(output)?.is_empty() {
        let message = "holds another run; resume it, choose another folder, or remove this one".into();
        return Err(Error::File { path: output.into(), message });
    }
    Ok(())
}
