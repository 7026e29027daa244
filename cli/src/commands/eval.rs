//! `qlora eval`: loss and perplexity of a model on given data.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::eval::{Evaluation, PASS_TOKENS, evaluate};
use qlora_wgpu::internal::safetensors::{OutData, OutTensor, TensorType, write};
use qlora_wgpu::nn::{Decoder, Tokens};
use qlora_wgpu::train::data::{Dataset, Example};

use crate::dataset::{check, read};
use crate::model::{AdaptedArgs, With, label, print_all, switch};
use crate::output::{self, print_line};
use crate::paths;

/// Measures mean loss and perplexity over the tokens that carry loss.
///
/// Data is plain text, or JSON objects (one per line, or in a list) with {"prompt", "completion"},
/// {"messages"}, {"conversations"}, {"text"}, {"instruction", "input", "output"} or {"input_ids",
/// "labels"}. Labels are as in Hugging Face, -100 for none, and need no tokenizer.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora eval --model model.gguf --data text.txt\n  \
    qlora eval --model DIR --adapter ADAPTER --data test.jsonl --json\n  \
    qlora eval --model DIR --adapter old=DIR1 --adapter new=DIR2 --use old --use new --data test.jsonl")]
pub struct EvalArgs {
    #[command(flatten)]
    model: AdaptedArgs,
    /// Evaluation data: JSON Lines, a JSON list, comma- or tab-separated values, or plain text; -
    /// for standard input.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    data: PathBuf,
    /// Skip lines that can't be read, and count them.
    #[arg(long)]
    skip_bad_lines: bool,
    /// Also write `input_ids` and f32 `logits` [rows, length, vocabulary] as safetensors; all
    /// sequences must have the same length.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    dump_logits: Option<PathBuf>,
    /// Print JSON: adapter, loss, perplexity, tokens; an array of these with several --use.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &EvalArgs) -> Result<()> {
    check([args.data.as_path()])?;
    let files = args.model.model.open()?;
    if let Some(logits) = &args.dump_logits {
        let adapters = args.model.adapters().into_iter().map(|(_, path)| (path, "an adapter"));
        let inputs: Vec<_> =
            [(&*args.data, "the data"), (files.path(), "the model")].into_iter().chain(adapters).collect();
        paths::check([logits.as_path()], &inputs)?;
    }
    let (mut model, uses) = args.model.load(&files)?;
    let vocabulary = model.config().vocab_size;
    let tokenizer = files.tokenizer();
    let data = read(&args.data, tokenizer.as_ref(), args.skip_bad_lines, vocabulary)?;
    if args.dump_logits.is_some() && uses.len() > 1 {
        let got = format!("{} times", uses.len());
        let expected = "--dump-logits writes the logits of one adapter";
        return Err(Error::invalid("dumping logits", "--use", got, expected));
    }
    let mut found = Vec::with_capacity(uses.len());
    for adapter in uses {
        switch(&mut model, adapter)?;
        if let Some(path) = &args.dump_logits {
            dump_logits(&model, &data.examples, path)?;
        }
        found.push(With::new(adapter, evaluated(args, &model, &data)?));
    }
    if args.json {
        return print_all(&found);
    }
    let several = found.len() > 1;
    found.iter().try_for_each(|With { adapter, result }| {
        let name = if several { format!("{}: ", label(*adapter)) } else { String::new() };
        let Evaluation { loss, perplexity, tokens } = result;
        print_line(&format!("{name}loss {loss:.6}, perplexity {perplexity:.4}, {tokens} tokens"))
    })
}

/// Evaluates the data with the active adapter.
fn evaluated(args: &EvalArgs, model: &Decoder, data: &Dataset) -> Result<Evaluation> {
    let bar = output::bar(data.examples.len(), "{wide_bar} {pos}/{len} sequences, {eta} left");
    // A text longer than the model's positions is evaluated in pieces, each without what came
    // before.
    let most = model.config().max_position_embeddings;
    let pieces = data.examples.iter().flat_map(|example| example.pieces(most));
    let found =
        evaluate(model, pieces, PASS_TOKENS, |done| bar.set_position(done as u64)).map_err(|error| match error {
            // A loss that isn't finite is the model's fault, not the data's.
            Error::Invalid { what, .. } if what != "the loss" => {
                Error::File { path: args.data.clone(), message: error.to_string() }
            }
            error => error,
        });
    bar.finish_and_clear();
    found
}

fn dump_logits(model: &Decoder, examples: &[Example], path: &std::path::Path) -> Result<()> {
    let length = examples.first().map_or(0, |example| example.ids().len());
    if let Some(other) = examples.iter().find(|example| example.ids().len() != length) {
        return Err(Error::invalid(
            "dumping logits",
            "the length of a sequence",
            other.ids().len(),
            format!("the first sequence has {length} tokens, and all must have the same length"),
        ));
    }
    let (mut ids, mut logits) = (Vec::new(), Vec::new());
    for example in examples {
        let batch = model.batch(&Tokens::new(example.ids().to_vec(), 1)?, None)?;
        logits.extend_from_slice(bytemuck::cast_slice(&model.logits(&batch)?.to_vec()?));
        ids.extend(example.ids().iter().flat_map(|&id| i64::from(id).to_le_bytes()));
    }
    let shape = vec![examples.len(), length];
    let tensor = |name: &str, dtype, shape, bytes: Vec<u8>| OutTensor {
        name: name.to_owned(),
        dtype,
        shape,
        data: OutData::Bytes(bytes.into()),
    };
    let logits_shape = [&shape[..], &[model.config().vocab_size]].concat();
    let tensors =
        vec![tensor("input_ids", TensorType::I64, shape, ids), tensor("logits", TensorType::F32, logits_shape, logits)];
    write(path, tensors, Default::default())
}
