//! The `qlora` command.

mod bench;
mod bundled;
mod check;
mod demo;
mod devices;
mod eval;
mod export;
mod finetune;
mod generate;
mod hub;
mod inspect;
mod merge;
mod model;
mod plan;
mod plot;
mod progress;
mod quantize;
mod run;
mod say;
mod settings;
mod training;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::Result;

/// The exit status of a command that Ctrl-C has ended: 128 and the number of the signal, as shells have it.
const INTERRUPTED: u8 = 130;

/// QLoRA for every GPU: 4-bit weights and LoRA adapters through wgpu.
#[derive(Parser, Debug)]
#[command(name = "qlora", version, about, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "Environment:\n  \
    QLORA_DEVICE  device where none is given: cpu, gpu, best, an index or a part of a name\n  \
    QLORA_TIER    kernels to use: software, plain, subgroup, f16 or subgroup-f16\n\n\
    Exit status: 0 done, 1 an error that is printed on stderr, 2 wrong usage, 130 a run that was interrupted and saved")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Devices(devices::DevicesArgs),
    Inspect(inspect::InspectArgs),
    Quantize(quantize::QuantizeArgs),
    Dequantize(quantize::DequantizeArgs),
    Finetune(finetune::FinetuneArgs),
    Plan(plan::PlanArgs),
    Eval(eval::EvalArgs),
    Generate(generate::GenerateArgs),
    Merge(merge::MergeArgs),
    Export(export::ExportArgs),
    Bench(bench::BenchArgs),
    Demo(demo::DemoArgs),
}

/// Runs the command line; errors go to stderr, in one sentence.
pub fn run() -> ExitCode {
    let fail = |error| {
        say::error(&error);
        ExitCode::FAILURE
    };
    let arguments = match finetune::with_settings(std::env::args_os().collect(), Cli::command) {
        Ok(arguments) => arguments,
        Err(error) => return fail(error),
    };
    let command = Cli::parse_from(arguments).command;
    // On a thread of the pool: an operation of the CPU device then need not hand over to one and wait.
    rayon::scope(|_| dispatch(&command)).unwrap_or_else(fail)
}

fn dispatch(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Devices(args) => devices::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Quantize(args) => quantize::quantize(args),
        Command::Dequantize(args) => quantize::dequantize(args),
        Command::Finetune(args) => return finetune::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Merge(args) => return merge::run(args),
        Command::Export(args) => export::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo(args) => demo::run(args),
    }?;
    Ok(ExitCode::SUCCESS)
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
