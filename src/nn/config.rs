//! Decoder configurations, read from the `config.json` of a Hugging Face checkpoint.
//!
//! An absent key has the default of transformers 5. Both spellings are read: `dtype` or
//! `torch_dtype`; `rope_parameters`, or `rope_scaling` beside `rope_theta`. A key that asks for
//! arithmetic that isn't implemented is an error that names it.

mod write;

use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::error::Result;
use crate::formats::checkpoint::Checkpoint;
use crate::formats::json::JsonObject;
use crate::kernels::elementwise::rope::{RopeConfig, RopeLayout, RopeScaling};
use crate::quant::Dtype;

/// Keys that change the arithmetic in related models, with the value that changes nothing (true is
/// 1, false 0).
const NEUTRAL: &[(&str, f64)] = &[
    ("alibi", 0.0),
    ("attention_dropout", 0.0),
    ("attention_multiplier", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("clip_qkv", 0.0),
    ("embedding_multiplier", 1.0),
    ("final_logit_softcapping", 0.0),
    ("is_causal", 1.0),
    ("logit_scale", 1.0),
    ("logits_scaling", 1.0),
    ("no_rope_layers", 0.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("partial_rotary_factor", 1.0),
    ("query_pre_attn_scalar", 0.0),
    ("residual_multiplier", 1.0),
    ("rotary_pct", 1.0),
    ("scale_depth", 0.0),
    ("scale_emb", 1.0),
    ("use_bidirectional_attention", 0.0),
    ("use_mrope", 0.0),
];

/// Name of the embedding in a checkpoint.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Name of the output head. Many files have it although it is tied: as a copy of the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Maximum number of layers; bounds what is allocated per layer.
pub(super) const MAX_LAYERS: usize = 10_000;

/// Model family, by the `model_type` of its config.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `llama`.
    Llama,
    /// `mistral`: Llama with a sliding window.
    Mistral,
    /// `qwen2`: biases on q, k and v; a sliding window in some layers.
    Qwen2,
    /// `qwen3`: RMSNorm on the heads of q and k.
    Qwen3,
}

impl Architecture {
    /// Every architecture.
    pub(crate) const ALL: [Architecture; 4] =
        [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3];

    /// `model_type` in config.json.
    pub(crate) fn model_type(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.model_type())
    }
}

/// Sizes and settings of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Model family.
    pub architecture: Architecture,
    /// Vocabulary size: rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Number of query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// Values per head; an even number.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embeddings.
    pub rope: RopeConfig,
    /// Context length in tokens that the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the head shares the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Whether q_proj, k_proj and v_proj have biases.
    pub qkv_bias: bool,
    /// Whether o_proj has a bias.
    pub o_bias: bool,
    /// Whether gate_proj, up_proj and down_proj have biases.
    pub mlp_bias: bool,
    /// Whether each head of q and k goes through an RMSNorm.
    pub qk_norm: bool,
    /// For each layer, the number of positions that a token attends to: itself and those just
    /// before it. `None` for all before it.
    pub windows: Vec<Option<usize>>,
    /// Storage type of the weights.
    pub dtype: Option<Dtype>,
    /// Token at the start of a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Whether the checkpoint declares 4-bit bitsandbytes weights.
    pub quantized: bool,
}

