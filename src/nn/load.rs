//! Builds a [`Decoder`] from the weights in a file, or from made-up weights for benchmarks.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use super::config::{EMBEDDING, HEAD, ModelConfig};
use super::decoder::{Decoder, DecoderLayer, MODULES, path};
use super::fingerprint::{Fingerprint, Hashed};
use super::gguf::GgufSource;
use super::linear::Linear;
use super::source::WeightSource;
use super::spec::ModelSpec;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::checkpoint::{BaseFormat, Checkpoint};
use crate::formats::gguf::GgufFile;
use crate::kernels::DeviceMatrix;
use crate::kernels::elementwise::rope::RopeTable;
use crate::quant::{HostMatrix, MatrixSpec};
use crate::tensor::Tensor;

/// Tensors of a checkpoint. Matrices of linear layers are converted to a chosen format.
struct FromCheckpoint<'a> {
    checkpoint: &'a Checkpoint,
    base: &'a BaseFormat,
    used: BTreeSet<String>,
}

impl WeightSource for FromCheckpoint<'_> {
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.used.insert(name.to_owned());
        self.checkpoint.vector(name, len)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> Result<HostMatrix> {
        self.used.insert(name.to_owned());
        let base = if linear { self.base } else { &BaseFormat::AsIs };
        self.checkpoint.matrix(name, rows, cols, base)
    }
}

/// The tensors of a model on its device, in the order in which [`assemble`] asks for them.
trait Weights {
    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor>;

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> Result<DeviceMatrix>;
}

/// Copies of a source's tensors.
struct Loaded<'a> {
    device: &'a Device,
    source: Hashed<'a>,
}

impl Weights for Loaded<'_> {
    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        Tensor::from_slice(self.device, &[len], &self.source.vector(name, len)?)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> Result<DeviceMatrix> {
        DeviceMatrix::new(self.device, self.source.matrix(name, rows, cols, linear)?)
    }
}

/// Tensors on a planned device.
struct Planned<'a, I> {
    device: &'a Device,
    matrices: I,
}

impl<'a, I: Iterator<Item = &'a MatrixSpec>> Weights for Planned<'_, I> {
    fn vector(&mut self, _: &str, len: usize) -> Result<Tensor> {
        Tensor::zeros(self.device, &[len])
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, _: bool) -> Result<DeviceMatrix> {
        match self.matrices.next() {
            Some(spec) if [spec.rows, spec.cols] == [rows, cols] => DeviceMatrix::planned(self.device, spec),
            spec => {
                let expected = format!("{name} of [{rows}, {cols}]");
                Err(Error::shape("plan", "a matrix of the model", expected, format!("{spec:?}")))
            }
        }
    }
}

impl Decoder {
    /// Builds a model from a checkpoint.
    pub(crate) fn from_checkpoint(
        device: &Device,
        config: ModelConfig,
        checkpoint: &Checkpoint,
        base: &BaseFormat,
    ) -> Result<Decoder> {
        // If the head is tied, a stored head is a copy of the embedding and isn't read.
        let mut source = FromCheckpoint { checkpoint, base, used: BTreeSet::from([HEAD.into()]) };
        let decoder = Decoder::build(device, config, &mut source)?;
        checkpoint.check_all_used(&source.used)?;
        Ok(decoder)
    }

    /// Builds a model from a GGUF file.
    pub(crate) fn from_gguf(
        device: &Device,
        config: ModelConfig,
        file: &GgufFile,
        base: &BaseFormat,
    ) -> Result<Decoder> {
        let mut source = GgufSource::new(file, &config, base);
        let decoder = Decoder::build(device, config, &mut source)?;
        source.check_all_used()?;
        Ok(decoder)
    }

    /// Builds a model from any source of weights.
    ///
    /// # Errors
    /// Errors of the source and of the device.
    pub fn build(device: &Device, config: ModelConfig, source: &mut dyn WeightSource) -> Result<Decoder> {
        let mut weights = Loaded { device, source: Hashed::new(source) };
        let mut decoder = assemble(device, config, &mut weights)?;
        decoder.fingerprint = weights.source.fingerprint(&decoder.config);
        Ok(decoder)
    }

    /// Builds a model without values on a planned device.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a row over the device's binding limit, [`Error::Invalid`] for a
    /// block of 0 weights.
    pub(crate) fn planned(device: &Device, spec: &ModelSpec) -> Result<Decoder> {
        assemble(device, spec.config().clone(), &mut Planned { device, matrices: spec.matrices() })
    }
}

/// Builds a model without a fingerprint.
fn assemble(device: &Device, config: ModelConfig, weights: &mut dyn Weights) -> Result<Decoder> {
    let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
    let embedding = Arc::new(weights.matrix(EMBEDDING, vocabulary, hidden, false)?);
    let head = match config.tie_word_embeddings {
        true => embedding.clone(),
        false => Arc::new(weights.matrix(HEAD, vocabulary, hidden, false)?),
    };
    let layers = (0..config.layers).map(|layer| build_layer(&config, weights, layer)).collect::<Result<_>>()?;
    let norm = weights.vector("model.norm.weight", hidden)?;
    let rope = Mutex::new(RopeTable::new(device, &config.rope, config.rope_positions(0))?);
    let (device, fingerprint) = (device.clone(), Fingerprint::default());
    Ok(Decoder { device, embedding, head, layers, norm, rope, fingerprint, config })
}

fn build_layer(config: &ModelConfig, weights: &mut dyn Weights, layer: usize) -> Result<DecoderLayer> {
    let prefix = format!("model.layers.{layer}");
    let hidden = config.hidden_size;
    let mut linear = |module: usize| -> Result<Linear> {
        let (d_out, d_in, bias) = config.linears()[module];
        let path = path(layer, MODULES[module]);
        let linear = Linear::with_base(weights.matrix(&format!("{path}.weight"), d_out, d_in, true)?);
        if !bias {
            return Ok(linear);
        }
        linear.with_bias_tensor(weights.vector(&format!("{path}.bias"), d_out)?)
    };
    let (q, k, v, o) = (linear(0)?, linear(1)?, linear(2)?, linear(3)?);
    let (gate, up, down) = (linear(4)?, linear(5)?, linear(6)?);
    let mut norm = |name: &str, len: usize| weights.vector(&format!("{prefix}.{name}.weight"), len);
    let qk_norm = if config.qk_norm {
        Some((norm("self_attn.q_norm", config.head_dim)?, norm("self_attn.k_norm", config.head_dim)?))
    } else {
        None
    };
    Ok(DecoderLayer {
        input_norm: norm("input_layernorm", hidden)?,
        post_norm: norm("post_attention_layernorm", hidden)?,
        q,
        k,
        v,
        o,
        qk_norm,
        gate,
        up,
        down,
        windowed: config.window(layer).is_some(),
    })
}
