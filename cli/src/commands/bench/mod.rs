//! `qlora bench`: times a layer's passes and training steps, and checks results against the CPU.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

mod hardware;

use crate::measurements::Measured;
use crate::measurements::peer::Peer;
use crate::measurements::report::{Machine, Report, write};
use crate::output::{print_json, print_line, table};
use crate::paths;
use crate::plot::speed;
use hardware::HardwareArgs;
use qlora_wgpu::device::Device;
use qlora_wgpu::error::Result;
use qlora_wgpu::internal::bench::Row;
use qlora_wgpu::internal::bench::kernel_times::KernelTimes;
use qlora_wgpu::internal::bench::layer::{self, Case, measure};
use qlora_wgpu::internal::bench::step::{StepCase, StepShape, measure_step};
use qlora_wgpu::quant::{Format, QuantOptions};

/// Times the fused QLoRA layer, or a whole training step, on a device, and checks the result
/// against the CPU.
///
/// Layer times on a GPU come from timestamp queries if it has them, otherwise from submission to
/// completion. Step times are wall-clock.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora bench --device best --m 1,64 --n 4096 --k 4096 --double-quant --json\n  \
    qlora bench --op forward,backward --m 1,512 --against target/peers/bitsandbytes --output cpu.json --plot cpu.png\n  \
    qlora bench --hardware --output results")]
pub struct BenchArgs {
    /// cpu, gpu (any GPU driver), best, an index from `qlora devices`, or part of a name or
    /// backend.
    #[arg(long, default_value = "best")]
    device: String,
    /// What to time.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Op::Forward])]
    op: Vec<Op>,
    /// Rows of X (tokens).
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64, 512], value_parser = size)]
    m: Vec<usize>,
    /// Rows of the weight (output features).
    #[arg(long, value_delimiter = ',', default_values_t = [4096], value_parser = size)]
    n: Vec<usize>,
    /// Columns of the weight (input features).
    #[arg(long, value_delimiter = ',', default_values_t = [4096, 14336], value_parser = size)]
    k: Vec<usize>,
    /// Rank of the adapter; 0: no adapter (a step needs one).
    #[arg(long, default_value_t = 16, value_parser = rank)]
    rank: usize,
    /// 4-bit format: nf4, fp4 or int4.
    #[arg(long, default_value_t = Format::Nf4)]
    format: Format,
    /// Quantize the scales too.
    #[arg(long)]
    double_quant: bool,
    /// Also time each case with this program, right after ours; may be repeated. benches/peers has
    /// programs for bitsandbytes with PEFT and for llama.cpp; scripts/peers.sh sets them up.
    #[arg(long, value_name = "COMMAND")]
    against: Vec<String>,
    /// Also write a JSON file: version, date, machine (cpu, cores, memory_bytes, os, load),
    /// device, driver, and the rows of --json. With --hardware: version, date, machine, device (as
    /// in `qlora devices --json`), quick and parts; FILE may then be a directory.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Also plot the times, including those of --against, as SVG or PNG by the file's extension.
    #[arg(long, value_name = "FILE", value_parser = speed::path)]
    plot: Option<PathBuf>,
    /// Run each case once more and show the time per kernel and the share outside kernels. For a
    /// single layer that is mostly host time, which the table leaves out. Needs a GPU with
    /// timestamp queries.
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    step: StepArgs,
    #[command(flatten)]
    hardware: HardwareArgs,
    /// Print JSON, an object per case: op, device (cpu or gpu), adapter (the device's name), tier,
    /// format, double_quant, m, n, k, rank, ms_min, ms_median, gflops, weight_gb_per_s,
    /// max_rel_err_vs_cpu. A step also has tokens_per_second, peak_bytes and its shape. --profile
    /// adds profile: ms, outside_kernels (a share), kernels. --against adds peers: name, and
    /// ms_min, ms_median, ratio (peer time / ours) or skipped.
    #[arg(long, help_heading = None)]
    json: bool,
}

/// Shape of the decoder for `--op step`. Defaults are SmolLM2-135M's.
#[derive(Args, Debug)]
#[command(next_help_heading = "Options for --op step")]
struct StepArgs {
    /// Tokens in the sequence.
    #[arg(long, default_value_t = 256, value_parser = size)]
    tokens: usize,
    /// Width of hidden states.
    #[arg(long, default_value_t = 576, value_parser = size)]
    hidden: usize,
    /// Width of the feed-forward layer.
    #[arg(long, default_value_t = 1536, value_parser = size)]
    ffn: usize,
    /// Number of decoder layers.
    #[arg(long, default_value_t = 30, value_parser = size)]
    layers: usize,
    /// Number of query heads.
    #[arg(long, default_value_t = 9, value_parser = size)]
    heads: usize,
    /// Number of key and value heads.
    #[arg(long, default_value_t = 3, value_parser = size)]
    kv_heads: usize,
    /// Rows of the embedding, which is also the head.
    #[arg(long, default_value_t = 49152, value_parser = size)]
    vocabulary: usize,
    /// Save memory by keeping only each layer's input and recomputing the layer in the backward
    /// pass.
    #[arg(long)]
    checkpoint_activations: bool,
}

