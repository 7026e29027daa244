use std::fs;

use serde_json::{Map, json};
use tempfile::TempDir;

use super::*;
use crate::error::Error;

const LLAMA3: &str = r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0}"#;

fn rope_of(theta: f64, scaling: RopeScaling) -> RopeConfig {
    RopeConfig { theta, head_dim: 8, scaling, layout: RopeLayout::HalfSplit }
}

/// A small config of `model_type` with the keys of `changes` set, or removed if the value is
/// "absent".
fn parse(model_type: &str, changes: Value) -> Result<ModelConfig> {
    let mut config: Map<String, Value> = serde_json::from_value(json!({
        "model_type": model_type, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }))
    .unwrap();
    for (key, value) in changes.as_object().unwrap() {
        if value == "absent" {
            config.remove(key);
        } else {
            config.insert(key.clone(), value.clone());
        }
    }
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("config.json"), Value::from(config).to_string()).unwrap();
    ModelConfig::read(folder.path())
}

fn get(model_type: &str, changes: Value) -> ModelConfig {
    parse(model_type, changes.clone()).unwrap_or_else(|error| panic!("{changes}: {error}"))
}

/// The error text after the file name.
fn error(model_type: &str, changes: Value) -> String {
    match parse(model_type, changes.clone()) {
        Err(Error::File { path, message }) => {
            assert!(path.ends_with("config.json"));
            message
        }
        other => panic!("{changes}: {other:?}"),
    }
}

#[test]
fn absent_keys_are_the_defaults_of_the_class() {
    let llama = get("llama", json!({"num_key_value_heads": "absent", "head_dim": "absent"}));
    assert_eq!((llama.kv_heads, llama.head_dim, llama.max_position_embeddings), (8, 8, 512));
    assert_eq!(llama.rope, rope_of(10_000.0, RopeScaling::None));
    assert_eq!((llama.bos_token_id, &llama.eos_token_ids[..], llama.pad_token_id), (Some(1), &[2][..], None));
    assert_eq!((llama.dtype, llama.tie_word_embeddings, llama.quantized), (None, false, false));
    assert_eq!((llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm), (false, false, false, false));
    assert_eq!(llama.windows, [None; 4]);

    let absent =
        json!({"num_key_value_heads": "absent", "max_position_embeddings": "absent", "rms_norm_eps": "absent"});
    let mistral = get("mistral", absent);
    assert_eq!((mistral.kv_heads, mistral.max_position_embeddings, mistral.rms_norm_eps), (8, 131_072, 1e-6));
    assert_eq!(mistral.windows, [Some(4096); 4]);
    assert_eq!(get("mistral", json!({"num_key_value_heads": null, "num_attention_heads": 4})).kv_heads, 4);

    let qwen2 = get("qwen2", json!({"attention_bias": false}));
    assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.bos_token_id), (true, false, false, None));
    assert!(qwen2.eos_token_ids.is_empty());
    let qwen3 = get("qwen3", json!({"head_dim": "absent"}));
    assert_eq!((qwen3.head_dim, qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm), (128, false, false, true));
}

