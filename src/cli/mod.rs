//! The `qlora` command.

mod bench;
mod demo;
mod devices;
mod eval;
mod generate;
mod model;
mod plan;
mod quantize;
mod training;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::Result;

/// QLoRA for every GPU: 4-bit weights and LoRA adapters through wgpu.
#[derive(Parser, Debug)]
#[command(name = "qlora", version, about, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "Environment:\n  \
    QLORA_DEVICE  device where none is given: cpu, gpu, best, an index or a part of a name\n  \
    QLORA_TIER    kernels to use: software, plain, subgroup, f16 or subgroup-f16\n\n\
    Exit status: 0 done, 1 an error that is printed on stderr, 2 wrong usage")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Devices(devices::DevicesArgs),
    Quantize(quantize::QuantizeArgs),
    Dequantize(quantize::DequantizeArgs),
    Eval(eval::EvalArgs),
    Generate(generate::GenerateArgs),
    Plan(plan::PlanArgs),
    Bench(bench::BenchArgs),
    Demo(demo::DemoArgs),
}

/// Runs the command line; errors go to stderr, in one sentence.
pub fn run() -> ExitCode {
    match dispatch(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: &Command) -> Result<()> {
    match command {
        Command::Devices(args) => devices::run(args),
        Command::Quantize(args) => quantize::quantize(args),
        Command::Dequantize(args) => quantize::dequantize(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo(args) => demo::run(args),
    }
}

/// A table for people: a header and rows, without borders, numbers to the right.
fn table<const N: usize>(header: [&str; N], numbers_from: usize, rows: Vec<[String; N]>) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(numbers_from) {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    table
}

/// Prints a value as JSON on stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| crate::Error::Io { path: "standard output".into(), message: error.to_string() })?;
    print_line(&text)
}

/// Prints a line on stdout; a reader that has gone away (as `head` does) is no error.
fn print_line(text: &str) -> Result<()> {
    use std::io::{ErrorKind, Write};
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(crate::Error::Io { path: "standard output".into(), message: error.to_string() })
        }
        _ => Ok(()),
    }
}
