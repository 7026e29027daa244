//! `adapter_config.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::CONFIG;
use super::targets::{ModulePatterns, TargetModules, Targets};
use crate::error::{Error, Result};
use crate::formats::json::JsonObject;

/// PEFT features that change what an adapter computes and aren't implemented.
const UNSUPPORTED: [&str; 17] = [
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// How an adapter was initialized; recorded only. Methods that also change the base aren't
/// supported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A Kaiming-uniform, B zero.
    #[default]
    KaimingUniform,
    /// `false`: A and B random.
    Random,
    /// `"gaussian"`: A normal, B zero.
    Gaussian,
    /// `"orthogonal"`.
    Orthogonal,
}

impl InitLoraWeights {
    const ALL: [InitLoraWeights; 4] = [
        InitLoraWeights::KaimingUniform,
        InitLoraWeights::Random,
        InitLoraWeights::Gaussian,
        InitLoraWeights::Orthogonal,
    ];

    fn json(self) -> Value {
        match self {
            InitLoraWeights::KaimingUniform => true.into(),
            InitLoraWeights::Random => false.into(),
            InitLoraWeights::Gaussian => "gaussian".into(),
            InitLoraWeights::Orthogonal => "orthogonal".into(),
        }
    }
}

/// Configuration of an adapter. Fields have the names in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftConfig {
    /// Model that the adapter is for: a name on the hub, or a folder.
    pub base_model_name_or_path: Option<String>,
    /// Revision of that model.
    pub revision: Option<String>,
    /// `CAUSAL_LM` for a language model.
    pub task_type: Option<String>,
    /// Whether the adapter is loaded frozen.
    pub inference_mode: bool,
    /// Default rank of modules, at least 1.
    pub r: usize,
    /// Default alpha of modules.
    pub lora_alpha: f32,
    /// Probability, in 0..1, of dropping a value before A. Applies in training only.
    pub lora_dropout: f32,
    /// Whether the scale is alpha / sqrt(r) instead of alpha / r.
    pub use_rslora: bool,
    /// Whether modules have a magnitude (DoRA).
    pub use_dora: bool,
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// How the values were initialized.
    pub init_lora_weights: InitLoraWeights,
    /// Adapted modules: `target_modules`, `exclude_modules`, `layers_to_transform`,
    /// `layers_pattern`.
    pub targets: Targets,
    /// Ranks of individual modules.
    pub rank_pattern: ModulePatterns<usize>,
    /// alpha of individual modules.
    pub alpha_pattern: ModulePatterns<f32>,
}

impl PeftConfig {
    /// An adapter for a causal language model on every linear layer except the head; PEFT loads it
    /// for inference.
    pub fn new(r: usize, lora_alpha: f32) -> Self {
        PeftConfig {
            base_model_name_or_path: None,
            revision: None,
            task_type: Some("CAUSAL_LM".into()),
            inference_mode: true,
            r,
            lora_alpha,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            init_lora_weights: InitLoraWeights::default(),
            targets: Targets::new(TargetModules::AllLinear),
            rank_pattern: ModulePatterns::default(),
            alpha_pattern: ModulePatterns::default(),
        }
    }

    /// Rank of the module at `path`.
    pub fn rank(&self, path: &str) -> usize {
        self.rank_pattern.get(path).unwrap_or(self.r)
    }

    /// alpha of the module at `path`.
    pub fn alpha(&self, path: &str) -> f32 {
        self.alpha_pattern.get(path).unwrap_or(self.lora_alpha)
    }