#[test]
fn both_spellings_are_read() {
    let old =
        json!({"torch_dtype": "bfloat16", "rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2}});
    let new =
        json!({"dtype": "bfloat16", "rope_parameters": {"rope_type": "linear", "rope_theta": 500_000, "factor": 2.0}});
    let linear = get("llama", old);
    assert_eq!(linear, get("llama", new));
    assert_eq!(linear.dtype, Some(Dtype::Bf16));
    assert_eq!(linear.rope, rope_of(500_000.0, RopeScaling::Linear { factor: 2.0 }));

    let llama3: Value = serde_json::from_str(LLAMA3).unwrap();
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    for key in ["rope_parameters", "rope_scaling"] {
        let rope = get("llama", json!({key: llama3})).rope;
        assert_eq!(rope, rope_of(500_000.0, scaling));
    }
    let mut short = llama3.clone();
    short
        .as_object_mut()
        .unwrap()
        .retain(|key, _| !["original_max_position_embeddings", "rope_theta"].contains(&key.as_str()));
    let rope = get("llama", json!({"rope_scaling": short, "rope_theta": 7})).rope;
    let RopeScaling::Llama3 { original_max_position_embeddings, .. } = rope.scaling else { panic!("{rope:?}") };
    assert_eq!((rope.theta, original_max_position_embeddings), (7.0, 512));
    assert_eq!(get("llama", json!({"rope_scaling": null, "rope_theta": 3})).rope.theta, 3.0);
}

#[test]
fn biases_and_tokens() {
    let llama = get("llama", json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true}));
    assert!(llama.qkv_bias && llama.o_bias && llama.mlp_bias && llama.tie_word_embeddings);
    assert!(get("qwen3", json!({"attention_bias": true})).o_bias);
    assert!(!get("qwen2", json!({"attention_bias": true})).o_bias);
    let ids = get("llama", json!({"bos_token_id": null, "eos_token_id": [5, 6], "pad_token_id": -1}));
    assert_eq!((ids.bos_token_id, &ids.eos_token_ids[..], ids.pad_token_id), (None, &[5, 6][..], None));
}

#[test]
fn windows_follow_the_config() {
    let windows = |model_type, changes| {
        let config = get(model_type, changes);
        (0..4).map(|layer| config.window(layer)).collect::<Vec<_>>()
    };
    let none = [None; 4];
    assert_eq!(windows("mistral", json!({"sliding_window": 16})), [Some(16); 4]);
    assert_eq!(windows("mistral", json!({"sliding_window": null})), none);
    for qwen in ["qwen2", "qwen3"] {
        assert_eq!(windows(qwen, json!({"sliding_window": 16})), none);
        let on = json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 3});
        assert_eq!(windows(qwen, on), [None, None, None, Some(16)]);
        assert_eq!(
            windows(qwen, json!({"sliding_window": null, "use_sliding_window": true, "max_window_layers": 0})),
            none
        );
        let types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"];
        let listed = json!({"sliding_window": 16, "use_sliding_window": true, "layer_types": types});
        assert_eq!(windows(qwen, listed), [None, Some(16), None, Some(16)]);
    }
    assert_eq!(windows("llama", json!({"sliding_window": 16, "use_sliding_window": false})), none);

    assert!(error("llama", json!({"sliding_window": 16})).contains("`sliding_window`: is 16; llama"));
    assert!(error("mistral", json!({"sliding_window": 0})).contains("`sliding_window`: is 0"));
    assert!(error("mistral", json!({"use_sliding_window": false})).contains("`use_sliding_window`: is false"));
    let types = |types: [&str; 4]| json!({"layer_types": types, "use_sliding_window": true});
    assert!(error("mistral", types(["full_attention"; 4])).contains("`layer_types`: contradicts"));
    assert!(error("qwen3", types(["chunked_attention"; 4])).contains("`layer_types`: has \"chunked_attention\""));
    assert!(
        error("qwen3", json!({"layer_types": vec!["sliding_attention"; 4]})).contains("there is no sliding window")
    );
    assert!(error("qwen3", json!({"layer_types": ["full_attention"]})).contains("has 1 entries for 4 layers"));
}

