//! The `qlora` command.

mod bench;
mod bundled;
mod check;
mod completions;
mod data;
mod demo;
mod devices;
mod eval;
mod export;
mod finetune;
mod generate;
mod hardware;
mod hub;
mod inspect;
mod merge;
mod model;
mod output;
mod plan;
mod plot;
mod progress;
mod quantize;
mod run;
mod say;
mod settings;
mod training;
mod waiting;

use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal, Write, stderr, stdout};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::builder::StyledStr;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::device::check_environment;
use crate::error::Result;
use crate::printable::{is_hidden, lines, one_line};

/// Exit status after Ctrl-C: 128 plus the signal's number, as in shells.
const INTERRUPTED: u8 = 130;

/// QLoRA for every GPU: 4-bit weights and LoRA adapters through wgpu.
#[derive(Parser, Debug)]
#[command(name = "qlora", version, about, propagate_version = true, arg_required_else_help = true)]
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
    say: say::SayArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    Devices(devices::DevicesArgs),
    Inspect(inspect::InspectArgs),
    Quantize(quantize::QuantizeArgs),
    Dequantize(quantize::DequantizeArgs),
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
pub fn run() -> ExitCode {
    let fail = |error| {
        say::error(&error);
        ExitCode::FAILURE
    };
    let arguments: Vec<OsString> = std::env::args_os().collect();
    say::color(arguments.iter().map(|argument| argument.to_str()));
    let arguments = match finetune::with_settings(arguments, Cli::command) {
        Ok(arguments) => arguments,
        Err(error) => return fail(error),
    };
    let Cli { command, say } = match Cli::from_arg_matches(&command().get_matches_from(arguments)) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    if let Err(error) = say::begin(&say).and_then(|()| check_environment()) {
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

fn dispatch(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Devices(args) => devices::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Quantize(args) => quantize::quantize(args),
        Command::Dequantize(args) => quantize::dequantize(args),
        Command::Finetune(args) => return finetune::run(args),
        Command::Data(args) => data::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Merge(args) => return merge::run(args),
        Command::Export(args) => export::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Completions(args) => completions::run(args),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Returns a flag that Ctrl-C or a request to terminate sets, and prints `told` then. A second one
/// ends the process, which leaves nothing half-written. A closing terminal counts too, unless
/// hangups are ignored, as under nohup.
fn interrupts(told: &'static str) -> Arc<AtomicBool> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    // A handler that exists already (in a program that calls this as a library) stays.
    keeping_ignored_hangups(|| {
        let _ = ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(INTERRUPTED.into());
            }
            say::progress(told);
        });
    });
    interrupted
}

/// Calls `set_handlers`, which installs signal handlers. SIGHUP stays ignored if it was.
#[cfg(unix)]
fn keeping_ignored_hangups(set_handlers: impl FnOnce()) {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: ignoring a signal runs no code. There is no other way to learn its current handler.
    let before = unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) };
    let ignored = matches!(before, Ok(SigHandler::SigIgn));
    if let (false, Ok(before)) = (ignored, before) {
        // SAFETY: this restores the handler that the process had.
        let _ = unsafe { signal(Signal::SIGHUP, before) };
    }
    set_handlers();
    if ignored {
        // SAFETY: as above.
        let _ = unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) };
    }
}

#[cfg(not(unix))]
fn keeping_ignored_hangups(set_handlers: impl FnOnce()) {
    set_handlers();
}

/// A table for people: header and rows without borders, columns from `numbers_from` on aligned
/// right.
fn table<const N: usize>(header: [&str; N], numbers_from: usize, rows: Vec<[String; N]>) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row.iter().map(|cell| one_line(cell)));
    }
    for column in table.column_iter_mut().skip(numbers_from) {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    table
}

/// Prints a value as JSON on stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| crate::Error::io("standard output", error))?;
    put(&format!("{}\n", json_escaped(&text))).map(drop)
}

/// Equivalent JSON with the characters escaped that a terminal shouldn't get. They can only be
/// inside strings.
fn json_escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c != '\n' && is_hidden(c) {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        } else {
            out.push(c);
        }
    }
    out
}

/// Prints lines for people on stdout, with control characters escaped.
fn print_line(text: &str) -> Result<()> {
    put(&format!("{}\n", lines(text))).map(drop)
}