    /// Scale of the module at `path`: alpha / r, or alpha / sqrt(r).
    pub fn scaling(&self, path: &str) -> f32 {
        let rank = self.rank(path) as f32;
        self.alpha(path) / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Reads `adapter_config.json` in `folder`. Absent keys have PEFT's defaults (for example r =
    /// 8 and lora_alpha = 8); unknown ones are ignored, like in PEFT.
    ///
    /// # Errors
    /// [`Error::Io`] if it can't be read; [`Error::File`], naming the key, for a value that is
    /// malformed, out of range or unsupported.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let json = JsonObject::read(&folder.as_ref().join(CONFIG))?;
        refuse_unsupported(&json)?;
        let config = PeftConfig {
            base_model_name_or_path: json.get("base_model_name_or_path")?,
            revision: json.get("revision")?,
            task_type: json.get("task_type")?,
            inference_mode: json.get("inference_mode")?.unwrap_or(false),
            r: json.get("r")?.unwrap_or(8),
            lora_alpha: json.get("lora_alpha")?.unwrap_or(8.0),
            lora_dropout: json.get("lora_dropout")?.unwrap_or(0.0),
            use_rslora: json.get("use_rslora")?.unwrap_or(false),
            use_dora: json.get("use_dora")?.unwrap_or(false),
            lora_bias: json.get("lora_bias")?.unwrap_or(false),
            init_lora_weights: init_lora_weights(&json)?,
            targets: targets(&json)?,
            rank_pattern: patterns(&json, "rank_pattern")?,
            alpha_pattern: patterns(&json, "alpha_pattern")?,
        };
        config.check().map_err(|(key, message)| json.error(key, message))?;
        Ok(config)
    }

    /// Checks fields that are numbers or exclude each other. The error is a key and what is wrong
    /// with it.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let ranks = || self.rank_pattern.iter().map(|(_, rank)| rank);
        let alphas = || self.alpha_pattern.iter().map(|(_, alpha)| alpha);
        if self.r == 0 {
            Err(("r", "is 0; it must be at least 1".into()))
        } else if ranks().any(|rank| rank == 0) {
            Err(("rank_pattern", "has a rank of 0; it must be at least 1".into()))
        } else if !self.lora_alpha.is_finite() {
            Err(("lora_alpha", format!("is {}; it must be finite", self.lora_alpha)))
        } else if let Some(alpha) = alphas().find(|alpha| !alpha.is_finite()) {
            Err(("alpha_pattern", format!("has an alpha of {alpha}; it must be finite")))
        } else if !(0.0..1.0).contains(&self.lora_dropout) {
            Err(("lora_dropout", format!("is {}; it must be at least 0 and less than 1", self.lora_dropout)))
        } else if self.targets.excluded() == Some(&TargetModules::AllLinear) {
            Err(("exclude_modules", "is \"all-linear\", which is only allowed for target_modules".into()))
        } else if self.lora_bias && self.use_dora {
            Err(("lora_bias", "is true together with `use_dora`; PEFT has no such adapters".into()))
        } else {
            Ok(())
        }
    }

    /// Text of the file, formatted like PEFT's.
    pub(super) fn text(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(&self.json())
    }

    /// Contents of the file: sorted keys, values like PEFT's. Keys unknown to old versions of PEFT
    /// are included only if they matter.
    pub fn json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut set = |key: &str, value: Value| map.insert(key.into(), value);
        set("alpha_pattern", self.alpha_pattern.iter().map(|(key, alpha)| (key, number(alpha))).collect());
        set("base_model_name_or_path", json!(self.base_model_name_or_path));
        set("bias", json!("none"));
        if let Some(exclude) = self.targets.excluded() {
            set("exclude_modules", modules_json(exclude));
        }
        set("fan_in_fan_out", json!(false));
        set("inference_mode", json!(self.inference_mode));
        set("init_lora_weights", self.init_lora_weights.json());
        let pattern = self.targets.layers_pattern();
        set("layers_pattern", if pattern.is_empty() { Value::Null } else { json!(pattern) });
        set("layers_to_transform", json!(self.targets.layers_to_transform()));
        set("lora_alpha", number(self.lora_alpha));
        if self.lora_bias {
            set("lora_bias", json!(true));
        }
        set("lora_dropout", json!(decimal(self.lora_dropout)));
        set("modules_to_save", Value::Null);
        set("peft_type", json!("LORA"));
        set("r", json!(self.r));
        set("rank_pattern", self.rank_pattern.iter().map(|(key, rank)| (key, Value::from(rank))).collect());
        set("revision", json!(self.revision));
        set("target_modules", modules_json(self.targets.modules()));
        set("task_type", json!(self.task_type));
        set("use_dora", json!(self.use_dora));
        set("use_rslora", json!(self.use_rslora));
        map
    }
}

