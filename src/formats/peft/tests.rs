use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const PATH: &str = "model.layers.0.self_attn.q_proj";

/// A folder with this config and these tensors.
fn folder(config: Value, tensors: Vec<OutTensor<'_>>) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
    safetensors::write(&folder.path().join(TENSORS), tensors, BTreeMap::new()).unwrap();
    folder
}

fn tensor(name: impl Into<String>, shape: &[usize]) -> OutTensor<'static> {
    let bytes = (0..shape.iter().product()).flat_map(|i: usize| (i as f32 - 2.5).to_le_bytes()).collect();
    OutTensor { name: name.into(), dtype: TensorType::F32, shape: shape.into(), data: OutData::Bytes(bytes) }
}

/// A and B of rank 2 for a module [3, 4].
fn pair() -> Vec<OutTensor<'static>> {
    vec![tensor(key_of(PATH, A), &[2, 4]), tensor(key_of(PATH, B), &[3, 2])]
}

/// A config with the keys in `changes`.
fn lora(changes: Value) -> Value {
    let mut config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

fn read(changes: Value, tensors: Vec<OutTensor<'_>>) -> Result<PeftAdapter> {
    PeftAdapter::read(folder(lora(changes), tensors).path())
}

/// The error text about the config, after the file name.
fn config_error(changes: Value) -> String {
    match read(changes.clone(), pair()) {
        Err(Error::File { path, message }) => {
            assert!(path.ends_with("adapter_config.json"));
            message
        }
        other => panic!("{changes}: {other:?}"),
    }
}

/// The key at fault and what is wrong with it.
fn tensor_error(changes: Value, tensors: Vec<OutTensor<'_>>) -> (String, String) {
    match read(changes, tensors) {
        Err(Error::Tensor { path, key, message }) => {
            assert!(path.ends_with("adapter_model.safetensors"));
            (key, message)
        }
        other => panic!("{other:?}"),
    }
}

fn adapter() -> PeftAdapter {
    read(json!({}), pair()).unwrap()
}

/// Reads back what `adapter` was written as.
fn reread(adapter: &PeftAdapter) -> PeftAdapter {
    let folder = TempDir::new().unwrap();
    adapter.write(folder.path()).unwrap();
    PeftAdapter::read(folder.path()).unwrap()
}

#[test]
fn absent_keys_are_the_defaults_of_peft() {
    let a = PeftConfig::read(folder(json!({"peft_type": "LORA"}), vec![]).path()).unwrap();
    let targets = Targets::new(TargetModules::names(["q_proj", "v_proj"]));
    let expected = PeftConfig { inference_mode: false, task_type: None, targets, ..PeftConfig::new(8, 8.0) };
    assert_eq!(a, expected);
}

#[test]
fn scales_follow_ranks_and_alphas() {
    let changes = json!({
        "use_rslora": true, "rank_pattern": {"q_proj": 16, ".*q_proj": 1}, "alpha_pattern": {"layers.0.self_attn.q_proj": 0.5},
    });
    let config = PeftConfig::read(folder(lora(changes), vec![]).path()).unwrap();
    assert_eq!((config.rank(PATH), config.alpha(PATH), config.scaling(PATH)), (16, 0.5, 0.125));
    assert_eq!((config.rank("v_proj"), config.alpha("v_proj"), config.scaling("v_proj")), (2, 4.0, 4.0 / 2_f32.sqrt()));
    assert_eq!(PeftConfig { use_rslora: false, ..config }.scaling("v_proj"), 2.0);
}

#[test]
fn every_setting_is_written_and_read() {
    let a = Array2::from_shape_fn((2, 4), |(i, j)| i as f32 - j as f32);
    let b = Array2::from_shape_fn((3, 2), |(i, j)| 0.1 * i as f32 + j as f32);
    let names = || Targets::new(TargetModules::names(["q_proj"]));
    let plain = PeftAdapter {
        config: PeftConfig { targets: names(), ..PeftConfig::new(2, 4.0) },
        modules: [(PATH.into(), PeftModule { a, b, magnitude: None, bias: None })].into(),
    };
    assert_eq!(reread(&plain), plain);

    let mut dora = plain.clone();
    dora.config = PeftConfig {
        base_model_name_or_path: Some("some/model".into()),
        revision: Some("main".into()),
        task_type: None,
        inference_mode: false,
        lora_alpha: 0.1,
        lora_dropout: 0.05,
        use_rslora: true,
        use_dora: true,
        init_lora_weights: InitLoraWeights::Gaussian,
        targets: names()
            .exclude(TargetModules::regex(r".*\.1\..*").unwrap())
            .layers(vec![0, 2], vec!["layers".into()])
            .unwrap(),
        rank_pattern: ModulePatterns::new([("z", 3), ("a", 4)]).unwrap(),
        alpha_pattern: ModulePatterns::new([("z", 1.5), ("a", 2.0)]).unwrap(),
        ..dora.config
    };
    dora.modules.get_mut(PATH).unwrap().magnitude = Some(vec![1.0, 2.0, 3.0]);
    assert_eq!(reread(&dora), dora);

    let mut bias = plain.clone();
    bias.config.lora_bias = true;
    bias.config.targets = Targets::new(TargetModules::AllLinear).exclude(TargetModules::names(["v_proj"]));
    bias.modules.get_mut(PATH).unwrap().bias = Some(vec![1.0, 2.0, 3.0]);
    assert_eq!(reread(&bias), bias);

    let mut regex = plain.clone();
    regex.config.targets = Targets::new(TargetModules::regex(r"model\..*_proj").unwrap());
    // Not in the order of its rows.
    regex.modules.get_mut(PATH).unwrap().b =
        Array2::from_shape_fn((2, 3), |(i, j)| (i + 10 * j) as f32).reversed_axes();
    assert_eq!(reread(&regex), regex);
}

#[test]
fn the_text_is_that_of_peft() {
    let config = PeftConfig {
        lora_alpha: 1.5,
        lora_dropout: 0.05,
        alpha_pattern: ModulePatterns::new([("b", 16.0), ("a", 0.1)]).unwrap(),
        ..PeftConfig::new(8, 16.0)
    };
    let expected = r#"{
  "alpha_pattern": {
    "b": 16,
    "a": 0.1
  },
  "base_model_name_or_path": null,
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "layers_pattern": null,
  "layers_to_transform": null,
  "lora_alpha": 1.5,
  "lora_dropout": 0.05,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 8,
  "rank_pattern": {},
  "revision": null,
  "target_modules": "all-linear",
  "task_type": "CAUSAL_LM",
  "use_dora": false,
  "use_rslora": false
}"#;
    assert_eq!(config.text().unwrap(), expected);
}

