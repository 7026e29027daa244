//! A model without its weights, read from the headers of its files.

use super::config::{EMBEDDING, HEAD, ModelConfig};
use super::decoder::{MODULES, path};
use super::gguf::GgufSource;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::checkpoint::{BaseFormat, Checkpoint};
use crate::formats::gguf::GgufFile;
use crate::quant::MatrixSpec;

/// Initial size of a model's rotary table in positions, unless the model has fewer.
const ROPE_POSITIONS: usize = 512;

impl ModelConfig {
    /// Linear modules of a layer, in the order of [`MODULES`]: d_out, d_in, and whether there is a
    /// bias.
    #[doc(hidden)]
    pub fn linears(&self) -> [(usize, usize, bool); 7] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q_size, kv_size) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            (q_size, hidden, self.qkv_bias),
            (kv_size, hidden, self.qkv_bias),
            (kv_size, hidden, self.qkv_bias),
            (hidden, q_size, self.o_bias),
            (inner, hidden, self.mlp_bias),
            (inner, hidden, self.mlp_bias),
            (hidden, inner, self.mlp_bias),
        ]
    }

    /// Name and shape of every tensor of the model, in the order of use.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (vocabulary, hidden) = (self.vocab_size, self.hidden_size);
        let mut tensors = vec![(EMBEDDING.to_owned(), vec![vocabulary, hidden])];
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}");
            let mut norm = |name: &str, len| tensors.push((format!("{prefix}.{name}.weight"), vec![len]));
            norm("input_layernorm", hidden);
            if self.qk_norm {
                norm("self_attn.q_norm", self.head_dim);
                norm("self_attn.k_norm", self.head_dim);
            }
            norm("post_attention_layernorm", hidden);
            for (module, (d_out, d_in, bias)) in MODULES.iter().zip(self.linears()) {
                tensors.push((format!("{prefix}.{module}.weight"), vec![d_out, d_in]));
                tensors.extend(bias.then(|| (format!("{prefix}.{module}.bias"), vec![d_out])));
            }
        }
        tensors.push(("model.norm.weight".into(), vec![hidden]));
        tensors.extend((!self.tie_word_embeddings).then(|| (HEAD.into(), vec![vocabulary, hidden])));
        tensors
    }

    /// Size of the rotary table, in positions, if `needed` positions are needed; 0 at first.
    pub(super) fn rope_positions(&self, needed: usize) -> usize {
        let positions = if needed <= ROPE_POSITIONS { ROPE_POSITIONS } else { needed.next_power_of_two() };
        positions.min(self.max_position_embeddings)
    }

    /// Fails if the model has fewer positions than this.
    pub(crate) fn check_positions(&self, op: &'static str, positions: usize) -> Result<()> {
        let most = self.max_position_embeddings;
        if positions <= most {
            return Ok(());
        }
        Err(Error::invalid(
            op,
            "the sequence length",
            positions,
            format!("the model's max_position_embeddings is {most}"),
        ))
    }
}

/// A description of a [`Decoder`](super::Decoder): its configuration, and the storage format of
/// each matrix.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    config: ModelConfig,
    embedding: MatrixSpec,
    /// `None` if it is tied to the embedding.
    head: Option<MatrixSpec>,
    /// Linear modules, layer by layer.
    linears: Vec<MatrixSpec>,
}

impl ModelSpec {
    /// Describes an open GGUF file with this configuration.
    pub(crate) fn of_gguf(config: ModelConfig, file: &GgufFile, base: &BaseFormat) -> Result<ModelSpec> {
        let mut source = GgufSource::new(file, &config, base);
        ModelSpec::new(config, |name, rows, cols, linear| source.spec(name, rows, cols, linear))
    }

    /// Describes an open checkpoint with this configuration.
    pub(crate) fn of_checkpoint(config: ModelConfig, checkpoint: &Checkpoint, base: &BaseFormat) -> Result<ModelSpec> {
        ModelSpec::new(config, |name, rows, cols, linear| {
            checkpoint.spec(name, rows, cols, if linear { base } else { &BaseFormat::AsIs })
        })
    }

    /// Describes a model from any source: `matrix` returns the storage format of a matrix, given
    /// its name, rows, columns, and whether it belongs to a linear layer.
    ///
    /// # Errors
    /// Errors of `matrix`.
    #[doc(hidden)]
    pub fn new(
        config: ModelConfig,
        mut matrix: impl FnMut(&str, usize, usize, bool) -> Result<MatrixSpec>,
    ) -> Result<ModelSpec> {
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = matrix(EMBEDDING, vocabulary, hidden, false)?;
        let head = !config.tie_word_embeddings;
        let head = head.then(|| matrix(HEAD, vocabulary, hidden, false)).transpose()?;
        let mut linears = Vec::with_capacity(MODULES.len() * config.layers);
        for layer in 0..config.layers {
            for (module, (d_out, d_in, _)) in MODULES.iter().zip(config.linears()) {
                linears.push(matrix(&format!("{}.weight", path(layer, module)), d_out, d_in, true)?);
            }
        }
        Ok(ModelSpec { config, embedding, head, linears })
    }

    /// Sizes and settings of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Path and matrix of every linear layer that can have an adapter, like
    /// [`Decoder::linears`](super::Decoder::linears).
    #[doc(hidden)]
    pub fn linears(&self) -> impl Iterator<Item = (String, &MatrixSpec)> {
        let paths = (0..self.config.layers).flat_map(|layer| MODULES.map(|module| path(layer, module)));
        paths.zip(&self.linears)
    }

    /// Bytes of all matrices on a device.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a row over the device's binding limit.
    pub fn matrix_bytes(&self, device: &Device) -> Result<u64> {
        self.matrices().map(|matrix| matrix.device_bytes(device)).sum()
    }

    /// The specs of all matrices in the order in which a model is built.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &MatrixSpec> {
        [&self.embedding].into_iter().chain(&self.head).chain(&self.linears)
    }
}
