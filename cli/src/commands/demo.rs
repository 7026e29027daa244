//! `qlora demo`: a small model learns the style of The Devil's Dictionary, in about a minute.

use std::fs;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueHint};
use qlora_wgpu::ModelFiles;
use qlora_wgpu::device::Device;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::PeftConfig;
use qlora_wgpu::generate::{Sampler, Sampling, generate};
use qlora_wgpu::nn::Decoder;
use qlora_wgpu::optim::{AdamW, Decay, Schedule};
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::train::TrainOptions;
use qlora_wgpu::train::batches::{BatchOptions, Batches};
use qlora_wgpu::train::data::{DataOptions, Dataset};
use qlora_wgpu::train::run::{Run, RunData, RunFolder, RunOptions};
use serde::Serialize;

use crate::model::ModelArgs;
use crate::output::{self, print_json, print_line};
use crate::{bundled, paths, progress};

/// Trains an adapter on definitions from The Devil's Dictionary and shows what changed.
///
/// Uses a small bundled model, or any other. The folder gets the model, the text, and in `adapter`
/// what `qlora finetune` writes: the PEFT adapter, metrics.jsonl, loss.svg and loss.png.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora demo\n  \
    qlora demo --model model.gguf --output my-demo")]
pub struct DemoArgs {
    /// Another model: a Hugging Face directory, a .gguf file, or an id on the hub.
    #[arg(long, value_name = "PATH|ID", value_hint = ValueHint::AnyPath)]
    model: Option<PathBuf>,
    /// Output folder. Default: the first of qlora-demo, qlora-demo-2, ... that doesn't exist.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    output: Option<PathBuf>,
    /// cpu, gpu (any GPU driver), best, an index from `qlora devices`, or part of a name or
    /// backend.
    #[arg(long, default_value = "best")]
    device: String,
    /// Number of updates. Default: 100 for the bundled model, 30 for another.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Print JSON: device, model, output, steps, seconds, eval_loss_before, eval_loss, definitions
    /// (word, before, after).
    #[arg(long)]
    json: bool,
}

/// Result of a demo.
#[derive(Serialize)]
struct Report<'a> {
    device: &'a str,
    model: String,
    /// Folder with the adapter.
    output: &'a Path,
    steps: u32,
    seconds: f64,
    /// Loss on definitions that it wasn't trained on.
    eval_loss_before: Option<f64>,
    eval_loss: Option<f64>,
    definitions: Vec<Definition>,
}

/// A word's definition without and with the adapter.
#[derive(Serialize)]
struct Definition {
    word: &'static str,
    before: String,
    after: String,
}

/// Words to define. None is in the training text.
const WORDS: [&str; 4] = ["auctioneer, n.", "language, n.", "hearse, n.", "oath, n."];
/// Maximum tokens in a definition.
const LENGTH: usize = 40;
/// Sampling, because a small model's likeliest definition is the same for many words.
const SAMPLING: Sampling = Sampling { temperature: 0.7, top_k: 0, top_p: 0.9, seed: 2 };

const RANK: usize = 16;
const BATCH_SIZE: usize = 8;
/// Maximum tokens in an example; few are longer.
const SEQ_LEN: usize = 256;

