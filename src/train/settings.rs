//! Options of a run, and the settings that determine its course. A run must be resumed with the
//! settings it was started with.

use serde_json::{Map, Value, json};

use super::TrainOptions;
use super::batches::Batches;
use super::data::Example;
use crate::formats::peft::{PeftAdapter, PeftConfig, PeftModule};
use crate::hash::text_hash;
use crate::nn::Fingerprint;
use crate::seed::mix;

/// Length of a run, and what to do during it.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions {
    /// Options for each step.
    pub train: TrainOptions,
    /// Total number of steps.
    pub steps: u32,
    /// Steps between evaluations. There is always one before the first step and one after the
    /// last; with 0, only these.
    pub eval_every: u32,
    /// Ends the run after this many evaluations without improvement. The result is then the best
    /// adapter.
    pub early_stop: Option<u32>,
    /// Steps between checkpoints. There is always one after the last step; with 0, only that one.
    pub save_every: u32,
    /// Number of newest checkpoints to keep, at least 1.
    pub keep: usize,
}

/// A setting that must be the same when a run is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// Family and sizes of the base.
    Architecture,
    /// Storage formats of the base's matrices.
    Formats,
    /// Tensors of the base.
    Weights,
    /// Tokenizer of the data.
    Tokenizer,
    /// Adapter that training started from.
    InitialAdapter,
    /// Rank r of the adapter.
    Rank,
    /// Alpha of the adapter.
    Alpha,
    /// Dropout probability of the adapter.
    Dropout,
    /// Modules that have an adapter.
    Targets,
    /// Whether the scale is that of rsLoRA.
    RsLora,
    /// Whether the adapter is DoRA.
    Dora,
    /// The rest of the adapter's configuration.
    Adapter,
    /// Total number of updates.
    Steps,
    /// Rows in a micro-batch.
    BatchSize,
    /// Micro-batches per step.
    GradAccum,
    /// Tokens in a row.
    SeqLen,
    /// Whether a row may hold several examples.
    Packing,
    /// Whether every epoch has its own order.
    Shuffling,
    /// Highest learning rate.
    LearningRate,
    /// Decay of the learning rate.
    Schedule,
    /// Number of warm-up steps.
    WarmUp,
    /// AdamW's weight decay.
    WeightDecay,
    /// AdamW's betas and eps.
    AdamW,
    /// Maximum norm of the gradient.
    Clipping,
    /// The seed.
    Seed,
    /// Steps between evaluations.
    EvalEvery,
    /// Maximum number of evaluations without improvement.
    Patience,
    /// Examples to train on.
    Data,
    /// Examples to evaluate on.
    EvalData,
}

impl Setting {
    /// Every setting.
    pub const ALL: [Setting; 29] = [
        Setting::Architecture,
        Setting::Formats,
        Setting::Weights,
        Setting::Tokenizer,
        Setting::InitialAdapter,
        Setting::Rank,
        Setting::Alpha,
        Setting::Dropout,
        Setting::Targets,
        Setting::RsLora,
        Setting::Dora,
        Setting::Adapter,
        Setting::Steps,
        Setting::BatchSize,
        Setting::GradAccum,
        Setting::SeqLen,
        Setting::Packing,
        Setting::Shuffling,
        Setting::LearningRate,
        Setting::Schedule,
        Setting::WarmUp,
        Setting::WeightDecay,
        Setting::AdamW,
        Setting::Clipping,
        Setting::Seed,
        Setting::EvalEvery,
        Setting::Patience,
        Setting::Data,
        Setting::EvalData,
    ];

    /// The setting's name in checkpoints and messages.
    pub fn name(self) -> &'static str {
        match self {
            Setting::Architecture => "model",
            Setting::Formats => "model formats",
            Setting::Weights => "model weights of hash",
            Setting::Tokenizer => "tokenizer of hash",
            Setting::InitialAdapter => "initial adapter of hash",
            Setting::Rank => "rank",
            Setting::Alpha => "alpha",
            Setting::Dropout => "dropout",
            Setting::Targets => "targets",
            Setting::RsLora => "rsLoRA",
            Setting::Dora => "DoRA",
            Setting::Adapter => "adapter configuration",
            Setting::Steps => "steps",
            Setting::BatchSize => "batch size",
            Setting::GradAccum => "micro-batches",
            Setting::SeqLen => "sequence length",
            Setting::Packing => "packing",
            Setting::Shuffling => "shuffling",
            Setting::LearningRate => "learning rate",
            Setting::Schedule => "schedule",
            Setting::WarmUp => "warm-up",
            Setting::WeightDecay => "weight decay",
            Setting::AdamW => "betas and eps",
            Setting::Clipping => "clipping",
            Setting::Seed => "seed",
            Setting::EvalEvery => "steps between evaluations",
            Setting::Patience => "patience of early stopping",
            Setting::Data => "training data of hash",
            Setting::EvalData => "evaluation data of hash",
        }
    }

    /// The setting of this name, as in [`Error::OtherRun`](crate::Error::OtherRun).
    pub fn named(name: &str) -> Option<Setting> {
        Setting::ALL.into_iter().find(|setting| setting.name() == name)
    }
}

/// The parts of a run that determine its course.
pub(super) struct Made<'a> {
    pub base: &'a Fingerprint,
    pub tokenizer: Option<&'a str>,
    pub config: &'a PeftConfig,
    pub initial: Option<&'a PeftAdapter>,
    pub batches: &'a Batches,
    pub eval: &'a [Example],
    pub options: &'a RunOptions,
}