impl StepArgs {
    fn shape(&self) -> StepShape {
        let &StepArgs { tokens, hidden, ffn, layers, heads, kv_heads, vocabulary, checkpoint_activations, .. } = self;
        StepShape { hidden, ffn, layers, heads, kv_heads, vocabulary, tokens, checkpoint_activations }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// Forward pass of a layer: Y = X * deq(W)^T + s * (X * A^T) * B^T.
    Forward,
    /// Backward pass of the same layer: dX, dA and dB from dY.
    Backward,
    /// Forward pass, backward pass and update of a decoder.
    Step,
}

/// Maximum size of a dimension. No model has more, and a product of two can't overflow.
const MAX_SIZE: usize = 1 << 20;

/// Parses a size of at least 1.
fn size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size @ 1..=MAX_SIZE) => Ok(size),
        _ => Err(format!("must be a whole number in 1..={MAX_SIZE}")),
    }
}

/// Parses a size that may be 0.
fn rank(text: &str) -> Result<usize, String> {
    if text == "0" { Ok(0) } else { size(text) }
}

pub fn run(args: &BenchArgs) -> Result<()> {
    if args.hardware.hardware {
        return hardware::run(&args.hardware, &args.device, &args.against, args.output.as_deref());
    }
    if let Some(mib) = args.hardware.copy {
        return hardware::copy(&Device::named(&args.device)?, mib, args.json);
    }
    paths::check([&args.output, &args.plot].into_iter().filter_map(|path| path.as_deref()), &[])?;
    if let (Some(output), Some(plot)) = (&args.output, &args.plot) {
        paths::check_apart(plot, (output, "--output"))?;
    }
    let machine = Machine::this();
    let device = Device::named(&args.device)?;
    let quant = QuantOptions { format: args.format, ..QuantOptions::default() };
    let quant = if args.double_quant { quant.double_quant() } else { quant };
    let mut peers = args.against.iter().map(|command| Peer::start(command)).collect::<Result<Vec<_>>>()?;
    let mut compare = |row: Row| {
        let peers = peers.iter_mut().map(|peer| peer.measure(&row)).collect::<Result<_>>()?;
        Ok(Measured { row, peers })
    };
    let mut rows = Vec::new();
    for op in &args.op {
        match op {
            Op::Forward => rows.extend(layers(args, layer::Op::Forward, quant, &device, &mut compare)?),
            Op::Backward => rows.extend(layers(args, layer::Op::Backward, quant, &device, &mut compare)?),
            Op::Step => {
                let case = StepCase { shape: args.step.shape(), rank: args.rank, quant, profile: args.profile };
                rows.push(compare(measure_step(&case, &device)?)?);
            }
        }
    }
    if args.json { print_json(&rows) } else { print_line(&describe(&rows)) }?;
    let report = Report::new(machine, &device, rows);
    if let Some(path) = &args.output {
        write(path, &report)?;
    }
    args.plot.as_ref().map_or(Ok(()), |path| speed::write(path, &report))
}

/// Measures the layer for every combination of sizes.
fn layers(
    args: &BenchArgs,
    op: layer::Op,
    quant: QuantOptions,
    device: &Device,
    compare: &mut impl FnMut(Row) -> Result<Measured>,
) -> Result<Vec<Measured>> {
    let mut rows = Vec::new();
    for &n in &args.n {
        for &k in &args.k {
            for &m in &args.m {
                let operands = Case { op, m, n, k, rank: args.rank, quant }.operands()?;
                rows.push(compare(measure(&operands, device, args.profile)?)?);
            }
        }
    }
    Ok(rows)
}