#[test]
fn sixteen_bits_are_widened() {
    let mut tensors = pair();
    let values = |n: usize| (0..n).map(|i| i as f32 - 2.5);
    tensors[0].dtype = TensorType::F16;
    tensors[0].data = OutData::Bytes(values(8).flat_map(|v| f16::from_f32(v).to_le_bytes()).collect());
    tensors[1].dtype = TensorType::BF16;
    tensors[1].data = OutData::Bytes(values(6).flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect());
    assert_eq!(read(json!({}), tensors).unwrap(), adapter());
}

#[test]
fn settings_that_are_not_supported_are_named() {
    for key in [
        "alora_invocation_tokens",
        "arrow_config",
        "corda_config",
        "eva_config",
        "kasa_config",
        "layer_replication",
        "lora_ga_config",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "velora_config",
    ] {
        for value in [json!(["lm_head"]), json!({"x": 1}), json!(true)] {
            let message = config_error(json!({key: value}));
            assert!(message.starts_with(&format!("`{key}`: is {value};")), "{message}");
        }
        for value in [Value::Null, json!(false), json!([]), json!({})] {
            read(json!({key: value}), pair()).unwrap();
        }
    }
    for key in ["fan_in_fan_out", "ensure_weight_tying", "use_qalora"] {
        assert!(config_error(json!({key: true})).starts_with(&format!("`{key}`: is true;")));
    }
    assert!(config_error(json!({"bias": "all"})).starts_with("`bias`: is \"all\""));
    assert!(config_error(json!({"peft_type": "IA3"})).starts_with("`peft_type`: is \"IA3\""));
    assert_eq!(config_error(json!({"peft_type": null})), "`peft_type`: is missing");
    for init in ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "lora_ga", "mica"] {
        assert!(config_error(json!({"init_lora_weights": init})).starts_with("`init_lora_weights`: is \""), "{init}");
    }
    read(json!({"megatron_core": "megatron.core", "qalora_group_size": 16, "something_new": 1}), pair()).unwrap();
}

