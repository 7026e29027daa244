//! `qlora bench --hardware`: all measurements of a GPU that the project collects, in one file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use jiff::{Timestamp, Unit};
use qlora_wgpu::device::{Device, DeviceInfo, devices};
use qlora_wgpu::error::{Error, Result};

use crate::measurements::parts::{HardwareReport, Part, Plan};
use crate::measurements::report::{Machine, write};
use crate::output::{self, print_json, print_line};
use crate::paths;

/// Options for a full report about a GPU.
#[derive(Args, Debug)]
#[command(next_help_heading = "Hardware report")]
pub(super) struct HardwareArgs {
    /// Check and time a GPU in full, in about ten minutes. Compares a layer's passes with the CPU
    /// and times them, in every tier that the GPU runs (or in QLORA_TIER's) and for 1 to 4096
    /// rows. Times and profiles training steps with the shapes of SmolLM2-135M and of a 7B model,
    /// and measures copy bandwidth. Each part is a process with its own time limit; if one fails,
    /// the file says so and the others continue.
    #[arg(long, conflicts_with_all = ["op", "m", "n", "k", "rank", "format", "double_quant", "plot", "json", "tokens", "hidden", "ffn",
        "layers", "heads", "kv_heads", "vocabulary", "checkpoint_activations", "profile", "copy"])]
    pub(super) hardware: bool,
    /// With --hardware: use tiny sizes, to try it out.
    #[arg(long, requires = "hardware")]
    quick: bool,
    /// With --hardware: a program that prints the GPU's peak rates, such as
    /// benches/peers/torch_ceilings.py, which uses torch.
    #[arg(long, value_name = "COMMAND", requires = "hardware")]
    ceilings: Option<String>,
    /// Only measure copy bandwidth, with buffers of this many MiB (fewer if memory is short). It
    /// limits whatever is bound by memory.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 16),
        conflicts_with_all = ["op", "against", "output", "plot"])]
    pub(super) copy: Option<u64>,
}

/// Rows of X in layer measurements.
const ROWS: [usize; 6] = [1, 8, 64, 512, 2048, 4096];
const LAYER: &str = "--double-quant --n 4096 --k 14336";
const LIMIT: Duration = Duration::from_secs(300);

/// Shape of Llama 2 7B, with 8 of its 32 layers.
const STEP_7B: &str = "--hidden 4096 --ffn 11008 --layers 8 --heads 32 --kv-heads 32 --vocabulary 32000 --tokens 2048";
const STEP_LIMIT: Duration = Duration::from_secs(900);

/// Sizes with --quick.
const QUICK_ROWS: [usize; 2] = [1, 16];
const QUICK_LAYER: &str = "--double-quant --n 96 --k 64";
const QUICK_SMOLLM2: &str = "--hidden 72 --ffn 96 --layers 2 --heads 9 --kv-heads 3 --vocabulary 64 --tokens 16";
const QUICK_7B: &str = "--hidden 64 --ffn 96 --layers 1 --heads 2 --kv-heads 2 --vocabulary 64 --tokens 16";

/// Measures the GPU that `device` names and writes the report to `file`. If that is a folder, the
/// file in it is named after the GPU. By default it is in the current folder.
pub(super) fn run(args: &HardwareArgs, device: &str, against: &[String], file: Option<&Path>) -> Result<()> {
    let info = described(device)?;
    let card = format!("{}.json", slug(&info.name));
    let path = match file {
        Some(folder) if folder.is_dir() => folder.join(card),
        Some(file) => file.to_owned(),
        None => PathBuf::from(card),
    };
    paths::check([path.as_path()], &[])?;
    let now = Timestamp::now();
    let mut report = HardwareReport {
        version: env!("CARGO_PKG_VERSION"),
        date: now.round(Unit::Second).unwrap_or(now).to_string(),
        machine: Machine::this(),
        device: info,
        quick: args.quick,
        parts: Vec::new(),
    };
    let plans = plans(args, &report.device, against)?;
    if args.ceilings.is_none() {
        let why = "no program given; set one with --ceilings";
        output::progress(format_args!("ceilings: skipped, {why}"));
        report.parts.push(Part::skipped("ceilings", why));
    }
    for (at, plan) in plans.iter().enumerate() {
        let mut part = plan.run();
        if part.error.as_ref().is_some_and(|error| error.contains("time of each kernel")) {
            // The GPU has no timestamps to profile with.
            let command = plan.command.iter().filter(|word| *word != "--profile").cloned().collect();
            part = Plan { command, ..plan.clone() }.run();
        }
        let how = match (&part.error, part.agrees) {
            (Some(error), _) => error.as_str(),
            (None, Some(false)) => "done; DIFFERS FROM THE CPU",
            (None, _) => "done",
        };
        let (title, seconds, count) = (part.title(), part.seconds, plans.len());
        output::progress(format_args!("{} of {count}: {title}: {how}, {seconds:.1} s", at + 1));
        report.parts.push(part);
        // Written after each part, because the next may crash the machine.
        write(&path, &report)?;
    }
    print_line(&report.markdown())?;
    print_line(&format!(
        "To share these figures with the project, add {} to benches/results in a pull request, or attach it to an issue.",
        path.display()
    ))?;
    report.verdict()
}

