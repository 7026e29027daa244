//! Fine-tunes the bundled model on the bundled text, like `qlora finetune`, and saves the adapter
//! for PEFT.
//!
//! `cargo run --example finetune`

use std::ops::ControlFlow;
use std::path::Path;

use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::{PeftAdapter, PeftConfig};
use qlora_wgpu::optim::{AdamW, Decay, Schedule};
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::train::TrainOptions;
use qlora_wgpu::train::batches::{BatchOptions, Batches};
use qlora_wgpu::train::data::{DataOptions, Dataset};
use qlora_wgpu::train::run::{Event, Run, RunData, RunFolder, RunOptions};
use qlora_wgpu::{Device, ModelFiles};

const STEPS: u32 = 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("cli/assets");
    let base = assets.join("tiny-glossary");
    let output = tempfile::tempdir()?; // use your own folder to keep the result

    let mut model = ModelFiles::open(&base)?.load(&Device::best()?, &BaseFormat::AsIs)?; // already 4-bit in the file
    let tokenizer = Tokenizer::from_dir(&base)?;
    let read = |name: &str| Dataset::read(assets.join(name), Ok(&tokenizer), &DataOptions::default());
    let batch_options = BatchOptions { batch_size: 4, seq_len: 128, ..BatchOptions::default() };
    let batches = Batches::new(read("devil_train.jsonl")?, batch_options)?;
    let eval = read("devil_valid.jsonl")?.examples;

    let train = TrainOptions {
        optimizer: AdamW { lr: 2e-3, weight_decay: 0.0, ..AdamW::default() },
        schedule: Schedule { decay: Decay::Cosine, warmup: 2, total: STEPS },
        max_norm: Some(1.0),
        checkpoint_activations: false,
        seed: 0,
    };
    let options = RunOptions { train, steps: STEPS, eval_every: 0, early_stop: None, save_every: 0, keep: 1 };
    let config = PeftConfig::new(16, 32.0); // rank, alpha; all linear layers
    let data = RunData { batches, eval, tokenizer: Some(tokenizer.fingerprint()?) };
    // Run::resume with the same arguments continues from the newest checkpoint in the folder.
    let mut run = Run::start(&mut model, config, None, data, options, RunFolder::claim(output.path())?)?;

    let mut eval_losses = Vec::new();
    run.train(|event| {
        if let Event::Step(record) = event {
            eval_losses.extend(record.eval_loss);
            println!("step {:2}  loss {:.4?}  evaluation {:.4?}", record.step, record.loss, record.eval_loss);
        }
        ControlFlow::Continue(()) // or Break, to stop here and resume later
    })?;

    let adapter = PeftAdapter::read(output.path())?; // like PEFT does
    println!("evaluation loss {eval_losses:.4?}, {} adapted layers", adapter.modules.len());
    assert!(eval_losses[1] < eval_losses[0] - 0.05, "{eval_losses:?}");
    Ok(())
}