fn refuse_unsupported(json: &JsonObject) -> Result<()> {
    let peft_type: String = json.require("peft_type")?;
    if peft_type != "LORA" {
        return Err(json.error("peft_type", format!("is {peft_type:?}; only \"LORA\" is supported")));
    }
    let unset = |value: &Value| match value {
        Value::Bool(value) => !value,
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    for key in UNSUPPORTED {
        if let Some(value) = json.value(key).filter(|value| !unset(value)) {
            return Err(json.unsupported(key, value, "adapters of this kind aren't supported"));
        }
    }
    match json.get::<String>("bias")?.as_deref() {
        None | Some("none") => Ok(()),
        Some(bias) => Err(json.error("bias", format!("is {bias:?}; only \"none\" is supported"))),
    }
}

fn init_lora_weights(json: &JsonObject) -> Result<InitLoraWeights> {
    const KEY: &str = "init_lora_weights";
    let Some(value) = json.value(KEY) else { return Ok(InitLoraWeights::default()) };
    InitLoraWeights::ALL.into_iter().find(|init| init.json() == *value).ok_or_else(|| {
        let hint = "supported are true, false, \"gaussian\", \"orthogonal\"; others may change the base too, and PEFT can \
                    save them as a plain LoRA adapter";
        json.unsupported(KEY, value, hint)
    })
}

fn targets(json: &JsonObject) -> Result<Targets> {
    // PEFT's default for the architectures supported here.
    let default = || TargetModules::names(["q_proj", "v_proj"]);
    let mut targets = Targets::new(match modules(json, "target_modules")? {
        Some(TargetModules::Regex(text)) if text.as_str().eq_ignore_ascii_case("all-linear") => {
            TargetModules::AllLinear
        }
        given => given.unwrap_or_else(default),
    });
    if let Some(exclude) = modules(json, "exclude_modules")?.filter(|exclude| *exclude != TargetModules::Names(vec![]))
    {
        targets = targets.exclude(exclude);
    }
    let containers: Vec<String> = one_or_more(json, "layers_pattern")?.unwrap_or_default();
    match one_or_more(json, "layers_to_transform")? {
        Some(indices) => targets.layers(indices, containers).map_err(|e| json.error("layers_to_transform", e)),
        None if containers.is_empty() => Ok(targets),
        None => Err(json.error("layers_pattern", "is given without `layers_to_transform`")),
    }
}

/// Reads a list of names, or an expression.
fn modules(json: &JsonObject, key: &str) -> Result<Option<TargetModules>> {
    match json.value(key) {
        None => Ok(None),
        Some(Value::String(text)) => TargetModules::regex(text).map(Some).map_err(|e| json.error(key, e)),
        Some(_) => Ok(Some(TargetModules::Names(json.require(key)?))),
    }
}

/// Reads the values of a list, or a single one; an empty text counts as absent.
fn one_or_more<T: serde::de::DeserializeOwned>(json: &JsonObject, key: &str) -> Result<Option<Vec<T>>> {
    match json.value(key) {
        None => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::Array(_)) => json.get(key),
        Some(_) => Ok(Some(vec![json.require(key)?])),
    }
}

fn patterns<T: Copy + serde::de::DeserializeOwned>(json: &JsonObject, key: &str) -> Result<ModulePatterns<T>> {
    let Some(object) = json.object(key)? else { return Ok(ModulePatterns::default()) };
    let entries = object.keys().map(|pattern| Ok((pattern, object.require(pattern)?))).collect::<Result<Vec<_>>>()?;
    ModulePatterns::new(entries).map_err(|e: Error| json.error(key, e))
}

fn modules_json(modules: &TargetModules) -> Value {
    match modules {
        TargetModules::AllLinear => json!("all-linear"),
        TargetModules::Names(names) => json!(names),
        TargetModules::Regex(expression) => json!(expression.as_str()),
    }
}

/// Writes a number without a fraction as an integer, like Python's int.
fn number(value: f32) -> Value {
    let whole = value as i64;
    if whole as f32 == value { json!(whole) } else { json!(decimal(value)) }
}

/// The number with the same shortest decimal as `value`: 0.05 for the f32 nearest to it.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
