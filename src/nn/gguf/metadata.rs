//! Writes a [`ModelConfig`] as GGUF metadata that [`ModelConfig::from_gguf`] reads.

use super::{ROPE_FREQS, gguf_architecture};
use crate::error::{Error, Result};
use crate::formats::gguf::{Metadata, OutValue};
use crate::kernels::elementwise::rope::{RopeConfig, RopeScaling};
use crate::nn::{Architecture, ModelConfig};

impl ModelConfig {
    /// GGUF metadata for this model, without its tokenizer.
    ///
    /// # Errors
    /// [`Error::Invalid`] for sliding windows that a GGUF file can't represent.
    pub(crate) fn gguf_metadata(&self, name: &str) -> Result<Metadata> {
        let architecture = gguf_architecture(self.architecture);
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", OutValue::String(architecture.into()));
        metadata.set("general.type", OutValue::String("model".into()));
        metadata.set("general.name", OutValue::String(name.into()));
        let mut set = |key: &str, value: OutValue| metadata.set(format!("{architecture}.{key}"), value);
        let sizes = [
            ("block_count", self.layers),
            ("context_length", self.max_position_embeddings),
            ("embedding_length", self.hidden_size),
            ("feed_forward_length", self.intermediate_size),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
            ("vocab_size", self.vocab_size),
        ];
        for (key, size) in sizes {
            // Sizes are below 2^31: reading checks it.
            set(key, OutValue::U32(size as u32));
        }
        set("attention.layer_norm_rms_epsilon", OutValue::F32(self.rms_norm_eps));
        set("rope.freq_base", OutValue::F32(self.rope.theta as f32));
        if let RopeScaling::Linear { factor } = self.rope.scaling {
            set("rope.scaling.type", OutValue::String("linear".into()));
            set("rope.scaling.factor", OutValue::F32(factor));
        }
        match self.sliding_window() {
            None => {}
            Some(window) if self.architecture == Architecture::Mistral => {
                set("attention.sliding_window", OutValue::U32(window as u32));
            }
            Some(window) => {
                return Err(Error::invalid(
                    "writing a GGUF file",
                    "the sliding window",
                    window,
                    format!("{architecture} files can't have one; merge into a directory instead"),
                ));
            }
        }
        Ok(metadata)
    }

    /// Name and values of the tensor for Llama 3's rotary scaling: a divisor for each frequency.
    pub(crate) fn gguf_rope_freqs(&self) -> Option<(&'static str, Vec<f32>)> {
        let RopeScaling::Llama3 { .. } = self.rope.scaling else { return None };
        let plain = RopeConfig { scaling: RopeScaling::None, ..self.rope }.frequencies();
        let divisors = plain.iter().zip(self.rope.frequencies()).map(|(plain, scaled)| plain / scaled);
        Some((ROPE_FREQS, divisors.collect()))
    }
}