/// Prints on stdout, flushed at once on a terminal; on stderr if an output file goes to stdout. A
/// closed pipe (as after `head`) isn't an error, but a reason to end.
fn put(text: &str) -> Result<ControlFlow<()>> {
    waiting::clear();
    if output::has_stdout() {
        let _ = stderr().write_all(text.as_bytes());
        return Ok(ControlFlow::Continue(()));
    }
    let mut out = stdout();
    match out.write_all(text.as_bytes()).and_then(|()| if out.is_terminal() { out.flush() } else { Ok(()) }) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(crate::Error::io("standard output", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a line of a shell as the program does: flags from the settings file (here
    /// `settings`) come before typed ones.
    fn parse(line: &str, settings: &str) {
        let words = shlex::split(line).unwrap_or_else(|| panic!("quotes in: {line}"));
        let words = words.into_iter().take_while(|word| ![">", "|"].contains(&word.as_str()));
        let words = words.map(|word| if word == "run.toml" { settings.into() } else { word.into() }).collect();
        let arguments = finetune::with_settings(words, Cli::command).unwrap_or_else(|error| panic!("{line}: {error}"));
        Cli::try_parse_from(arguments).unwrap_or_else(|error| panic!("{line}: {error}"));
    }

    #[test]
    fn every_command_has_examples_and_they_parse_as_those_of_the_documents_do() {
        Cli::command().debug_assert();
        let folder = tempfile::tempdir().unwrap();
        let settings = folder.path().join("run.toml").display().to_string();
        std::fs::write(&settings, "model = 'model.gguf'\ndata = 'train.jsonl'\noutput = 'run'\n").unwrap();
        let mut cli = Cli::command();
        let all: Vec<clap::Command> = cli.get_subcommands().cloned().chain([cli.clone()]).collect();
        for mut command in all {
            let name = command.get_name().to_owned();
            assert!(command.render_long_help().to_string().contains("Examples:\n"), "{name}");
            let text = command.get_after_help().unwrap_or_else(|| panic!("{name}: no examples")).to_string();
            let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| line.starts_with("qlora ")).collect();
            assert!((1..=3).contains(&lines.len()), "{name}: {lines:?}");
            assert!(name == "qlora" || lines.iter().all(|line| line.split(' ').nth(1) == Some(&name)), "{lines:?}");
            lines.iter().for_each(|line| parse(line, &settings));
        }
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|file| file.unwrap().path());
        let pages = docs.chain(["README.md", "CONTRIBUTING.md"].map(|name| root.join(name)));
        let pages = pages.filter(|path| path.extension().is_some_and(|ending| ending == "md"));
        let text: String = pages.map(|path| std::fs::read_to_string(path).unwrap()).collect();
        let mut named = std::collections::BTreeSet::new();
        for line in text.lines().filter(|line| line.starts_with("qlora ")) {
            parse(line, &settings);
            named.extend(line.split(' ').nth(1));
        }
        for command in cli.get_subcommands_mut() {
            assert!(named.contains(command.get_name()), "the documents show no {}", command.get_name());
        }
    }

    /// Makes code blocks of the indented lines below "Examples:" and "Environment:", which Markdown
    /// would run together.
    fn fence(page: &str) -> String {
        let mut fenced = String::new();
        let mut lines = page.lines().peekable();
        while let Some(line) = lines.next() {
            fenced += &format!("{line}\n");
            if !["Examples:", "Environment:"].contains(&line) {
                continue;
            }
            fenced += if line == "Examples:" { "\n```sh\n" } else { "\n```text\n" };
            while let Some(code) = lines.next_if(|line| line.starts_with("  ")) {
                fenced += &format!("{}\n", code.trim_start());
            }
            fenced += "```\n";
        }
        fenced.trim_end().to_owned() + "\n"
    }

    /// `QLORA_UPDATE_DOCS=1 cargo test --lib docs_cli` writes the page.
    #[test]
    fn docs_cli_is_what_the_help_says() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
        let options = clap_markdown::MarkdownOptions::new().title("The command".into()).show_footer(false);
        let page = fence(&clap_markdown::help_markdown_command_custom(&command(), &options));
        if std::env::var_os("QLORA_UPDATE_DOCS").is_some_and(|value| value == "1") {
            std::fs::write(&path, &page).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        let line = |text: &str, at: usize| text.lines().nth(at).map(str::to_owned);
        let first = (0..page.lines().count().max(kept.lines().count())).find(|&at| line(&page, at) != line(&kept, at));
        if let Some(at) = first {
            let (got, wanted) = (line(&kept, at), line(&page, at));
            panic!(
                "line {} of docs/cli.md is {got:?}, the help says {wanted:?}; QLORA_UPDATE_DOCS=1 writes it",
                at + 1
            );
        }
    }
}