impl ModelConfig {
    /// Reads `config.json` in `folder`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if it can't be read; [`Error::File`](crate::Error::File),
    /// naming the key, for a value that is missing, malformed, contradictory or unsupported.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        Self::from_json(&JsonObject::read(&folder.as_ref().join("config.json"))?)
    }

    /// The configuration in a `config.json` that has been read.
    pub(crate) fn from_json(json: &JsonObject) -> Result<Self> {
        let architecture = architecture(json)?;
        refuse_unsupported(json)?;
        let size = |key: &str| positive(json, key, json.require(key)?);
        let (hidden_size, layers) = (size("hidden_size")?, size("num_hidden_layers")?);
        if layers > MAX_LAYERS {
            return Err(json.error("num_hidden_layers", format!("is {layers}; it must be at most {MAX_LAYERS}")));
        }
        let heads = size("num_attention_heads")?;
        let kv_heads = kv_heads(json, architecture, heads)?;
        let head_dim = head_dim(json, architecture, hidden_size, heads)?;
        // Defaults of the config classes in transformers.
        let (context, bos, eos) = match architecture {
            Architecture::Llama => (2048, Some(1), vec![2]),
            Architecture::Mistral => (131_072, Some(1), vec![2]),
            Architecture::Qwen2 | Architecture::Qwen3 => (32_768, None, vec![]),
        };
        let max_position_embeddings =
            positive(json, "max_position_embeddings", json.get("max_position_embeddings")?.unwrap_or(context))?;
        let rms_norm_eps: f32 = json.get("rms_norm_eps")?.unwrap_or(1e-6);
        if rms_norm_eps < 0.0 || !rms_norm_eps.is_finite() {
            return Err(json.error("rms_norm_eps", format!("is {rms_norm_eps}; it must be at least 0")));
        }
        let (qkv_bias, o_bias) = match architecture {
            // The config is ignored here.
            Architecture::Qwen2 => (true, false),
            _ => {
                let bias = bias(json, "attention_bias", architecture, architecture != Architecture::Mistral)?;
                (bias, bias)
            }
        };
        Ok(ModelConfig {
            architecture,
            vocab_size: size("vocab_size")?,
            hidden_size,
            intermediate_size: size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps,
            rope: rope(json, head_dim, max_position_embeddings)?,
            max_position_embeddings,
            tie_word_embeddings: json.get("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias,
            o_bias,
            mlp_bias: bias(json, "mlp_bias", architecture, architecture == Architecture::Llama)?,
            qk_norm: architecture == Architecture::Qwen3,
            windows: windows(json, architecture, layers)?,
            dtype: dtype(json)?,
            bos_token_id: if json.contains("bos_token_id") { tokens(json, "bos_token_id")?.pop() } else { bos },
            eos_token_ids: if json.contains("eos_token_id") { tokens(json, "eos_token_id")? } else { eos },
            pad_token_id: tokens(json, "pad_token_id")?.pop(),
            quantized: quantized(json)?,
        })
    }

    /// Adapts the config to the tensors of a checkpoint: if the config ties the head to the
    /// embedding but the checkpoint has a different head, uses that head and warns.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for a truncated file.
    pub(crate) fn with_head_of(mut self, checkpoint: &Checkpoint) -> Result<ModelConfig> {
        if self.tie_word_embeddings && checkpoint.contains(HEAD) && !checkpoint.is_copy(HEAD, EMBEDDING)? {
            tracing::warn!(
                "{}: config.json ties the head to the embedding (tie_word_embeddings), but the file has another {HEAD}; \
                 using that one",
                checkpoint.folder().display()
            );
            self.tie_word_embeddings = false;
        }
        Ok(self)
    }

    /// Number of positions that a token of `layer` attends to: itself and those just before it.
    /// `None` for all before it.
    ///
    /// # Panics
    /// If there is no such layer.
    pub(crate) fn window(&self, layer: usize) -> Option<usize> {
        self.windows[layer]
    }

    /// Window of the layers that have one; all of them have the same.
    pub(crate) fn sliding_window(&self) -> Option<usize> {
        self.windows.iter().copied().flatten().next()
    }
}

fn architecture(json: &JsonObject) -> Result<Architecture> {
    let model_type: String = json.require("model_type")?;
    let known = Architecture::ALL.into_iter().find(|architecture| architecture.model_type() == model_type);
    known.ok_or_else(|| {
        let supported = Architecture::ALL.map(Architecture::model_type).join(", ");
        json.error("model_type", format!("is {model_type:?}; supported are {supported}"))
    })
}

/// Fails for the first key that asks for arithmetic that isn't implemented.
fn refuse_unsupported(json: &JsonObject) -> Result<()> {
    for &(key, neutral) in NEUTRAL {
        if let Some(value) = json.value(key).filter(|value| !is_neutral(value, neutral)) {
            let expected = if key == "is_causal" { "true".into() } else { neutral.to_string() };
            return Err(json.unsupported(key, value, format!("only {expected} is supported")));
        }
    }
    let act: String = json.get("hidden_act")?.unwrap_or_else(|| "silu".into());
    if act != "silu" {
        return Err(json.error("hidden_act", format!("is {act:?}; only \"silu\" is supported")));
    }
    Ok(())
}

fn is_neutral(value: &Value, neutral: f64) -> bool {
    match value {
        Value::Bool(value) => f64::from(u8::from(*value)) == neutral,
        Value::Number(value) => value.as_f64() == Some(neutral),
        Value::Array(values) => values.is_empty(),
        _ => false,
    }
}

