//! A complete run in one folder: steps over data, evaluations, checkpoints, metrics, and finally
//! the adapter.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::Trainer;
use super::batches::{Batches, MicroBatch};
use super::checkpoint::{self, State};
use super::data::Example;
use super::folder::BEST;
pub use super::folder::RunFolder;
use super::metrics::{Metrics, Record};
pub use super::settings::RunOptions;
use super::settings::Setting;
use super::settings::{self, Made};
use crate::error::{Error, Result};
use crate::eval::evaluate;
use crate::formats::peft::{PeftAdapter, PeftConfig};
use crate::nn::{Batch, Decoder, shifted_labels};

const OP: &str = "training run";

/// Name of the adapter in the model.
const NAME: &str = "default";

/// Progress of a run.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A step was done (step 0: the first evaluation).
    Step(&'a Record),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// All steps are done.
    Finished,
    /// Evaluations stopped improving.
    EarlyStop,
    /// Stopped by the caller; it can be resumed.
    Interrupted,
}

/// Result of a run.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Why it ended.
    pub end: End,
    /// Number of updates done.
    pub steps: u32,
    /// Lowest evaluation loss, if there were evaluations.
    pub best_eval_loss: Option<f64>,
}

/// Data of a run.
#[derive(Clone, Debug)]
pub struct RunData {
    /// Examples to train on.
    pub batches: Batches,
    /// Examples to evaluate on; may be empty.
    pub eval: Vec<Example>,
    /// [`Tokenizer::fingerprint`](crate::text::Tokenizer::fingerprint) of the tokenizer that made
    /// them, if they were text.
    pub tokenizer: Option<String>,
}

/// A run that trains an adapter of a model. Its folder holds `metrics.jsonl`, the newest
/// checkpoints and, at the end, the adapter in PEFT's format.
pub struct Run<'a> {
    model: &'a mut Decoder,
    config: PeftConfig,
    trainer: Trainer,
    batches: Batches,
    eval: Vec<Example>,
    options: RunOptions,
    folder: RunFolder,
    state: State,
    /// Step of the newest checkpoint.
    saved: Option<u32>,
    metrics: Metrics,
}

