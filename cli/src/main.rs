//! The `qlora` command; see `qlora --help`.

mod bundled;
mod commands;
mod dataset;
mod hub;
mod interrupt;
mod log;
mod measurements;
mod model;
mod output;
mod paths;
mod plot;
mod prepare;
mod progress;
mod settings;
#[cfg(test)]
mod tests;
mod training;
mod waiting;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::builder::StyledStr;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use qlora_wgpu::error::Result;
use qlora_wgpu::internal::check_environment;

use commands::*;

/// QLoRA for every GPU: frozen 4-bit weights plus LoRA adapters, run and trained through wgpu
/// (Vulkan, Metal, DX12, GL), with an exact CPU twin
#[derive(Parser, Debug)]
#[command(name = "qlora", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "Examples:\n  \
    qlora demo\n  \
    qlora finetune --model model.gguf --data train.jsonl --output my-adapter\n  \
    qlora generate --model model.gguf --adapter my-adapter --chat --prompt 'Who are you?'\n\n\
    Environment:\n  \
    QLORA_DEVICE  default device: cpu, gpu, best, an index, or part of a name or backend\n  \
    QLORA_TIER    kernel tier: software, plain, subgroup, f16, subgroup-f16 or cooperative-matrix\n  \
    QLORA_TUNE    0: don't measure which kernel variant is fastest; use the default one. 1: measure\n  \
    QLORA_CHECK   0: skip comparing a new driver with the CPU. 1: compare before it is used\n  \
    QLORA_LOG     log filter, overrides -v: debug, or qlora_wgpu::train=info\n  \
    NO_COLOR      turns colours off; CLICOLOR_FORCE=1 turns them on, terminal or not\n\n\
    Results go to stdout, everything else to stderr. --json prints the result as one JSON value.\n\n\
    Exit status: 0 done, 1 error (printed on stderr), 2 wrong usage, 130 interrupted (training saves a checkpoint first)")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: log::LogArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    Devices(devices::DevicesArgs),
    Inspect(inspect::InspectArgs),
    Quantize(quantize::QuantizeArgs),
    Dequantize(dequantize::DequantizeArgs),
    Finetune(finetune::FinetuneArgs),
    Data(data::DataArgs),
    Plan(plan::PlanArgs),
    Eval(eval::EvalArgs),
    Generate(generate::GenerateArgs),
    Merge(merge::MergeArgs),
    Export(export::ExportArgs),
    Bench(bench::BenchArgs),
    Demo(demo::DemoArgs),
    Completions(completions::CompletionsArgs),
}

/// Runs the command line. An error is printed on stderr as one sentence.
fn main() -> ExitCode {
    let fail = |error| {
        output::error(&error);
        ExitCode::FAILURE
    };
    let arguments: Vec<OsString> = std::env::args_os().collect();
    log::color(arguments.iter().map(|argument| argument.to_str()));
    let arguments = match settings::insert(arguments, Cli::command) {
        Ok(arguments) => arguments,
        Err(error) => return fail(error),
    };
    let Cli { command, log } = match Cli::from_arg_matches(&command().get_matches_from(arguments)) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    if let Err(error) = log::begin(&log).and_then(|()| check_environment()) {
        return fail(error);
    }
    // Runs on a thread of the pool, so that operations of the CPU device needn't hand over to one
    // and wait.
    let done = rayon::scope(|_| dispatch(&command)).unwrap_or_else(fail);
    waiting::clear();
    done
}

/// The command line, with required flags marked in the help.
fn command() -> clap::Command {
    // `plan` shares `finetune`'s other flags and doesn't need these.
    const OF_FINETUNE: [&str; 2] = ["data", "output"];
    Cli::command().mut_subcommands(|command| {
        let finetunes = command.get_name() == "finetune";
        let mark = if command.get_arguments().any(|flag| flag.get_id() == "config") {
            "[required, typed or in --config]"
        } else {
            "[required]"
        };
        command.mut_args(|flag| {
            let required = flag.is_required_set() || finetunes && OF_FINETUNE.contains(&flag.get_id().as_str());
            if !required || flag.is_positional() {
                return flag;
            }
            // The long text is set only if it differs.
            let marked = |text: &StyledStr| StyledStr::from(format!("{text} {mark}"));
            let [short, long] = [flag.get_help(), flag.get_long_help()].map(|text| text.map(marked));
            let flag = if let Some(text) = short { flag.help(text) } else { flag };
            if let Some(text) = long { flag.long_help(text) } else { flag }
        })
    })
}

fn dispatch(chosen: &Command) -> Result<ExitCode> {
    match chosen {
        Command::Devices(args) => devices::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Dequantize(args) => dequantize::run(args),
        Command::Finetune(args) => return finetune::run(args),
        Command::Data(args) => data::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Merge(args) => return merge::run(args),
        Command::Export(args) => export::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Completions(args) => completions::run(args, command()),
    }?;
    Ok(ExitCode::SUCCESS)
}