/// Returns `value` if it is a plausible size, so that products of two don't overflow.
fn positive(json: &JsonObject, key: &str, value: usize) -> Result<usize> {
    match value {
        0 => Err(json.error(key, "is 0; it must be at least 1")),
        1..=0x7fff_ffff => Ok(value),
        _ => Err(json.error(key, format!("is {value}, which is too large"))),
    }
}

fn kv_heads(json: &JsonObject, architecture: Architecture, heads: usize) -> Result<usize> {
    const KEY: &str = "num_key_value_heads";
    // An absent key means the default of the config class; null means one per query head.
    let default = match architecture {
        Architecture::Mistral if !json.contains(KEY) => 8,
        Architecture::Qwen2 | Architecture::Qwen3 if !json.contains(KEY) => 32,
        _ => heads,
    };
    let kv_heads = positive(json, KEY, json.get(KEY)?.unwrap_or(default))?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(json.error(KEY, format!("is {kv_heads}, which does not divide num_attention_heads, {heads}")));
    }
    Ok(kv_heads)
}

fn head_dim(json: &JsonObject, architecture: Architecture, hidden_size: usize, heads: usize) -> Result<usize> {
    const KEY: &str = "head_dim";
    let head_dim = match json.get(KEY)? {
        Some(head_dim) => positive(json, KEY, head_dim)?,
        None if architecture == Architecture::Qwen3 => 128,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let message = format!("is {hidden_size}, which isn't a multiple of num_attention_heads, {heads}");
            return Err(json.error("hidden_size", message));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(json.error(KEY, format!("is {head_dim}; rotary embeddings need an even number")));
    }
    Ok(head_dim)
}

/// Reads the flag `key`; fails if it is set and `architecture` has no such biases.
fn bias(json: &JsonObject, key: &str, architecture: Architecture, possible: bool) -> Result<bool> {
    match json.get(key)?.unwrap_or(false) {
        true if !possible => Err(json.error(key, format!("is true; {architecture} has no such biases"))),
        bias => Ok(bias),
    }
}

fn rope(json: &JsonObject, head_dim: usize, max_position_embeddings: usize) -> Result<RopeConfig> {
    let of =
        |theta: f32, scaling| RopeConfig { theta: f64::from(theta), head_dim, scaling, layout: RopeLayout::HalfSplit };
    const KNOWN: [&str; 8] = [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    ];
    let (old, new) = (json.object("rope_scaling")?, json.object("rope_parameters")?);
    if old.is_some() && new.is_some() {
        return Err(json.error("rope_scaling", "is given together with `rope_parameters`; remove one of them"));
    }
    let theta = |theta: f32, json: &JsonObject| {
        let valid = theta.is_finite() && theta > 0.0;
        if valid { Ok(theta) } else { Err(json.error("rope_theta", format!("is {theta}; it must be above 0"))) }
    };
    let outer = theta(json.get("rope_theta")?.unwrap_or(10_000.0), json)?;
    let Some(rope) = old.or(new) else { return Ok(of(outer, RopeScaling::None)) };
    if let Some(key) = rope.keys().find(|key| !KNOWN.contains(key) && rope.value(key).is_some()) {
        return Err(rope.error(key, "is not supported"));
    }
    if let Some(value) = rope.value("partial_rotary_factor").filter(|value| !is_neutral(value, 1.0)) {
        return Err(rope.unsupported("partial_rotary_factor", value, "only 1 is supported"));
    }

    let type_key = if rope.contains("rope_type") { "rope_type" } else { "type" };
    let rope_type: String = rope.get(type_key)?.unwrap_or_else(|| "default".into());
    let factor = |key: &str| match rope.require(key)? {
        factor if f32::is_finite(factor) && factor > 0.0 => Ok(factor),
        factor => Err(rope.error(key, format!("is {factor}; it must be above 0"))),
    };
    let scaling = match rope_type.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor("factor")? },
        "llama3" => {
            let (low_freq_factor, high_freq_factor) = (factor("low_freq_factor")?, factor("high_freq_factor")?);
            if low_freq_factor >= high_freq_factor {
                let message = format!("is {high_freq_factor}, not above low_freq_factor, which is {low_freq_factor}");
                return Err(rope.error("high_freq_factor", message));
            }
            const ORIGINAL: &str = "original_max_position_embeddings";
            let original = rope.get(ORIGINAL)?.or(json.get(ORIGINAL)?).unwrap_or(max_position_embeddings);
            let original_max_position_embeddings = positive(&rope, ORIGINAL, original)?;
            let factor = factor("factor")?;
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }
        }
        other => {
            let message = format!("is {other:?}; supported are \"default\", \"linear\", \"llama3\"");
            return Err(rope.error(type_key, message));
        }
    };
    Ok(of(theta(rope.get("rope_theta")?.unwrap_or(outer), &rope)?, scaling))
}