/// Formats rows as a table, under a line with the device's name.
fn describe(measured: &[Measured]) -> String {
    let header = ["op", "format", "m", "n", "k", "rank", "ms min", "ms median", "GFLOP/s", "weight GB/s", "rel. error"];
    let rows = || measured.iter().map(|measured| &measured.row);
    let cells = rows().map(|row| {
        [
            row.op.to_owned(),
            format!("{}{}", row.format, if row.double_quant { " double" } else { "" }),
            row.m.to_string(),
            row.n.to_string(),
            row.k.to_string(),
            row.rank.to_string(),
            format!("{:.3}", row.ms_min),
            format!("{:.3}", row.ms_median),
            format!("{:.1}", row.gflops),
            format!("{:.2}", row.weight_gb_per_s),
            format!("{:.1e}", row.max_rel_err_vs_cpu),
        ]
    });
    let device = rows().next().map_or(String::new(), |row| match row.tier.as_str() {
        "" => row.adapter.clone(),
        tier => format!("{}, tier {tier}", row.adapter),
    });
    let step = rows().find_map(|row| Some((row.tokens_per_second?, row.peak_bytes?)));
    let step = step.map_or(String::new(), |(rate, peak)| {
        format!("\n{rate:.0} tokens/s, {:.0} MiB of device memory at the peak", peak as f64 / f64::from(1 << 20))
    });
    let profiles: String = rows().filter_map(|row| Some(profile(&row.title(), row.profile.as_ref()?))).collect();
    format!("{device}\n{}{step}{profiles}{}", table(header, 2, cells.collect()), against(measured))
}

/// Formats a case's profile, a line per kernel.
fn profile(title: &str, profile: &KernelTimes) -> String {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let cells = profile
        .kernels
        .iter()
        .map(|row| [row.kernel.to_owned(), row.dispatches.to_string(), format!("{:.3}", row.ms), percent(row.share)]);
    let outside = profile.outside_kernels;
    let outside = ["(no kernel)".to_owned(), String::new(), format!("{:.3}", profile.ms * outside), percent(outside)];
    let header = ["kernel", "dispatches", "ms", "of the run"];
    format!("\n\n{title}, a run of {:.3} ms:\n{}", profile.ms, table(header, 1, cells.chain([outside]).collect()))
}

/// Formats the peers' times, a line per case and peer.
fn against(measured: &[Measured]) -> String {
    let header = ["op", "m", "n", "k", "ms median", "theirs", "ratio", "peer"];
    let cells = measured.iter().flat_map(|Measured { row, peers }| {
        peers.iter().map(|peer| {
            let number = |value: Option<f64>, digits| value.map_or("-".into(), |value| format!("{value:.digits$}"));
            [
                row.op.to_owned(),
                row.m.to_string(),
                row.n.to_string(),
                row.k.to_string(),
                format!("{:.3}", row.ms_median),
                number(peer.ms_median, 3),
                number(peer.ratio, 2),
                match &peer.skipped {
                    Some(reason) => format!("{}: skipped, {reason}", peer.name),
                    None => peer.name.clone(),
                },
            ]
        })
    });
    let cells: Vec<_> = cells.collect();
    if cells.is_empty() { String::new() } else { format!("\n\n{}", table(header, 1, cells)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qlora_wgpu::internal::bench::kernel_times::KernelRow;

    #[test]
    fn every_profile_is_under_the_table_with_its_case() {
        let rows = [1, 8].map(|m| {
            let case = Case { op: layer::Op::Forward, m, n: 32, k: 64, rank: 0, quant: QuantOptions::nf4() };
            let row = measure(&case.operands().unwrap(), &Device::cpu(), false).unwrap();
            let kernel = KernelRow { kernel: "qmatmul_gemv", dispatches: 2, ms: 0.0205, share: 0.41 };
            let kernels = vec![kernel];
            let profile = Some(KernelTimes { ms: 0.05 * m as f64, outside_kernels: 0.59, kernels });
            Measured { row: Row { profile, ..row }, peers: Vec::new() }
        });
        let text = describe(&rows);
        let (table, profiles) = text.split_once("\n\n").unwrap();
        assert!(table.starts_with("cpu\n") && !table.contains("qmatmul_gemv"), "{text}");
        let profiles: Vec<_> = profiles.split("\n\n").collect();
        for (profile, title) in
            profiles.iter().zip(["forward, M = 1, 32 x 64, a run of 0.050 ms:", "forward, M = 8, 32 x 64"])
        {
            assert!(profile.starts_with(title), "{text}");
            assert!(profile.contains("of the run") && profile.contains("(no kernel)"), "{text}");
            let kernel = profile.lines().find(|line| line.contains("qmatmul_gemv")).unwrap();
            assert_eq!(
                kernel.split_whitespace().collect::<Vec<_>>(),
                ["qmatmul_gemv", "2", "0.021", "41.0", "%"],
                "{text}"
            );
        }
        assert_eq!(profiles.len(), 2, "{text}");
    }
}