impl<'a> Run<'a> {
    /// Starts a run in a folder. The model gets a new adapter with the configuration `config`, or
    /// `initial` with its own configuration except for the name of the base, which is that of
    /// `config`.
    ///
    /// # Errors
    /// [`Error::File`] if the folder holds an adapter or a run with checkpoints; errors of
    /// [`Decoder::attach`] and [`Decoder::attach_peft`].
    pub fn start(
        model: &'a mut Decoder,
        config: PeftConfig,
        initial: Option<&PeftAdapter>,
        data: RunData,
        options: RunOptions,
        folder: RunFolder,
    ) -> Result<Run<'a>> {
        check(&options, &data.eval)?;
        folder.check_unused()?;
        let config = of_initial(config, initial);
        match initial {
            Some(adapter) => model.attach_peft(NAME, adapter)?,
            None => model.attach(NAME, &config, options.train.seed)?,
        };
        folder.clear()?;
        let settings = settings::map(settings_of(model, &config, initial, &data, &options));
        let state = State { step: 0, tokens: 0, best_eval_loss: None, evaluations_since_best: 0, settings };
        let (trainer, metrics) = (Trainer::new(options.train), Metrics::start(folder.path())?);
        let RunData { batches, eval, .. } = data;
        Ok(Run { model, config, trainer, batches, eval, options, folder, state, saved: None, metrics })
    }

    /// Continues from the newest intact checkpoint in the folder, with the same model, data and
    /// options. The run is then bit-identical to one that was never interrupted. If nothing was
    /// saved yet, it starts from the beginning. If it had finished, missing parts of its result
    /// are written.
    ///
    /// # Errors
    /// [`Error::OtherRun`] if settings, data or model differ; [`Error::File`] if all checkpoints
    /// are damaged; otherwise the same as [`Run::start`].
    pub fn resume(
        model: &'a mut Decoder,
        config: PeftConfig,
        initial: Option<&PeftAdapter>,
        data: RunData,
        options: RunOptions,
        folder: RunFolder,
    ) -> Result<Run<'a>> {
        check(&options, &data.eval)?;
        let output = folder.path().to_owned();
        let Some((checkpoint, state)) = checkpoint::newest(&output)? else {
            return Run::start(model, config, initial, data, options, folder);
        };
        let now = settings_of(model, &of_initial(config, initial), initial, &data, &options);
        if let Some((setting, before, now)) = settings::difference(&state.settings, &now) {
            return Err(Error::OtherRun { path: output, setting: setting.name(), before, now });
        }
        if options.early_stop.is_some() {
            // Needed at the end; better to notice now that it is missing.
            PeftAdapter::read(output.join(BEST))?;
        }
        let adapter = PeftAdapter::read(&checkpoint)?;
        model.attach_peft(NAME, &adapter)?;
        let optimizer = match checkpoint::optimizer(&checkpoint, state.step, model, options.train.optimizer) {
            Ok(optimizer) => optimizer,
            Err(error) => {
                // The caller may try again with this model.
                for (_, linear) in model.linears_mut() {
                    if linear.adapter(NAME).is_ok() {
                        linear.remove_adapter(NAME)?;
                    }
                }
                return Err(error);
            }
        };
        let trainer = Trainer { options: options.train, optimizer };
        let (metrics, damaged) = Metrics::resume(&output, &checkpoint)?;
        if damaged {
            tracing::warn!(
                "{}: lines were missing or changed; those up to step {} were restored from {}",
                metrics.path().display(),
                state.step,
                checkpoint.display()
            );
        }
        let (config, saved) = (adapter.config, Some(state.step));
        let RunData { batches, eval, .. } = data;
        Ok(Run { model, config, trainer, batches, eval, options, folder, state, saved, metrics })
    }

    /// Why the run ended before, or `None`. If it ended, [`Run::train`] only writes missing parts
    /// of its result.
    pub fn end(&self) -> Option<End> {
        end_of(&self.state, &self.options)
    }

    /// Number of updates done so far.
    pub fn step(&self) -> u32 {
        self.state.step
    }

    /// Trains to the end, or until `each` breaks; then saves what was done. Unless the run was
    /// interrupted, the adapter is then in the run's folder.
    ///
    /// # Errors
    /// [`Error::Diverged`]; errors of files and of the device. The newest checkpoint stays.
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
            if let Some(end) = self.end() {
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
        if self.state.step > 0 && self.saved != Some(self.state.step) {
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

    /// Measures the loss on the evaluation data; keeps the adapter if it is the best so far.
    fn evaluate(&mut self) -> Result<f64> {
        let most = self.model.config().max_position_embeddings.min(self.batches.options().seq_len);
        let pieces = self.eval.iter().flat_map(|example| example.pieces(most));
        let pass = self.batches.options().batch_size * self.batches.longest_row();
        let loss = evaluate(self.model, pieces, pass, |_| ())?.loss;
        if self.state.best_eval_loss.is_none_or(|best| loss < best) {
            (self.state.best_eval_loss, self.state.evaluations_since_best) = (Some(loss), 0);
            if self.options.early_stop.is_some() {
                self.adapter()?.write(self.folder.path().join(BEST))?;
            }
        } else {
            self.state.evaluations_since_best += 1;
        }
        Ok(loss)
    }

    fn adapter(&self) -> Result<PeftAdapter> {
        self.model.to_peft(NAME, &self.config)
    }

    fn save(&mut self) -> Result<PathBuf> {
        let (output, optimizer) = (self.folder.path(), self.trainer.optimizer());
        let moments = |(name, parameter)| Some((name, optimizer.moments(parameter)?));
        let moments: Vec<_> = self.model.parameters().filter_map(moments).collect();
        let folder = checkpoint::save(output, &self.adapter()?, &moments, &self.metrics, &self.state)?;
        checkpoint::remove_old(output, self.options.keep)?;
        self.saved = Some(self.state.step);
        Ok(folder)
    }

    /// Writes the result, unless it exists.
    fn finish(&self) -> Result<()> {
        let output = self.folder.path();
        let adapter = match self.options.early_stop {
            Some(_) => PeftAdapter::read(output.join(BEST))?,
            None => self.adapter()?,
        };
        if PeftAdapter::read(output).is_ok_and(|there| there == adapter) {
            return Ok(());
        }
        adapter.write(output)?;
        tracing::info!(steps = self.state.step, "wrote the adapter to {}", output.display());
        Ok(())
    }
}

/// Configuration of the trained adapter: that of `initial`, if given, with the base's name from
/// `config`.
fn of_initial(config: PeftConfig, initial: Option<&PeftAdapter>) -> PeftConfig {
    let Some(initial) = initial else { return config };
    let base = config.base_model_name_or_path.or_else(|| initial.config.base_model_name_or_path.clone());
    PeftConfig { base_model_name_or_path: base, ..initial.config.clone() }
}

fn settings_of(
    model: &Decoder,
    config: &PeftConfig,
    initial: Option<&PeftAdapter>,
    data: &RunData,
    options: &RunOptions,
) -> Vec<(Setting, serde_json::Value)> {
    let (base, tokenizer) = (model.fingerprint(), data.tokenizer.as_deref());
    settings::all(&Made { base, tokenizer, config, initial, batches: &data.batches, eval: &data.eval, options })
}

/// Why the run ended, or `None`.
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
    let (what, got, expected) = match options {
        RunOptions { steps: 0, .. } => ("the number of steps", "0", "it must be at least 1"),
        RunOptions { keep: 0, .. } => ("the number of checkpoints to keep", "0", "it must be at least 1"),
        RunOptions { early_stop: Some(0), .. } => ("the patience of early stopping", "0", "it must be at least 1"),
        RunOptions { early_stop: Some(_), .. } if eval.is_empty() => {
            ("early stopping", "asked for without evaluation data", "give it evaluation data")
        }
        RunOptions { early_stop: Some(_), eval_every: 0, .. } => (
            "early stopping",
            "asked for without evaluations during the run",
            "set the number of steps between evaluations",
        ),
        _ => return Ok(()),
    };
    Err(Error::invalid(OP, what, got, expected))
}

/// Batch size of the run in a folder, from its newest checkpoint; `None` if nothing was saved yet.
///
/// # Errors
/// [`Error::Io`].
#[doc(hidden)]
pub fn saved_batch_size(output: &Path) -> Result<Option<usize>> {
    let settings = checkpoint::settings(output)?.unwrap_or_default();
    Ok(settings.get(Setting::BatchSize.name()).and_then(|rows| usize::try_from(rows.as_u64()?).ok()))
}
