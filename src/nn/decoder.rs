//! A decoder-only language model of the Llama family (Llama, Mistral, Qwen2, Qwen3): frozen
//! matrices, with adapters on the linear layers.
//!
//! h = embedding(ids); in every layer h += attention(rms_norm(h)), then h += mlp(rms_norm(h));
//! logits = rms_norm(h) * headᵀ.

use std::sync::{Arc, Mutex, PoisonError};

use super::batch::{Batch, Tokens};
use super::config::ModelConfig;
use super::fingerprint::Fingerprint;
use super::linear::{Linear, record_all};
use crate::autograd::{Parameter, Tape, Var};
use crate::device::Device;
use crate::device::ledger::Moment;
use crate::error::Result;
use crate::formats::peft::tensor_name;
use crate::kernels::DeviceMatrix;
use crate::kernels::attention::AttentionShape;
use crate::kernels::elementwise::rope::RopeTable;
use crate::kernels::qmatmul::qmatmul;
use crate::kernels::rows::embedding::embedding;
use crate::seed::mix;
use crate::tensor::Tensor;

const OP: &str = "decoder";

/// A model on a device.
pub struct Decoder {
    pub(super) config: ModelConfig,
    pub(super) device: Device,
    /// [vocabulary, hidden]
    pub(super) embedding: Arc<DeviceMatrix>,
    pub(super) layers: Vec<DecoderLayer>,
    /// `[hidden]`
    pub(super) norm: Tensor,
    /// [vocabulary, hidden]; shared with the embedding if they are tied.
    pub(super) head: Arc<DeviceMatrix>,
    /// Grows with the longest sequence seen.
    pub(super) rope: Mutex<RopeTable>,
    pub(super) fingerprint: Fingerprint,
}

/// One decoder layer.
pub(super) struct DecoderLayer {
    pub input_norm: Tensor,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// Norms of each head of q and k; Qwen3 only.
    pub qk_norm: Option<(Tensor, Tensor)>,
    pub post_norm: Tensor,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
    /// Whether this layer uses the model's sliding window.
    pub windowed: bool,
}

/// Linear modules of a layer by their Hugging Face names, in the order of their seeds.
pub(super) const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Settings of a forward pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// Seed for the adapters' dropout; `None` disables dropout.
    pub dropout_seed: Option<u64>,
    /// Keep only each layer's input and recompute the layer in the backward pass.
    pub checkpoint: bool,
}

impl DecoderLayer {
    pub(super) fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }

    /// Returns the layer's output for `x` [M, hidden]. `attend` rotates q and k to their positions
    /// and returns the heads' results, [M, heads * head_dim].
    pub(super) fn forward<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        x: &Var,
        config: &ModelConfig,
        seed: Option<u64>,
        attend: impl FnOnce(&mut Tape<'a>, [Var; 3], AttentionShape) -> Result<Var>,
    ) -> Result<Var> {
        let seed = |module: u64| seed.map(|seed| mix(seed, module));
        let eps = config.rms_norm_eps;

        let normed = tape.rms_norm(x, &self.input_norm, eps)?;
        let seeds = [seed(0), seed(1), seed(2)];
        let [mut q, mut k, v] = record_all([&self.q, &self.k, &self.v], tape, &normed, seeds, [None; 3])?;
        drop(normed);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = tape.rms_norm(&q, q_norm, eps)?;
            k = tape.rms_norm(&k, k_norm, eps)?;
        }
        let shape = AttentionShape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };
        let attended = attend(tape, [q, k, v], shape)?;
        let h = self.o.record_onto(tape, &attended, x, seed(3))?;
        drop(attended);

        let normed = tape.rms_norm(&h, &self.post_norm, eps)?;
        let seeds = [seed(4), seed(5)];
        let [gate, up] = record_all([&self.gate, &self.up], tape, &normed, seeds, [None; 2])?;
        drop(normed);
        let hidden = tape.silu_mul(&gate, &up)?;
        drop((gate, up));
        self.down.record_onto(tape, &hidden, &h, seed(6))
    }
}

impl Decoder {
    /// Sizes and settings of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Identifies the base model.
    pub(crate) fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Device of the model.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every linear layer that can have an adapter, with its path, such as
    /// `model.layers.0.self_attn.q_proj`.
    pub fn linears(&self) -> impl Iterator<Item = (String, &Linear)> {
        self.layers.iter().enumerate().flat_map(|(layer, modules)| {
            MODULES.iter().zip(modules.linears()).map(move |(name, linear)| (path(layer, name), linear))
        })
    }