fn windows(json: &JsonObject, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>> {
    let given: Option<usize> = json.get("sliding_window")?;
    let enabled: Option<bool> = json.get("use_sliding_window")?;
    // An absent window means the default of the config class; null means no window.
    let window = if json.contains("sliding_window") { given } else { Some(4096) };
    let window = match architecture {
        Architecture::Llama => {
            if let Some(window) = given.filter(|_| enabled != Some(false)) {
                return Err(json.error("sliding_window", format!("is {window}; llama attends to the whole context")));
            }
            None
        }
        Architecture::Mistral if window.is_some() && enabled == Some(false) => {
            return Err(json.error("use_sliding_window", "is false; for mistral, set `sliding_window` to null"));
        }
        Architecture::Mistral => window,
        Architecture::Qwen2 | Architecture::Qwen3 => window.filter(|_| enabled == Some(true)),
    };
    if let Some(window) = window {
        positive(json, "sliding_window", window)?;
    }
    let uniform = match architecture {
        Architecture::Llama | Architecture::Mistral => vec![window; layers],
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let full: usize = json.get("max_window_layers")?.unwrap_or(28);
            (0..layers).map(|layer| window.filter(|_| layer >= full)).collect()
        }
    };
    const KEY: &str = "layer_types";
    let Some(types) = json.get::<Vec<String>>(KEY)? else { return Ok(uniform) };
    if types.len() != layers {
        return Err(json.error(KEY, format!("has {} entries for {layers} layers", types.len())));
    }
    let windows: Vec<Option<usize>> = types
        .iter()
        .map(|layer| match layer.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" if window.is_some() => Ok(window),
            "sliding_attention" => Err(json.error(KEY, "has \"sliding_attention\", but there is no sliding window")),
            other => Err(json.error(KEY, format!("has {other:?}; supported are full_attention, sliding_attention"))),
        })
        .collect::<Result<_>>()?;
    // transformers ignores this key for Mistral. A config that relies on it is for another
    // architecture.
    if architecture == Architecture::Mistral && windows != uniform {
        return Err(json.error(KEY, "contradicts `sliding_window`, which applies to all layers of mistral"));
    }
    Ok(windows)
}

fn dtype(json: &JsonObject) -> Result<Option<Dtype>> {
    let key = if json.value("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let dtype: Option<String> = json.get(key)?;
    dtype.map(|dtype| dtype.parse().map_err(|e| json.error(key, e))).transpose()
}

/// Reads one token or a list of them; old configs have -1 for none.
fn tokens(json: &JsonObject, key: &str) -> Result<Vec<u32>> {
    let values: Vec<i64> = match json.value(key) {
        None => vec![],
        Some(Value::Array(_)) => json.require(key)?,
        Some(_) => vec![json.require(key)?],
    };
    let tokens = values.into_iter().filter(|&value| value != -1);
    tokens.map(|value| u32::try_from(value).map_err(|e| json.error(key, format!("is {value}: {e}")))).collect()
}

/// Whether `quantization_config` declares 4-bit bitsandbytes; fails for any other quantization.
fn quantized(json: &JsonObject) -> Result<bool> {
    let Some(config) = json.object("quantization_config")? else { return Ok(false) };
    let flag = |key: &str| Ok(config.get(key)?.unwrap_or(false));
    let (four, eight) = (flag("load_in_4bit")? || flag("_load_in_4bit")?, flag("load_in_8bit")?);
    // Early bitsandbytes configs have no `quant_method`.
    let unnamed = if four || eight { "bitsandbytes" } else { "unknown" };
    let method: String = config.get("quant_method")?.unwrap_or_else(|| unnamed.into());
    if method != "bitsandbytes" {
        return Err(config.error("quant_method", format!("is {method:?}; only \"bitsandbytes\" is supported")));
    }
    if eight || !four {
        return Err(config.error("load_in_4bit", "is false; only 4-bit bitsandbytes weights are supported"));
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
