//! `qlora bench`: times of the fused layer, checked against the CPU.

use clap::{Args, ValueEnum};

use super::{print_json, print_line, table};
use crate::bench::{self, Case, Row, measure};
use crate::device::Device;
use crate::error::Result;
use crate::quant::{Format, QuantOptions};

/// Times the fused QLoRA layer on a device and checks its result against the CPU.
///
/// On a GPU the time is that of timestamp queries where there are any, else from submission to completion.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  qlora bench --device best --m 1,64 --n 4096 --k 4096 --double-quant --json")]
pub struct BenchArgs {
    /// cpu, gpu (any adapter), best, an index of `qlora devices`, or a part of a name.
    #[arg(long, default_value = "best")]
    device: String,
    /// What to time.
    #[arg(long, value_enum, default_value_t = Op::Forward)]
    op: Op,
    /// Rows of X, or of dY (tokens).
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64, 512], value_parser = size)]
    m: Vec<usize>,
    /// Rows of the weight (output features).
    #[arg(long, value_delimiter = ',', default_values_t = [4096], value_parser = size)]
    n: Vec<usize>,
    /// Columns of the weight (input features).
    #[arg(long, value_delimiter = ',', default_values_t = [4096, 14336], value_parser = size)]
    k: Vec<usize>,
    /// Rank of the adapter; 0: none.
    #[arg(long, default_value_t = 16, value_parser = rank)]
    rank: usize,
    /// nf4, fp4 or int4.
    #[arg(long, default_value_t = Format::Nf4)]
    format: Format,
    /// Quantize the scales too.
    #[arg(long)]
    double_quant: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Op {
    /// Y = X * deq(W)^T + s * (X * A^T) * B^T
    Forward,
    /// dX = dY * deq(W) + G * A, where G = s * dY * B is given
    Backward,
}

impl From<Op> for bench::Op {
    fn from(op: Op) -> Self {
        match op {
            Op::Forward => bench::Op::Forward,
            Op::Backward => bench::Op::Backward,
        }
    }
}

/// The largest size of a dimension: no model has more, and no product of two overflows.
const MAX_SIZE: usize = 1 << 20;

/// A size of at least 1.
fn size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size @ 1..=MAX_SIZE) => Ok(size),
        _ => Err(format!("must be a whole number in 1..={MAX_SIZE}")),
    }
}

/// As a size, or 0.
fn rank(text: &str) -> Result<usize, String> {
    if text == "0" { Ok(0) } else { size(text) }
}

pub fn run(args: &BenchArgs) -> Result<()> {
    let device = Device::named(&args.device)?;
    let mut rows = Vec::new();
    for &n in &args.n {
        for &k in &args.k {
            for &m in &args.m {
                let quant = QuantOptions { format: args.format, ..QuantOptions::default() };
                let quant = if args.double_quant { quant.double_quant() } else { quant };
                let case = Case { op: args.op.into(), m, n, k, rank: args.rank, quant };
                rows.push(measure(&case.operands()?, &device)?);
            }
        }
    }
    if args.json { print_json(&rows) } else { print_line(&describe(&rows)) }
}

/// Rows as a table, under a line that names the device.
fn describe(rows: &[Row]) -> String {
    let header = ["op", "format", "m", "n", "k", "rank", "ms min", "ms median", "GFLOP/s", "weight GB/s", "rel. error"];
    let cells = rows.iter().map(|row| {
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
    let device = rows.first().map_or(String::new(), |row| match row.tier.as_str() {
        "" => row.adapter.clone(),
        tier => format!("{}, tier {tier}", row.adapter),
    });
    format!("{device}\n{}", table(header, 2, cells.collect()))
}