#[test]
fn what_is_not_supported_is_named() {
    assert_eq!(error("gemma", json!({})), "`model_type`: is \"gemma\"; supported are llama, mistral, qwen2, qwen3");
    assert!(error("llama", json!({"hidden_act": "gelu"})).contains("`hidden_act`: is \"gelu\""));
    for &(key, neutral) in NEUTRAL {
        let message = error("llama", json!({key: 0.5}));
        assert!(message.contains(&format!("`{key}`: is 0.5; only")), "{message}");
        get("llama", json!({key: neutral}));
        get("llama", json!({key: null}));
    }
    assert!(error("llama", json!({"is_causal": false})).contains("only true"));
    assert!(error("llama", json!({"no_rope_layers": [1, 0]})).contains("`no_rope_layers`: is [1,0]"));
    assert!(error("mistral", json!({"attention_bias": true})).contains("`attention_bias`: is true; mistral"));
    assert!(error("qwen3", json!({"mlp_bias": true})).contains("`mlp_bias`"));

    let rope = |key: &str, value: Value| {
        let mut rope: Map<String, Value> = serde_json::from_str(LLAMA3).unwrap();
        rope.insert(key.into(), value);
        error("llama", json!({"rope_parameters": rope}))
    };
    assert!(rope("rope_type", "yarn".into()).contains("`rope_parameters.rope_type`: is \"yarn\"; supported"));
    assert!(rope("partial_rotary_factor", 0.5.into()).contains("`rope_parameters.partial_rotary_factor`: is 0.5"));
    assert!(rope("mrope_section", json!([1])).contains("`rope_parameters.mrope_section`"));
    assert!(rope("full_attention", json!({})).contains("`rope_parameters.full_attention`"));
    assert!(rope("factor", json!(0)).contains("`rope_parameters.factor`: is 0"));
    assert!(rope("factor", Value::Null).contains("`rope_parameters.factor`: is missing"));
    assert!(rope("low_freq_factor", json!(4)).contains("not above low_freq_factor"));
    assert!(rope("rope_theta", json!(-1)).contains("`rope_parameters.rope_theta`: is -1"));
    assert!(
        error("llama", json!({"rope_scaling": {"type": "dynamic"}})).contains("`rope_scaling.type`: is \"dynamic\"")
    );
    assert!(
        error("llama", json!({"rope_scaling": {}, "rope_parameters": {}}))
            .contains("`rope_scaling`: is given together with")
    );

    let quantized = |config: Value| error("llama", json!({"quantization_config": config}));
    assert!(quantized(json!({"quant_method": "gptq"})).contains("`quantization_config.quant_method`: is \"gptq\""));
    assert!(quantized(json!({"quant_method": "bitsandbytes", "load_in_8bit": true})).contains("only 4-bit"));
    assert!(quantized(json!({})).contains("is \"unknown\""));
    assert!(get("llama", json!({"quantization_config": {"load_in_4bit": true}})).quantized);
}

#[test]
fn malformed_values_are_named() {
    for key in
        ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    {
        assert_eq!(error("llama", json!({key: "absent"})), format!("`{key}`: is missing"));
    }
    for key in ["vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "max_position_embeddings"] {
        assert!(error("llama", json!({key: 0})).contains(&format!("`{key}`: is 0")));
        assert!(error("llama", json!({key: -1})).contains(&format!("`{key}`: invalid value")));
        assert!(error("llama", json!({key: "x"})).contains(&format!("`{key}`: invalid type")));
    }
    assert!(
        error("llama", json!({"hidden_size": 1_u64 << 40})).contains("`hidden_size`: is 1099511627776, which is too")
    );
    assert!(error("llama", json!({"num_hidden_layers": 10_001})).contains("must be at most 10000"));
    assert!(error("llama", json!({"num_key_value_heads": 3})).contains("does not divide num_attention_heads, 8"));
    assert!(error("llama", json!({"head_dim": 7})).contains("`head_dim`: is 7"));
    assert!(error("llama", json!({"head_dim": null, "hidden_size": 60})).contains("`hidden_size`: is 60"));
    assert!(error("llama", json!({"rms_norm_eps": -1e-5})).contains("`rms_norm_eps`"));
    assert!(error("llama", json!({"rope_theta": 0})).contains("`rope_theta`: is 0"));
    assert!(error("llama", json!({"torch_dtype": "float8"})).contains("`torch_dtype`"));
    assert!(error("llama", json!({"eos_token_id": -2})).contains("`eos_token_id`: is -2"));

    let folder = TempDir::new().unwrap();
    assert!(matches!(ModelConfig::read(folder.path()), Err(Error::Io { .. })));
    for text in ["[]", "{", ""] {
        fs::write(folder.path().join("config.json"), text).unwrap();
        let error = ModelConfig::read(folder.path()).unwrap_err();
        assert!(error.to_string().contains("is malformed"), "{error}");
    }
}
