//! A [`ModelConfig`] as the metadata of a GGUF file: what [`ModelConfig::from_gguf`] reads.

use super::{ROPE_FREQS, gguf_architecture};
use crate::error::{Error, Result};
use crate::formats::gguf::{Metadata, OutValue};
use crate::kernels::rope::{RopeConfig, RopeScaling};
use crate::nn::{Architecture, ModelConfig};

impl ModelConfig {
    /// The metadata of a GGUF file of this model, its tokenizer excepted.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a model with sliding windows that no GGUF file can say.
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
            // Sizes that were read are below 2^31.
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
                return Err(Error::Invalid {
                    op: "writing a GGUF file",
                    what: "the sliding window",
                    got: window.to_string(),
                    expected: format!("{architecture} files have none; merge into a directory instead"),
                });
            }
        }
        Ok(metadata)
    }

    /// The tensor that Llama 3's rotary embeddings have in a GGUF file: its name and its values, a divisor of each frequency.
    pub(crate) fn gguf_rope_freqs(&self) -> Option<(&'static str, Vec<f32>)> {
        let RopeScaling::Llama3 { .. } = self.rope.scaling else { return None };
        let plain = RopeConfig { scaling: RopeScaling::None, ..self.rope }.frequencies();
        let divisors = plain.iter().zip(self.rope.frequencies()).map(|(plain, scaled)| plain / scaled);
        Some((ROPE_FREQS, divisors.collect()))
    }
}