pub fn run(args: &DemoArgs) -> Result<()> {
    // Checked before the folder is made: these fail on mistyped arguments.
    let device = Device::named(&args.device)?;
    let typed = args.model.clone().map(ModelArgs::of);
    let found = typed.as_ref().map(ModelArgs::open).transpose()?;
    let output = args.output.as_ref().map_or_else(fresh, |path| create(path).map(|()| path.clone()))?;
    if let Some(model) = &found {
        let texts = [bundled::TRAIN, bundled::VALID].map(|name| output.join(name));
        paths::check(texts.iter().map(PathBuf::as_path), &[(model.path(), "the model")])?;
    }
    let (files, steps, lr) = match found {
        Some(files) => (files, 30, 5e-4),
        None => (ModelFiles::open(bundled::write_model(&output)?)?, 100, 2e-3),
    };
    let steps = args.steps.unwrap_or(steps);
    bundled::write_texts(&output)?;

    let source = typed.unwrap_or_else(|| ModelArgs::of(files.path().into()));
    let mut model = files.load(&device, &BaseFormat::Quantize(QuantOptions::nf4().double_quant()))?;
    let tokenizer = files.tokenizer()?;
    let read = |name: &str| Dataset::read(output.join(name), Ok(&tokenizer), &DataOptions::default());
    let seq_len = SEQ_LEN.min(model.config().max_position_embeddings);
    let options = BatchOptions { batch_size: BATCH_SIZE, seq_len, packing: false, ..BatchOptions::default() };
    let batches = Batches::new(read(bundled::TRAIN)?, options)?;
    let eval = read(bundled::VALID)?.examples;
    let introduction = format!(
        "device:  {}\n\
         model:   {}, with frozen 4-bit linear layers\n\
         adapter: LoRA with rank {RANK} on all of them\n\
         text:    {} definitions from The Devil's Dictionary, and {} others for evaluation\n",
        device.name(),
        source.name(),
        batches.examples(),
        eval.len(),
    );
    if !args.json {
        output::summary(introduction)?;
    }

    let define_all =
        |model: &Decoder| -> Result<Vec<String>> { WORDS.iter().map(|word| define(model, &tokenizer, word)).collect() };
    let before = define_all(&model)?;
    let train = TrainOptions {
        optimizer: AdamW { lr, weight_decay: 0.0, ..AdamW::default() },
        schedule: Schedule { decay: Decay::Cosine, warmup: steps / 20, total: steps },
        max_norm: Some(1.0),
        checkpoint_activations: false,
        seed: 0,
    };
    let options = RunOptions { train, steps, eval_every: steps.div_ceil(5), early_stop: None, save_every: 0, keep: 1 };
    let config =
        PeftConfig { base_model_name_or_path: Some(source.name()), ..PeftConfig::new(RANK, 2.0 * RANK as f32) };
    let adapter = output.join("adapter");
    let start = Instant::now();
    let data = RunData { batches, eval, tokenizer: Some(tokenizer.fingerprint()?) };
    let mut run = Run::start(&mut model, config, None, data, options, RunFolder::claim(&adapter)?)?;
    let (_, records) = progress::train(&mut run, steps, &adapter, || false)?;
    let seconds = start.elapsed().as_secs_f64();

    let mut losses = records.iter().filter_map(|record| record.eval_loss);
    let both = WORDS.into_iter().zip(before).zip(define_all(&model)?);
    let report = Report {
        device: device.name(),
        model: source.name(),
        output: &adapter,
        steps,
        seconds,
        eval_loss_before: losses.next(),
        eval_loss: losses.next_back(),
        definitions: both.map(|((word, before), after)| Definition { word, before, after }).collect(),
    };
    if args.json {
        return print_json(&report);
    }
    if let (Some(first), Some(last)) = (report.eval_loss_before, report.eval_loss) {
        print_line(&format!(
            "{steps} steps in {seconds:.0} s; loss on definitions it wasn't trained on: {first:.3} before, {last:.3} after\n",
        ))?;
    }
    for Definition { word, before, after } in &report.definitions {
        print_line(&format!("{word}\n  before: {before}\n  after:  {after}"))?;
    }
    // The program's name as it can be typed here, installed or not.
    let program = std::env::args().next().unwrap_or_else(|| "qlora".into());
    let (plot, folder) = (adapter.join("loss.png"), adapter.clone());
    let [program, name, adapter, data] =
        [program, source.name(), adapter.display().to_string(), output.join(bundled::TRAIN).display().to_string()]
            .map(output::quoted);
    let Sampling { temperature, top_p, seed, .. } = SAMPLING;
    output::summary(format!(
        "\nloss plot: {}\n\
         adapter:   {}\n\n\
         next, try another word or a model of your own:\n  \
         {program} generate --model {name} --adapter {adapter} --temperature {temperature} --top-p {top_p} --seed {seed} \
         --prompt $'Define: opera, n.\\n'\n  \
         {program} finetune --model Qwen/Qwen2.5-0.5B --data {data} --output my-adapter",
        plot.display(),
        folder.display(),
    ))
}

/// Generates a definition as one line.
fn define(model: &Decoder, tokenizer: &Tokenizer, word: &str) -> Result<String> {
    let prompt = tokenizer.encode(&format!("Define: {word}\n"), true)?;
    let mut sampler = Sampler::new(SAMPLING)?;
    let tokens = generate(model, &prompt, LENGTH, &mut sampler, tokenizer.eos_ids(), |_| ControlFlow::Continue(()))?;
    let text = tokenizer.decode(&tokens, true)?;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(if tokens.len() == LENGTH { format!("{line} ...") } else { line })
}

fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::io(path, e))
}

/// Makes a folder with an unused name.
fn fresh() -> Result<PathBuf> {
    const NAME: &str = "qlora-demo";
    let mut path = PathBuf::from(NAME);
    for number in 2.. {
        match fs::create_dir(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => path = format!("{NAME}-{number}").into(),
            Err(error) => return Err(Error::io(&path, error)),
            Ok(()) => break,
        }
    }
    Ok(path)
}
