//! Writes a [`ModelConfig`] as a `config.json` that [`ModelConfig::read`] reads.

use serde_json::{Map, Value, json};

use super::{Architecture, ModelConfig};
use crate::kernels::elementwise::rope::RopeScaling;

impl ModelConfig {
    /// Keys of `config.json`, without the type of the weights.
    pub(crate) fn json(&self) -> Map<String, Value> {
        let class = match self.architecture {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
        };
        let theta = self.rope.theta;
        let rope = match self.rope.scaling {
            RopeScaling::None => json!({"rope_type": "default", "rope_theta": theta}),
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "rope_theta": theta, "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                json!({
                    "rope_type": "llama3",
                    "rope_theta": theta,
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                })
            }
        };
        let eos = match self.eos_token_ids[..] {
            [] => Value::Null,
            [one] => one.into(),
            ref more => more.into(),
        };
        let mut config = json!({
            "architectures": [class],
            "model_type": self.architecture.model_type(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            // The shortest text of the f32; converting it to f64 would add spurious digits.
            "rms_norm_eps": short(self.rms_norm_eps),
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
            "use_cache": true,
        });
        match self.architecture {
            Architecture::Llama => {
                config["attention_bias"] = self.o_bias.into();
                config["mlp_bias"] = self.mlp_bias.into();
            }
            Architecture::Mistral => config["sliding_window"] = self.sliding_window().into(),
            Architecture::Qwen2 => config["use_sliding_window"] = false.into(),
            Architecture::Qwen3 => {
                config["attention_bias"] = self.qkv_bias.into();
                config["use_sliding_window"] = false.into();
            }
        }
        match config {
            Value::Object(map) => map,
            other => unreachable!("{other}"),
        }
    }
}

fn short(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(value.into(), Value::from)
}