    /// Like [`Decoder::linears`], for changing their adapters.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut Linear)> {
        self.layers.iter_mut().enumerate().flat_map(|(layer, modules)| {
            MODULES.iter().zip(modules.linears_mut()).map(move |(name, linear)| (path(layer, name), linear))
        })
    }

    /// The trained parameters: those of the active adapters, with their names in an
    /// adapter file.
    pub fn parameters(&self) -> impl Iterator<Item = (String, &Parameter)> {
        self.linears().flat_map(|(path, linear)| {
            linear.parameters().map(move |(kind, parameter)| (tensor_name(&path, kind), parameter))
        })
    }

    /// Like [`Decoder::parameters`], for updates.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (String, &mut Parameter)> {
        self.linears_mut().flat_map(|(path, linear)| {
            linear.parameters_mut().map(move |(kind, parameter)| (tensor_name(&path, kind), parameter))
        })
    }

    /// Bytes on the device: base (matrices, norms, biases), then adapters.
    pub fn resident_bytes(&self) -> (u64, u64) {
        let tied = Arc::ptr_eq(&self.embedding, &self.head);
        let mut base = self.embedding.resident_bytes() + self.norm.resident_bytes();
        base += if tied { 0 } else { self.head.resident_bytes() };
        let mut adapters = 0;
        for layer in &self.layers {
            base += layer.input_norm.resident_bytes() + layer.post_norm.resident_bytes();
            base += layer.qk_norm.as_ref().map_or(0, |(q, k)| q.resident_bytes() + k.resident_bytes());
            for linear in layer.linears() {
                let stats = linear.memory_stats();
                base += stats.base_quantized_bytes + stats.bias_bytes;
                adapters += stats.lora_bytes;
            }
        }
        (base, adapters)
    }

    /// Makes a batch for this model; see [`Batch::new`].
    ///
    /// # Errors
    /// Same as [`Batch::new`].
    pub fn batch(&self, tokens: &Tokens, labels: Option<&[u32]>) -> Result<Batch> {
        let window = self.config.sliding_window();
        Batch::new(&self.device, tokens, labels, self.config.vocab_size, window)
    }

    /// Returns the hidden states after the last norm, [M, hidden].
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) if a sequence is longer than the model allows;
    /// [`Error::DeviceMismatch`](crate::Error::DeviceMismatch); errors of the device.
    pub fn hidden<'a>(&'a self, tape: &mut Tape<'a>, batch: &Batch, pass: Pass) -> Result<Var> {
        let rope = self.rope_table(batch.positions_end)?;
        let mut h = tape.constant(embedding(&self.embedding, &batch.ids)?);
        for (index, layer) in self.layers.iter().enumerate() {
            let seed = pass.dropout_seed.map(|seed| mix(seed, index as u64));
            let visibility = batch.windowed.as_ref().filter(|_| layer.windowed).unwrap_or(&batch.visibility).clone();
            let (rope, positions) = (rope.clone(), batch.positions.clone());
            let stretch = move |tape: &mut Tape<'a>, h: &Var| {
                layer.forward(tape, h, &self.config, seed, |tape, [q, k, v], shape| {
                    let [q, k] = tape.rope([&q, &k], &rope, &positions)?;
                    tape.attention([&q, &k, &v], shape, &visibility)
                })
            };
            h = if pass.checkpoint { tape.checkpoint(&h, stretch)? } else { stretch(tape, &h)? };
        }
        tape.rms_norm(&h, &self.norm, self.config.rms_norm_eps)
    }

    /// Returns `scale` times the summed cross-entropy of the batch's labels.
    ///
    /// # Errors
    /// Same as [`Decoder::hidden`]; [`Error::Invalid`](crate::Error::Invalid) for a batch without
    /// labels.
    pub fn loss<'a>(&'a self, tape: &mut Tape<'a>, batch: &Batch, scale: f32, pass: Pass) -> Result<Var> {
        let labels = batch.labels()?;
        self.device.begin(Moment::Forward);
        let hidden = self.hidden(tape, batch, pass)?;
        self.device.begin(Moment::Loss);
        Ok(tape.linear_cross_entropy(&hidden, &self.head, labels, scale)?.0)
    }

    /// Returns the summed cross-entropy of the batch's labels and that of each token, `[M]`;
    /// without dropout.
    ///
    /// # Errors
    /// Same as [`Decoder::loss`].
    pub fn evaluate(&self, batch: &Batch) -> Result<(Tensor, Tensor)> {
        let labels = batch.labels()?;
        let mut tape = Tape::inference();
        let hidden = self.hidden(&mut tape, batch, Pass::default())?;
        let (loss, tokens) = tape.linear_cross_entropy(&hidden, &self.head, labels, 1.0)?;
        Ok((loss.value().clone(), tokens))
    }

    /// Returns all logits, [M, vocabulary]. For small batches.
    ///
    /// # Errors
    /// Same as [`Decoder::hidden`]; [`Error::TooLarge`](crate::Error::TooLarge) if they don't fit
    /// one tensor.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let hidden = self.hidden(&mut Tape::inference(), batch, Pass::default())?;
        qmatmul(hidden.value(), &self.head, None, None)
    }

    /// Rotations for at least `positions` positions.
    pub(crate) fn rope_table(&self, positions: usize) -> Result<RopeTable> {
        self.config.check_positions(OP, positions)?;
        let mut table = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if table.positions() < positions {
            *table = RopeTable::new(&self.device, &self.config.rope, self.config.rope_positions(positions))?;
        }
        Ok(table.clone())
    }
}

/// Path of a layer's linear module.
pub(super) fn path(layer: usize, module: &str) -> String {
    format!("model.layers.{layer}.{module}")
}