#[test]
fn values_out_of_range_are_named() {
    let cases = [
        ("r", json!(0)),
        ("r", json!("x")),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!({"(?!q": 1})),
        ("alpha_pattern", json!({"(": 1})),
        ("lora_alpha", json!([1])),
        ("lora_dropout", json!(1)),
        ("lora_dropout", json!(-0.1)),
        ("target_modules", json!("(?=q.*")),
        ("target_modules", json!({"q": 1})),
        ("exclude_modules", json!("(")),
        ("layers_pattern", json!("layers")),
    ];
    for (key, value) in cases {
        let message = config_error(json!({key: value}));
        assert!(message.starts_with(&format!("`{key}`: ")), "{value}: {message}");
    }
    assert!(config_error(json!({"rank_pattern": {"a.b": "x"}})).starts_with("`rank_pattern.a.b`: "));
    let layers = json!({"target_modules": "all-linear", "layers_to_transform": 1});
    assert!(config_error(layers).starts_with("`layers_to_transform`: "));
    let pattern = json!({"layers_to_transform": [1], "layers_pattern": ["("]});
    assert!(config_error(pattern).starts_with("`layers_to_transform`: "));
    assert!(config_error(json!({"lora_bias": true, "use_dora": true})).starts_with("`lora_bias`: "));
}

#[test]
fn one_layer_needs_no_list() {
    let layers = |changes| read(changes, pair()).unwrap().config.targets;
    let one = layers(json!({"layers_to_transform": 0, "layers_pattern": "layers"}));
    assert_eq!(one, layers(json!({"layers_to_transform": [0], "layers_pattern": ["layers"]})));
    assert_eq!((one.layers_to_transform(), one.layers_pattern()), (Some(&[0][..]), &["layers".to_owned()][..]));
    assert_eq!(layers(json!({"layers_pattern": ""})), layers(json!({})));
    assert_eq!(layers(json!({"target_modules": "All-Linear"})).modules(), &TargetModules::AllLinear);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let with = |extra: OutTensor<'static>| pair().into_iter().chain([extra]).collect::<Vec<_>>();
    let fault = |changes, tensors, key: &str, message: &str| {
        let (got_key, got) = tensor_error(changes, tensors);
        assert_eq!(got_key, key);
        assert!(got.contains(message), "{got}");
    };
    let [a, b, bias, magnitude] = [A, B, BIAS, MAGNITUDE].map(|suffix| key_of(PATH, suffix));

    let bare = format!("{PATH}{A}");
    fault(json!({}), vec![tensor(bare.as_str(), &[2, 4])], &bare, "lacks the prefix `base_model.model.`");
    fault(json!({}), pair().split_off(1), &a, "is missing, but there is");
    let mut tensors = pair();
    tensors.truncate(1);
    fault(json!({}), tensors, &b, "is missing");
    fault(json!({"r": 3}), pair(), &a, "has shape [2, 4], expected [3, 4]");
    fault(json!({"rank_pattern": {"q_proj": 1}}), pair(), &a, "expected [1, 4]");
    fault(json!({}), vec![tensor(a.as_str(), &[2, 4]), tensor(b.as_str(), &[2, 3])], &b, "expected [2, 2]");
    fault(json!({}), vec![tensor(a.as_str(), &[8]), tensor(b.as_str(), &[3, 2])], &a, "it must be a matrix");
    fault(json!({}), vec![tensor(a.as_str(), &[2, 4, 1, 1]), tensor(b.as_str(), &[3, 2])], &a, "it must be a matrix");
    fault(json!({"target_modules": ["k_proj"]}), pair(), &a, "`target_modules` in adapter_config.json leaves out");
    fault(json!({"use_dora": true}), pair(), &magnitude, "is missing, but `use_dora`");
    fault(json!({}), with(tensor(magnitude.as_str(), &[3])), &magnitude, "`use_dora` is not set");
    fault(json!({"use_dora": true}), with(tensor(magnitude.as_str(), &[4])), &magnitude, "has shape [4], expected [3]");
    fault(json!({"use_dora": true}), with(tensor(magnitude.as_str(), &[3, 1])), &magnitude, "it must be a vector");
    fault(json!({"lora_bias": true}), pair(), &bias, "is missing, but `lora_bias`");
    fault(json!({}), with(tensor(bias.as_str(), &[3])), &bias, "`lora_bias` is not set");
    let others = [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "adapts an embedding"),
        ("base_model.model.model.embed_tokens.weight", "is a whole weight"),
        ("base_model.model.lm_head.weight", "is a whole weight"),
        ("base_model.model.q_proj.lora_A.default.weight", "not a known LoRA tensor"),
    ];
    for (key, message) in others {
        fault(json!({}), with(tensor(key, &[2, 4])), key, message);
    }
    let mut integers = pair();
    integers[1] = OutTensor { dtype: TensorType::I32, ..tensor(b.as_str(), &[3, 2]) };
    fault(json!({}), integers, &b, "is I32, expected F32, F16 or BF16");
}

