//! GGUF files as models: their metadata as a [`ModelConfig`], and their tensors by Hugging Face
//! names.
//!
//! Files of the llama architecture have the rows of q and k permuted for interleaved rotary pairs.
//! Loading undoes this, so a model is the same from either kind of file and PEFT adapters fit it.

mod metadata;

use std::collections::BTreeSet;
use std::fmt::Display;

use super::config::{Architecture, MAX_LAYERS, ModelConfig};
use super::source::WeightSource;
use crate::error::{Error, Result};
use crate::formats::checkpoint::BaseFormat;
use crate::formats::gguf::{FromValue, GgufFile, RowOrder, Value};
use crate::kernels::elementwise::rope::{RopeConfig, RopeLayout, RopeScaling};
use crate::quant::{HostMatrix, MatrixSpec};

const ARCHITECTURE: &str = "general.architecture";

/// Divisors of the rotary frequencies, in models since Llama 3.1.
pub(crate) const ROPE_FREQS: &str = "rope_freqs.weight";

/// Keys (without the architecture's name) that change the arithmetic, with the value that changes
/// nothing (true is 1).
const NEUTRAL: &[(&str, f64)] = &[
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("expert_count", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("pooling_type", 0.0),
    ("residual_scale", 1.0),
    ("rope.scaling.attn_factor", 1.0),
    ("use_parallel_residual", 0.0),
];

/// Metadata under the prefix of the file's architecture.
struct Keys<'a> {
    file: &'a GgufFile,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn get<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        self.file.get(&self.key(key))
    }

    fn error(&self, key: &str, message: impl Display) -> Error {
        self.file.metadata_error(&self.key(key), message)
    }

    /// Reads a plausible size: products of two don't overflow.
    fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        match self.get(key)?.or(default).ok_or_else(|| self.error(key, "is missing"))? {
            0 => Err(self.error(key, "is 0; it must be at least 1")),
            size @ 1..=0x7fff_ffff => Ok(size),
            size => Err(self.error(key, format!("is {size}, which is too large"))),
        }
    }

    /// Reads a finite number above 0.
    fn factor(&self, key: &str, default: Option<f32>) -> Result<f32> {
        let factor = self.get(key)?.or(default).ok_or_else(|| self.error(key, "is missing"))?;
        let valid = f32::is_finite(factor) && factor > 0.0;
        if valid { Ok(factor) } else { Err(self.error(key, format!("is {factor}; it must be above 0"))) }
    }
}

impl ModelConfig {
    /// Reads the metadata of a GGUF file of the architecture llama, qwen2 or qwen3. A llama file
    /// with a sliding window is a Mistral model.
    ///
    /// # Errors
    /// [`Error::File`], naming the key, for a value that is missing, malformed, contradictory or
    /// unsupported; [`Error::Tensor`] for rotary frequencies that don't follow from Llama 3's
    /// scaling.
    #[doc(hidden)]
    pub fn from_gguf(file: &GgufFile) -> Result<ModelConfig> {
        let name: &str = file.require(ARCHITECTURE)?;
        let mut architecture = match name {
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            other => {
                let message = format!("is {other:?}; supported are llama, qwen2, qwen3");
                return Err(file.metadata_error(ARCHITECTURE, message));
            }
        };
        let keys = Keys { file, architecture: name };
        refuse_unsupported(&keys)?;

        let (hidden_size, layers) = (keys.size("embedding_length", None)?, keys.size("block_count", None)?);
        if layers > MAX_LAYERS {
            return Err(keys.error("block_count", format!("is {layers}; it must be at most {MAX_LAYERS}")));
        }
        let heads = keys.size("attention.head_count", None)?;
        let kv_heads = keys.size("attention.head_count_kv", Some(heads))?;
        if !heads.is_multiple_of(kv_heads) {
            let message = format!("is {kv_heads}, which does not divide attention.head_count, {heads}");
            return Err(keys.error("attention.head_count_kv", message));
        }
        let head_dim = head_dim(&keys, hidden_size, heads)?;
        let window = match keys.get::<usize>("attention.sliding_window")? {
            None | Some(0) => None,
            Some(window) if architecture == Architecture::Llama => {
                architecture = Architecture::Mistral;
                Some(window)
            }
            Some(window) => {
                let message = format!("is {window}; {name} files with a sliding window aren't supported");
                return Err(keys.error("attention.sliding_window", message));
            }
        };
        let max_position_embeddings = keys.size("context_length", None)?;
        let rms_norm_eps = keys.get("attention.layer_norm_rms_epsilon")?;
        let rms_norm_eps: f32 =
            rms_norm_eps.ok_or_else(|| keys.error("attention.layer_norm_rms_epsilon", "is missing"))?;
        if rms_norm_eps < 0.0 || !rms_norm_eps.is_finite() {
            let message = format!("is {rms_norm_eps}; it must be at least 0");
            return Err(keys.error("attention.layer_norm_rms_epsilon", message));
        }
        let tokens = match file.metadata("tokenizer.ggml.tokens") {
            Some(Value::Array(tokens)) => Some(tokens.len()),
            _ => None,
        };
        let bias = |module: &str| file.contains(&format!("blk.0.{module}.bias"));
        Ok(ModelConfig {
            architecture,
            vocab_size: keys.size("vocab_size", tokens)?,
            hidden_size,
            intermediate_size: keys.size("feed_forward_length", None)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps,
            rope: rope(&keys, head_dim)?,
            max_position_embeddings,
            tie_word_embeddings: !file.contains("output.weight"),
            qkv_bias: architecture == Architecture::Qwen2 || bias("attn_q"),
            o_bias: bias("attn_output"),
            mlp_bias: bias("ffn_gate"),
            qk_norm: architecture == Architecture::Qwen3,
            windows: vec![window; layers],
            dtype: None,
            bos_token_id: file.get("tokenizer.ggml.bos_token_id")?,
            eos_token_ids: file.get("tokenizer.ggml.eos_token_id")?.into_iter().collect(),
            pad_token_id: file.get("tokenizer.ggml.padding_token_id")?,
            quantized: false,
        })
    }
}

