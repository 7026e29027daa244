//! Builds a [`Decoder`] from the weights in a file, or from made-up weights for benchmarks.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use super::config::{EMBEDDING, HEAD, ModelConfig};
use super::decoder::{Decoder, DecoderLayer, MODULES, path};
use super::fingerprint::Hashed;
use super::gguf::GgufSource;
use super::linear::Linear;
use super::source::WeightSource;
use crate::device::Device;
use crate::error::Result;
use crate::formats::checkpoint::{BaseFormat, Checkpoint};
use crate::formats::gguf::GgufFile;
use crate::kernels::DeviceMatrix;
use crate::kernels::elementwise::rope::RopeTable;
use crate::quant::HostMatrix;
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
        let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
        let mut hashed = Hashed::new(source);
        let source: &mut dyn WeightSource = &mut hashed;
        let matrix = |source: &mut dyn WeightSource, name: &str| -> Result<Arc<DeviceMatrix>> {
            Ok(Arc::new(DeviceMatrix::new(device, source.matrix(name, vocabulary, hidden, false)?)?))
        };
        let embedding = matrix(source, EMBEDDING)?;
        let head = if config.tie_word_embeddings { embedding.clone() } else { matrix(source, HEAD)? };
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            layers.push(build_layer(device, &config, source, layer)?);
        }
        let norm = vector(device, source, "model.norm.weight", hidden)?;
        let rope = RopeTable::new(device, &config.rope, config.rope_positions(0))?;
        let (device, rope, fingerprint) = (device.clone(), Mutex::new(rope), hashed.fingerprint(&config));
        Ok(Decoder { device, embedding, head, layers, norm, rope, fingerprint, config })
    }
}

fn vector(device: &Device, source: &mut dyn WeightSource, name: &str, len: usize) -> Result<Tensor> {
    Tensor::from_slice(device, &[len], &source.vector(name, len)?)
}

fn build_layer(
    device: &Device,
    config: &ModelConfig,
    source: &mut dyn WeightSource,
    layer: usize,
) -> Result<DecoderLayer> {
    let prefix = format!("model.layers.{layer}");
    let hidden = config.hidden_size;
    let mut linear = |module: usize| -> Result<Linear> {
        let (d_out, d_in, bias) = config.linears()[module];
        let path = path(layer, MODULES[module]);
        let linear = Linear::new(device, source.matrix(&format!("{path}.weight"), d_out, d_in, true)?)?;
        if !bias {
            return Ok(linear);
        }
        linear.with_bias(&source.vector(&format!("{path}.bias"), d_out)?)
    };
    let (q, k, v, o) = (linear(0)?, linear(1)?, linear(2)?, linear(3)?);
    let (gate, up, down) = (linear(4)?, linear(5)?, linear(6)?);
    let mut norm = |name: &str, len: usize| vector(device, source, &format!("{prefix}.{name}.weight"), len);
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