/// Measures copies of `mib` MiB and prints the rates.
pub(super) fn copy(device: &Device, mib: u64, json: bool) -> Result<()> {
    let rates = qlora_wgpu::internal::bench::copy::measure_copy(device, mib << 20)?;
    if json {
        return print_json(&rates);
    }
    print_line(&format!(
        "{}: copies of {} MiB, bytes read plus bytes written: {:.1} GB/s from buffer to buffer, {:.1} GB/s by a kernel",
        device.name(),
        rates.bytes >> 20,
        rates.buffer_gb_per_s,
        rates.kernel_gb_per_s,
    ))
}

/// Returns the selected device as `qlora devices` lists it.
fn described(name: &str) -> Result<DeviceInfo> {
    let device = Device::named(name)?;
    let found = devices().into_iter().find(|info| info.index > 0 && info.name == device.name());
    found.ok_or_else(|| {
        Error::invalid("bench", "--device", device.name(), "--hardware is for GPUs; `qlora devices` lists them")
    })
}

/// Lists the measurements in order: those that may find errors come before those that take long.
fn plans(args: &HardwareArgs, info: &DeviceInfo, against: &[String]) -> Result<Vec<Plan>> {
    let program = std::env::current_exe().map_err(|error| Error::io("qlora", error))?;
    let index = info.index.to_string();
    let qlora = |options: &str, more: &[&str]| {
        let words =
            ["bench", "--json", "--device", &index].into_iter().chain(options.split(' ')).chain(more.iter().copied());
        std::iter::once(program.to_string_lossy().into_owned()).chain(words.map(str::to_owned)).collect::<Vec<_>>()
    };
    let plan = |name, tier: Option<&String>, m, command, limit| Plan { name, tier: tier.cloned(), m, command, limit };
    let mut plans =
        vec![plan("copy", None, None, qlora(if args.quick { "--copy 1" } else { "--copy 512" }, &[]), LIMIT)];
    if let Some(command) = &args.ceilings {
        plans.push(plan("ceilings", None, None, command.split_whitespace().map(str::to_owned).collect(), LIMIT));
    }
    let forced = std::env::var("QLORA_TIER").ok().filter(|tier| !tier.is_empty());
    let is_meant = |tier: &&String| match &forced {
        Some(forced) => *tier == forced,
        // Software drivers alone use this tier, unless it is forced on another device to try it.
        None => *tier != "software" || info.kind == "software",
    };
    let tiers: Vec<&String> = info.tiers.iter().filter(is_meant).collect();
    // The tiers whose speed matters: the default one, and cooperative matrices.
    let fast = |tier: &&&String| forced.is_some() || **tier == &info.tier || **tier == "cooperative-matrix";
    let peers: Vec<&str> = against.iter().flat_map(|command| ["--against", command.as_str()]).collect();
    let (rows, layer) = if args.quick { (&QUICK_ROWS[..], QUICK_LAYER) } else { (&ROWS[..], LAYER) };
    for tier in &tiers {
        let peers = if fast(&tier) { &peers[..] } else { &[] };
        for &m in rows {
            let command = qlora(&format!("--op forward,backward {layer} --m {m}"), peers);
            plans.push(plan("layer", Some(tier), Some(m), command, LIMIT));
        }
    }
    // The options default to SmolLM2-135M's shape.
    let smollm2 = if args.quick { format!(" {QUICK_SMOLLM2}") } else { String::new() };
    let steps = [("smollm2-step", smollm2), ("7b-step", format!(" {}", if args.quick { QUICK_7B } else { STEP_7B }))];
    for (name, shape) in steps {
        for tier in tiers.iter().filter(fast) {
            let command = qlora(&format!("--op step --double-quant --profile{shape}"), &peers);
            plans.push(plan(name, Some(tier), None, command, STEP_LIMIT));
        }
    }
    Ok(plans)
}

/// Makes "nvidia-h100-80gb-hbm3" from "NVIDIA H100 80GB HBM3 (vulkan)".
fn slug(name: &str) -> String {
    let name = name.split(" (").next().unwrap_or_default().to_lowercase();
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::slug;

    #[test]
    fn files_are_named_after_the_gpu() {
        assert_eq!(slug("NVIDIA H100 80GB HBM3 (vulkan)"), "nvidia-h100-80gb-hbm3");
        assert_eq!(slug("AMD Radeon RX 7900 XTX (RADV NAVI31) (vulkan)"), "amd-radeon-rx-7900-xtx");
        assert_eq!(slug("Apple M1 (metal)"), "apple-m1");
    }
}