/// Fails for the first key that asks for arithmetic that isn't implemented.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<()> {
    for &(key, neutral) in NEUTRAL {
        let value = match keys.file.metadata(&keys.key(key)) {
            None => continue,
            Some(Value::Unsigned(value)) => value as f64,
            Some(Value::Signed(value)) => value as f64,
            Some(Value::Float(value)) => value,
            Some(Value::Bool(value)) => f64::from(u8::from(value)),
            Some(_) => f64::NAN,
        };
        if value != neutral {
            return Err(keys.error(key, format!("is {value}; only {neutral} is supported")));
        }
    }
    Ok(())
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, heads: usize) -> Result<usize> {
    const KEY: &str = "attention.key_length";
    let whole = hidden_size.is_multiple_of(heads).then_some(hidden_size / heads);
    let head_dim = keys.size(KEY, whole)?;
    if !head_dim.is_multiple_of(2) {
        return Err(keys.error(KEY, format!("is {head_dim}; rotary embeddings need an even number")));
    }
    // Partial rotation, and values of another length than keys, occur only in other models.
    for key in ["attention.value_length", "rope.dimension_count"] {
        let other = keys.size(key, Some(head_dim))?;
        if other != head_dim {
            return Err(keys.error(key, format!("is {other}; only the length of keys, {head_dim}, is supported")));
        }
    }
    Ok(head_dim)
}

fn rope(keys: &Keys<'_>, head_dim: usize) -> Result<RopeConfig> {
    let theta = f64::from(keys.factor("rope.freq_base", Some(10_000.0))?);
    let of = |scaling| RopeConfig { theta, head_dim, scaling, layout: RopeLayout::HalfSplit };
    const TYPE: &str = "rope.scaling.type";
    let scaling = match keys.get(TYPE)? {
        Some("none") => RopeScaling::None,
        None | Some("linear") => {
            // Early files had another key.
            let old = keys.factor("rope.scale_linear", Some(1.0))?;
            match keys.factor("rope.scaling.factor", Some(old))? {
                1.0 => RopeScaling::None,
                factor => RopeScaling::Linear { factor },
            }
        }
        Some(other) => return Err(keys.error(TYPE, format!("is {other:?}; supported are \"none\", \"linear\""))),
    };
    if !keys.file.contains(ROPE_FREQS) {
        return Ok(of(scaling));
    }
    if scaling != RopeScaling::None {
        return Err(keys
            .file
            .tensor_error(ROPE_FREQS, "is given together with rope.scaling; only one of them is supported"));
    }

    // The file holds only the divisors, not the parameters of Llama 3's scaling. The factor is the
    // largest divisor; the other parameters are the same in all models. If they don't reproduce
    // the divisors, it is another kind of scaling.
    let divisors = keys.file.vector(ROPE_FREQS, head_dim / 2, RowOrder::Plain)?;
    let llama3 = of(RopeScaling::Llama3 {
        factor: divisors.iter().copied().fold(1.0, f32::max),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    });
    let plain = of(RopeScaling::None).frequencies();
    let close = |((plain, scaled), divisor): ((f32, f32), f32)| (plain / scaled - divisor).abs() <= 1e-4 * divisor;
    if !plain.into_iter().zip(llama3.frequencies()).zip(divisors).all(close) {
        return Err(keys
            .file
            .tensor_error(ROPE_FREQS, "has divisors that don't follow from Llama 3's scaling; they aren't supported"));
    }
    Ok(llama3)
}