/// All settings of a run. Causes come before their effects: another tokenizer, for example,
/// changes the data.
pub(super) fn all(made: &Made<'_>) -> Vec<(Setting, Value)> {
    let Made { base, tokenizer, config, initial, batches, eval, options } = made;
    let (train, data) = (&options.train, batches.options());
    let (optimizer, schedule) = (&train.optimizer, &train.schedule);
    let mut adapter = config.json();
    // The base's path may change; its hash identifies it.
    ["base_model_name_or_path", "revision"].iter().for_each(|key| drop(adapter.shift_remove(*key)));
    let mut take = |key: &str| adapter.shift_remove(key).unwrap_or(Value::Null);
    let (rank, alpha, dropout) = (take("r"), take("lora_alpha"), take("lora_dropout"));
    let (targets, rslora, dora) = (take("target_modules"), take("use_rslora"), take("use_dora"));
    vec![
        (Setting::Architecture, json!(base.architecture)),
        (Setting::Formats, json!(base.formats)),
        (Setting::Weights, json!(base.tensors)),
        (Setting::Tokenizer, json!(tokenizer)),
        (Setting::InitialAdapter, json!(initial.map(adapter_hash))),
        (Setting::Rank, rank),
        (Setting::Alpha, alpha),
        (Setting::Dropout, dropout),
        (Setting::Targets, targets),
        (Setting::RsLora, rslora),
        (Setting::Dora, dora),
        (Setting::Adapter, adapter.into()),
        (Setting::Steps, json!(options.steps)),
        (Setting::BatchSize, json!(data.batch_size)),
        (Setting::GradAccum, json!(data.grad_accum)),
        (Setting::SeqLen, json!(data.seq_len)),
        (Setting::Packing, json!(data.packing)),
        (Setting::Shuffling, json!(data.shuffle)),
        (Setting::LearningRate, json!(optimizer.lr)),
        (Setting::Schedule, json!(format!("{:?}", schedule.decay).to_lowercase())),
        (Setting::WarmUp, json!(schedule.warmup)),
        (Setting::WeightDecay, json!(optimizer.weight_decay)),
        (Setting::AdamW, json!([optimizer.beta1, optimizer.beta2, optimizer.eps])),
        (Setting::Clipping, json!(train.max_norm)),
        (Setting::Seed, json!(train.seed)),
        (Setting::EvalEvery, json!(options.eval_every)),
        (Setting::Patience, json!(options.early_stop)),
        (Setting::Data, json!(format!("{:016x}", batches.fingerprint()))),
        (Setting::EvalData, json!((!eval.is_empty()).then(|| format!("{:016x}", examples_hash(eval))))),
    ]
}

/// Converts settings to their form in a checkpoint.
pub(super) fn map(settings: Vec<(Setting, Value)>) -> Map<String, Value> {
    settings.into_iter().map(|(setting, value)| (setting.name().to_owned(), value)).collect()
}

/// Returns the first setting that differs from a checkpoint: which one, the old value, and the new
/// one.
pub(super) fn difference(saved: &Map<String, Value>, now: &[(Setting, Value)]) -> Option<(Setting, String, String)> {
    let text = |value: &Value| match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    now.iter().find_map(|(setting, value)| {
        let before = saved.get(setting.name()).unwrap_or(&Value::Null);
        (before != value).then(|| (*setting, text(before), text(value)))
    })
}

fn examples_hash(examples: &[Example]) -> u64 {
    let example = |example: &Example| {
        let ids = example.ids().iter().map(|&id| u64::from(id));
        let labels = example.labels().map(|label| label as u64);
        ids.chain(labels).fold(example.ids().len() as u64, mix)
    };
    examples.iter().map(example).fold(examples.len() as u64, mix)
}

fn adapter_hash(adapter: &PeftAdapter) -> String {
    let bits = |values: &mut dyn Iterator<Item = &f32>| values.fold(0, |hash, value| mix(hash, value.to_bits().into()));
    let module = |(path, module): (&String, &PeftModule)| {
        let vectors = module.magnitude.iter().chain(&module.bias).flatten();
        let hash = bits(&mut module.a.iter().chain(&module.b).chain(vectors));
        format!("{path} {hash:x}\n")
    };
    text_hash(&adapter.modules.iter().map(module).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_settings_apart() {
        assert!(Setting::ALL.into_iter().all(|setting| Setting::named(setting.name()) == Some(setting)));
    }

    #[test]
    fn the_first_difference_is_named() {
        let lr = 9.426_684_551_178_853e-5_f64;
        let now = [(Setting::Rank, json!(4)), (Setting::LearningRate, json!(lr))];
        let saved = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        assert_eq!(difference(&map(now.to_vec()), &now), None);
        assert_eq!(difference(&saved(r#"{"rank":4,"learning rate":9.426684551178853e-05,"old":1}"#), &now), None);
        let next = [now[0].clone(), (Setting::LearningRate, json!(lr.next_up()))];
        let found = difference(&map(next.to_vec()), &now).unwrap();
        assert_eq!((found.0, found.2), (Setting::LearningRate, "0.00009426684551178853".into()));
        let found = difference(&saved(r#"{"learning rate":1}"#), &now).unwrap();
        assert_eq!(found, (Setting::Rank, "none".into(), "4".into()));
    }
}
