//! A model merged with an adapter, one tensor at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::Path;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::checkpoint::BaseFormat;
use crate::formats::gguf::{GgufFile, TensorType};
use crate::formats::peft::PeftAdapter;
use crate::model_files::{ModelFiles, Weights};
use crate::nn::attach::check_fits;
use crate::nn::config::HEAD;
use crate::nn::gguf::{ROPE_FREQS, gguf_name, row_order};
use crate::nn::{Linear, LoraAdapter, ModelConfig};
use crate::quant::HostMatrix;

/// Progress of writing.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The tensor's name in the output.
    pub name: &'a str,
    /// Number of tensors written before it.
    pub done: usize,
    /// Total number of tensors.
    pub total: usize,
}

/// Called before each tensor is made. If it breaks, the work ends and leaves nothing.
pub(super) type Watch<'a> = dyn Fn(Progress<'_>) -> ControlFlow<()> + 'a;

/// Calls `watch`; returns an error if it breaks.
pub(super) fn proceed(watch: &Watch<'_>, progress: Progress<'_>) -> Result<()> {
    match watch(progress) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted { op: "merge" }),
    }
}

/// A model and an adapter that fits it. Only the adapter is in memory. Tensors are read, merged
/// and dropped one by one.
///
/// W of a linear layer with an adapter becomes W + s * B * A, with DoRA's row lengths if it uses
/// DoRA, computed in f32. If W is 4-bit, its dequantized values are used, which the adapter was
/// trained beside.
pub struct Merged<'a> {
    pub(super) files: &'a ModelFiles,
    pub(super) weights: Weights<'a>,
    pub(super) config: ModelConfig,
    pub(super) adapter: &'a PeftAdapter,
    /// Names and shapes of all the model's tensors, under Hugging Face's names.
    pub(super) tensors: BTreeMap<String, Vec<usize>>,
    cpu: Device,
}

impl<'a> Merged<'a> {
    /// Checks that the adapter fits the model, and that nothing of the model would be lost.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Tensor`] and [`Error::Io`] for a model that can't be loaded or
    /// has unknown tensors; [`Error::Invalid`] and [`Error::Shape`] for an adapter that is for
    /// another model.
    pub fn new(files: &'a ModelFiles, adapter: &'a PeftAdapter) -> Result<Merged<'a>> {
        let (spec, weights) = (files.spec(&BaseFormat::AsIs)?, files.weights()?);
        check_fits(adapter, &spec)?;
        let config = spec.config().clone();
        let tensors: BTreeMap<String, Vec<usize>> = config.tensors().into_iter().collect();
        match weights {
            Weights::Checkpoint(checkpoint) => {
                // If the model doesn't use a head of its own, a head in the file is a copy of the
                // embedding.
                checkpoint.check_all_used(&tensors.keys().cloned().chain([HEAD.into()]).collect())?;
            }
            Weights::Gguf(file) => check_all_known(file, &tensors)?,
        }
        Ok(Merged { files, weights, config, adapter, tensors, cpu: Device::cpu() })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number of tensors that the adapter changes.
    pub fn merged_count(&self) -> usize {
        self.adapter.modules.len()
    }

    /// Number of tensors in the model.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// Whether the adapter changes the tensor with this Hugging Face name.
    pub(super) fn is_changed(&self, name: &str) -> bool {
        self.module(name).is_some()
    }

    /// The module that this weight belongs to, if it has an adapter.
    fn module<'n>(&self, name: &'n str) -> Option<&'n str> {
        name.strip_suffix(".weight").filter(|module| self.adapter.modules.contains_key(*module))
    }

    /// Values of a tensor with the adapter added; rows in Hugging Face's order.
    pub(super) fn values(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.tensors.get(name).map_or(&[][..], Vec::as_slice);
        let &[rows, cols] = shape else {
            let len = shape.iter().product();
            return match self.weights {
                Weights::Checkpoint(checkpoint) => checkpoint.vector(name, len),
                Weights::Gguf(file) => file.vector(&theirs(name), len, row_order(&self.config, name)),
            };
        };
        let matrix = match self.weights {
            Weights::Checkpoint(checkpoint) => checkpoint.matrix(name, rows, cols, &BaseFormat::AsIs)?,
            Weights::Gguf(file) => {
                file.matrix(&theirs(name), rows, cols, row_order(&self.config, name), &BaseFormat::AsIs)?
            }
        };
        match self.module(name) {
            None => Ok(dequantized(&matrix)),
            Some(module) => {
                let lora = LoraAdapter::from_peft(&self.cpu, self.adapter, module, (rows, cols))?;
                let layer = Linear::new(&self.cpu, matrix)?.with_adapter("merged", lora)?;
                Ok(layer.merge_to_f32()?.into_raw_vec_and_offset().0)
            }
        }
    }

    /// Bytes of a tensor in the source, if the adapter doesn't change it and it already has this
    /// type.
    pub(super) fn unchanged(&self, name: &str, kind: TensorType) -> Option<&[u8]> {
        let Weights::Gguf(file) = self.weights else { return None };
        let tensor = file.tensor(&theirs(name)).ok()?;
        (tensor.kind == kind && !self.is_changed(name)).then_some(tensor.bytes)
    }

    /// Error for a tensor of the result.
    pub(super) fn tensor_error(&self, output: &Path, name: &str, message: impl ToString) -> Error {
        Error::Tensor { path: output.into(), key: name.into(), message: message.to_string() }
    }
}

/// A tensor's name in GGUF; every tensor of a supported model has one.
fn theirs(name: &str) -> String {
    gguf_name(name).unwrap_or_else(|| name.to_owned())
}

fn dequantized(matrix: &HostMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.dequantize_rows(0..matrix.rows(), &mut values);
    values
}

/// Returns an error if the file has tensors that the model doesn't use, because they would be
/// lost.
fn check_all_known(file: &GgufFile, tensors: &BTreeMap<String, Vec<usize>>) -> Result<()> {
    let known: BTreeSet<String> = tensors.keys().map(|name| theirs(name)).collect();
    let unknown: Vec<&str> = file.names().filter(|name| !known.contains(*name) && *name != ROPE_FREQS).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let message = format!("has tensors that the model doesn't use: {}", unknown.join(", "));
    Err(Error::File { path: file.path().into(), message })
}