/// Tensors of a GGUF file by Hugging Face names. Linear layers that aren't 4-bit are converted to
/// a chosen format.
pub struct GgufSource<'a> {
    file: &'a GgufFile,
    base: BaseFormat,
    /// Order of the rows of q and k.
    order: RowOrder,
    used: BTreeSet<String>,
}

impl<'a> GgufSource<'a> {
    /// Reads the tensors of `file`, whose config is `config`.
    pub fn new(file: &'a GgufFile, config: &ModelConfig, base: &BaseFormat) -> Self {
        let order = row_order(config, "self_attn.q_proj.weight");
        // Reading the config has used the frequencies.
        GgufSource { file, base: *base, order, used: BTreeSet::from([ROPE_FREQS.into()]) }
    }

    /// Checks that every tensor of the file has been read.
    ///
    /// # Errors
    /// [`Error::File`] with the names of unread tensors.
    pub(crate) fn check_all_used(&self) -> Result<()> {
        let unused: Vec<&str> = self.file.names().filter(|&name| !self.used.contains(name)).collect();
        if unused.is_empty() {
            return Ok(());
        }
        let message = format!("has tensors that the model doesn't use: {}", unused.join(", "));
        Err(Error::File { path: self.file.path().into(), message })
    }

    /// Returns the tensor's name in the file, marking it as used, and the order of its rows.
    fn place(&mut self, name: &str) -> Result<(String, RowOrder)> {
        let theirs =
            gguf_name(name).ok_or_else(|| self.file.tensor_error(name, "has no counterpart in a GGUF file"))?;
        self.used.insert(theirs.clone());
        Ok((theirs, if is_rotated(name) { self.order } else { RowOrder::Plain }))
    }
}

impl GgufSource<'_> {
    /// Returns how [`WeightSource::matrix`] would store the matrix with these arguments.
    pub(super) fn spec(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> Result<MatrixSpec> {
        let (name, _) = self.place(name)?;
        let base = if linear { self.base } else { BaseFormat::AsIs };
        self.file.spec(&name, rows, cols, &base)
    }
}

impl WeightSource for GgufSource<'_> {
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let (name, order) = self.place(name)?;
        self.file.vector(&name, len, order)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> Result<HostMatrix> {
        let (name, order) = self.place(name)?;
        let base = if linear { self.base } else { BaseFormat::AsIs };
        self.file.matrix(&name, rows, cols, order, &base)
    }
}

/// Whether a tensor (weight or bias, by its Hugging Face name) produces values that rotary
/// embeddings rotate.
fn is_rotated(name: &str) -> bool {
    name.contains(".q_proj.") || name.contains(".k_proj.")
}

/// Row order of a tensor in a GGUF file of this model, by its Hugging Face name.
pub(crate) fn row_order(config: &ModelConfig, name: &str) -> RowOrder {
    match config.architecture {
        Architecture::Llama | Architecture::Mistral if is_rotated(name) => {
            RowOrder::Interleaved { head_dim: config.head_dim }
        }
        _ => RowOrder::Plain,
    }
}

/// The architecture's name in GGUF files.
pub(crate) fn gguf_architecture(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama | Architecture::Mistral => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
    }
}

/// Modules outside the layers, then those of a layer: names in Hugging Face and in GGUF files.
const NAMES: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
const LAYER_NAMES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// GGUF name of the tensor that Hugging Face calls `name`.
pub(crate) fn gguf_name(name: &str) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    if let Some((_, theirs)) = NAMES.iter().find(|(ours, _)| *ours == module) {
        return Some(format!("{theirs}.{kind}"));
    }
    let (layer, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, theirs) = LAYER_NAMES.iter().find(|(ours, _)| *ours == module)?;
    Some(format!("blk.{layer}.{theirs}.{kind}"))
}

#[cfg(test)]
mod tests;
