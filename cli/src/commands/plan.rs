//! `qlora plan`: predicts whether a training run fits into memory.

use bytesize::ByteSize;
use clap::Args;
use qlora_wgpu::error::Result;
use qlora_wgpu::train::plan::{MEMORY_PERCENT, Moment, Parts, Plan};
use serde::Serialize;

use crate::output::{print_json, print_line, table};
use crate::prepare::Prepared;
use crate::training::RunArgs;

/// Estimates the memory of a training run from the model's file headers, and whether it fits.
///
/// Simulates two steps and counts what they allocate. Exits with status 1 if the run doesn't fit.
#[derive(Args, Debug)]
#[command(override_usage = "qlora plan --model PATH|ID [OPTIONS of qlora finetune]")]
#[command(after_help = "Examples:\n  \
    qlora plan --model model.gguf\n  \
    qlora plan --model DIR --rank 64 --batch-size 4 --seq-len 1024 --checkpoint-activations\n  \
    qlora plan --model DIR --memory 8GiB --json")]
pub struct PlanArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Print JSON: device, memory_bytes, fits, batches, the bytes of each part (most, at_peak),
    /// moment, peak_bytes, held_bytes.
    #[arg(long, help_heading = None)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    device: String,
    /// `None` if unknown.
    memory_bytes: Option<u64>,
    /// Whether the run holds at most 90 % of it; `None` if unknown.
    fits: Option<bool>,
    #[serde(flatten)]
    plan: Plan,
}

pub fn run(args: &PlanArgs) -> Result<()> {
    let prepared = args.run.prepare()?;
    let Prepared { device, plan, .. } = &prepared;
    let training = &args.run.training;
    let memory = training.memory(device);
    let fits = memory.map(|memory| plan.fits(memory));
    let report = Report { device: device.name().to_owned(), memory_bytes: memory, fits, plan: *plan };
    if args.json {
        print_json(&report)?;
    } else {
        print_line(&report.describe(training.batch_size.is_none()))?;
    }
    args.run.check_memory(&prepared, false)
}

impl Report {
    fn describe(&self, chosen: bool) -> String {
        let Plan { batches, most, at_peak, moment, peak_bytes, held_bytes } = self.plan;
        let parts = |parts: Parts| {
            [parts.base, parts.adapters, parts.gradients, parts.optimizer, parts.activations, parts.logits]
        };
        let size = |bytes: u64| ByteSize(bytes).to_string();
        let names = ["base", "adapters", "gradients", "optimizer", "activations", "logits"];
        let both = parts(most).into_iter().zip(parts(at_peak));
        let mut rows: Vec<[String; 3]> =
            names.iter().zip(both).map(|(name, (most, then))| [(*name).to_owned(), size(most), size(then)]).collect();
        rows.push(["peak".into(), String::new(), size(peak_bytes)]);
        rows.push(["held, with what is kept for reuse".into(), String::new(), size(held_bytes)]);
        let rows = table(["", "at most", moment_heading(moment)], 1, rows);
        let by_default = if chosen && self.fits == Some(true) { " (the most that fit, of 1, 2, 4, 8)" } else { "" };
        let step = format!(
            "{} micro-batch{} of {} x {} tokens{by_default}",
            batches.count,
            if batches.count == 1 { "" } else { "es" },
            batches.rows,
            batches.tokens
        );
        format!("{}: {step}\n{rows}\n{}", self.device, self.verdict())
    }

    fn verdict(&self) -> String {
        let of = |memory: u64| format!("{MEMORY_PERCENT} % of {}", ByteSize(memory));
        match (self.memory_bytes, self.fits) {
            (Some(memory), Some(true)) => format!("It fits: within {}.", of(memory)),
            (Some(memory), _) => format!("It does not fit: it holds more than {}.", of(memory)),
            (None, _) => "The device's memory is unknown; set it with --memory SIZE, such as --memory 8GiB".into(),
        }
    }
}

fn moment_heading(moment: Moment) -> &'static str {
    match moment {
        Moment::Loaded => "when loaded",
        Moment::Forward => "at the peak, forward",
        Moment::Loss => "at the peak, the loss",
        Moment::Backward => "at the peak, backward",
        Moment::Update => "at the peak, the update",
    }
}
