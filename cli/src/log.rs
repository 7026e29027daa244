//! The flags of every command, and the library's log: its warnings are shown whatever the flags,
//! the rest with -v or `QLORA_LOG`.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io::Write;
use std::sync::Mutex;

use clap::{ArgAction, Args, ColorChoice};
use qlora_wgpu::error::{Error, Result};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt, Targets, filter_fn};
use tracing_subscriber::fmt::time::uptime;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use super::output::{Progress, fact, show_progress, warning};
use super::waiting;

/// Environment variable with log filters, such as `debug` or `qlora_wgpu::train=info`.
const LOG: &str = "QLORA_LOG";

/// Flags of every command.
#[derive(Args, Debug)]
#[command(next_help_heading = "Global options")]
pub struct LogArgs {
    /// Print only errors, warnings and the result.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Report devices, models and checkpoints on stderr; -vv adds compiled kernels and memory.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Colours of messages; auto: on a terminal, unless NO_COLOR is set.
    // `color` reads it before the parser, as the parser's own messages have colours too.
    #[arg(long, global = true, value_name = "WHEN", default_value_t = ColorChoice::Auto)]
    color: ColorChoice,
}

/// Applies the flags and `QLORA_LOG`.
///
/// # Errors
/// [`Error::Invalid`] for an invalid filter.
pub(super) fn begin(args: &LogArgs) -> Result<()> {
    let filter = match std::env::var(LOG) {
        Ok(text) if !text.is_empty() => Some(text.parse::<Targets>().map_err(|error| {
            Error::invalid(
                "the environment",
                LOG,
                text,
                format!("{error}; give a level such as debug, or qlora_wgpu::train=info"),
            )
        })?),
        _ => level(args.verbose).map(|level| Targets::new().with_target("qlora_wgpu", level)),
    };
    let progress = match &filter {
        _ if args.quiet => Progress::Silent,
        Some(_) => Progress::Lines,
        None => Progress::Bars,
    };
    show_progress(progress);
    let log = filter.map(|filter| {
        let lines = tracing_subscriber::fmt::layer().with_writer(|| LogLine).with_timer(uptime()).with_ansi(false);
        // Warnings are shown by `Warnings`.
        lines.with_target(false).with_filter(filter.and(filter_fn(|told| *told.level() > Level::WARN)))
    });
    let warnings = Warnings.with_filter(Targets::new().with_target("qlora_wgpu", Level::WARN));
    // The only subscriber of this process, so this can't fail.
    let _ = tracing_subscriber::registry().with(log).with(warnings).with(waiting::layer()).try_init();
    Ok(())
}

/// Writer of log lines to standard error, unbuffered.
struct LogLine;

impl Write for LogLine {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        fact(String::from_utf8_lossy(line).trim_end_matches('\n'));
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn level(verbose: u8) -> Option<Level> {
    match verbose {
        0 => None,
        1 => Some(Level::INFO),
        _ => Some(Level::DEBUG),
    }
}

/// Layer that shows the library's warnings.
struct Warnings;

impl<S: Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        event.record(&mut Warning);
    }
}

/// Shows an event's message, once per text.
struct Warning;

impl Visit for Warning {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let message = format!("{value:?}");
        // A model may be read several times, with the same warning.
        if field.name() == "message" && TOLD.lock().is_ok_and(|mut told| told.insert(message.clone())) {
            warning(message);
        }
    }
}

/// Applies `--color` before parsing; leaves invalid values to the parser.
pub(super) fn color<'a>(arguments: impl IntoIterator<Item = Option<&'a str>>) {
    let mut arguments = arguments.into_iter().flatten();
    while let Some(argument) = arguments.next() {
        let value = match argument.strip_prefix("--color") {
            Some("") => arguments.next(),
            Some(value) => value.strip_prefix('='),
            None => None,
        };
        match value {
            Some("always") => anstream::ColorChoice::Always.write_global(),
            Some("never") => anstream::ColorChoice::Never.write_global(),
            _ => {}
        }
    }
}