#[test]
fn missing_files_are_errors() {
    let folder = folder(lora(json!({})), vec![]);
    let error = || PeftAdapter::read(folder.path()).unwrap_err().to_string();
    assert!(error().contains("has no LoRA tensors"), "{}", error());
    fs::remove_file(folder.path().join(TENSORS)).unwrap();
    assert!(error().contains("adapter_model.safetensors: "), "{}", error());
    fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
    assert!(error().contains("convert it to safetensors"), "{}", error());
    fs::remove_file(folder.path().join(CONFIG)).unwrap();
    assert!(error().contains("adapter_config.json: "), "{}", error());
}

#[test]
fn a_failed_write_leaves_the_old_adapter() {
    let folder = TempDir::new().unwrap();
    let target = folder.path().join("made/on/the/way");
    let good = adapter();
    good.write(&target).unwrap();
    let fails = |change: fn(&mut PeftAdapter), message: &str| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = bad.write(&target).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(PeftAdapter::read(&target).unwrap(), good);
        assert_eq!(fs::read_dir(&target).unwrap().count(), 2, "no temporary file stays");
    };
    fails(|bad| bad.config.r = 3, "lora_A.weight\": has shape [2, 4], expected [3, 4]");
    fails(|bad| bad.config.r = 0, "`r`: is 0");
    fails(|bad| bad.config.lora_alpha = f32::NAN, "`lora_alpha`: is NaN");
    fails(|bad| bad.config.alpha_pattern = ModulePatterns::new([("x", f32::INFINITY)]).unwrap(), "`alpha_pattern`: ");
    fails(|bad| bad.config.use_dora = true, "lora_magnitude_vector\": is missing");
    fails(|bad| bad.config.targets = Targets::new(TargetModules::names(["x"])), "leaves out");
    let exclude = |bad: &mut PeftAdapter| {
        bad.config.targets = bad.config.targets.clone().exclude(TargetModules::AllLinear);
    };
    fails(exclude, "`exclude_modules`: ");
    fails(|bad| bad.modules.clear(), "would have no LoRA tensors");

    fs::write(folder.path().join("file"), "").unwrap();
    assert!(matches!(good.write(folder.path().join("file")), Err(Error::Io { .. })));
}
