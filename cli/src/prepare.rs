//! The run that the flags of `finetune` or `plan` describe: everything is read and checked but the
//! weights.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use qlora_wgpu::ModelFiles;
use qlora_wgpu::device::Device;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::{PeftAdapter, PeftConfig};
use qlora_wgpu::nn::ModelSpec;
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::train::batches::Batches;
use qlora_wgpu::train::data::{Dataset, Example};
use qlora_wgpu::train::plan::{MEMORY_PERCENT, MicroBatches, Plan};
use qlora_wgpu::train::run::{RunData, RunOptions, saved_batch_size};

use super::dataset::{check, read};
use super::model::Base;
use super::output;
use super::training::RunArgs;

/// A checked run that is ready to start; everything but the weights has been read.
pub(super) struct Prepared<'a> {
    /// The open model.
    pub files: ModelFiles,
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
        let files = self.model.open()?;
        let initial = self.training.adapter.initial()?;
        let (device, base) = (self.model.device()?, self.model.base(Base::Nf4));
        let spec = files.spec(&base)?;

        let tokenizer = files.tokenizer();
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
        Ok(Prepared { files, device, base, spec, initial, config, plan, data })
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
            output::warning(error);
            return Ok(());
        }
        Err(error)
    }
}
