//! Messages on stderr: errors, warnings, progress, and with -v the library's log. The library
//! warns with `tracing::warn!`, which is shown as a warning whatever the flags. A closed stderr
//! isn't an error.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt::{Debug, Display};
use std::io::Write;
use std::sync::{LazyLock, Mutex, OnceLock};

use anstream::stderr;
use clap::builder::styling::{AnsiColor, Style};
use clap::{ArgAction, Args, ColorChoice};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt, Targets, filter_fn};
use tracing_subscriber::fmt::time::uptime;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use super::{print_line, waiting};
use crate::error::{Error, Result};
use crate::printable::one_line;

/// Environment variable with log filters, such as `debug` or `qlora_wgpu::train=info`.
const LOG: &str = "QLORA_LOG";

/// Flags of every command.
#[derive(Args, Debug)]
#[command(next_help_heading = "Global options")]
pub struct SayArgs {
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

/// How [`progress`] is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Bars if stderr is a terminal, lines otherwise.
    Bars,
    /// Lines, because bars and a log would mix.
    Lines,
    /// Nothing.
    Silent,
}

static PROGRESS: OnceLock<Progress> = OnceLock::new();

/// All bars, which share the terminal.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Applies the flags and `QLORA_LOG`. Until this is called, progress is shown.
///
/// # Errors
/// [`Error::Invalid`] for an invalid filter.
pub(super) fn begin(args: &SayArgs) -> Result<()> {
    let filter = match std::env::var(LOG) {
        Ok(text) if !text.is_empty() => Some(text.parse::<Targets>().map_err(|error| Error::Invalid {
            op: "the environment",
            what: LOG,
            got: text,
            expected: format!("{error}; give a level such as debug, or qlora_wgpu::train=info"),
        })?),
        _ => level(args.verbose).map(|level| Targets::new().with_target("qlora_wgpu", level)),
    };
    let progress = match &filter {
        _ if args.quiet => Progress::Silent,
        Some(_) => Progress::Lines,
        None => Progress::Bars,
    };
    // A program that calls this as a library may have called it already, or have its own
    // subscriber.
    let _ = PROGRESS.set(progress);
    let log = filter.map(|filter| {
        let lines = tracing_subscriber::fmt::layer().with_writer(|| LogLine).with_timer(uptime()).with_ansi(false);
        // Warnings are shown by `Warnings`.
        lines.with_target(false).with_filter(filter.and(filter_fn(|told| *told.level() > Level::WARN)))
    });
    let warnings = Warnings.with_filter(Targets::new().with_target("qlora_wgpu", Level::WARN));
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

/// Prints an error as one line.
pub(super) fn error(message: impl Display) {
    labelled("error", AnsiColor::Red, message);
}

/// Prints a warning: the work continues, but may not do what was meant.
pub(super) fn warning(message: impl Display) {
    labelled("warning", AnsiColor::Yellow, message);
}

/// Prints a progress message.
pub(super) fn progress(message: impl Display) {
    if PROGRESS.get() != Some(&Progress::Silent) {
        fact(message);
    }
}

/// Prints a line that was asked for but isn't part of the result.
pub(super) fn fact(message: impl Display) {
    put(&one_line(&message.to_string()));
}

/// Prints a line on stdout that sums up what was written to files. --quiet omits it.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn summary(line: impl Display) -> Result<()> {
    if PROGRESS.get() == Some(&Progress::Silent) { Ok(()) } else { print_line(&line.to_string()) }
}

/// Quotes a path or name for a shell, in a command that is shown.
pub(super) fn quoted(word: impl Display) -> String {
    let word = word.to_string();
    // Only NUL can't be quoted, and no path or argument contains one.
    shlex::try_quote(&word).map(Cow::into_owned).unwrap_or(word)
}

/// Shows what a bar is working on, such as a tensor's name.
pub(super) fn at(bar: &ProgressBar, what: &str) {
    bar.set_message(one_line(what).into_owned());
}

/// Prints a line on stderr in place of the bars. They redraw themselves below it.
fn put(line: &str) {
    let _ = BARS.clear();
    let _ = writeln!(stderr(), "{line}");
}

/// Makes a bar, hidden if stderr isn't a terminal or bars aren't wanted. To fit a narrow terminal,
/// a template has one part that takes the remaining width: `{wide_bar}`, or `{wide_msg}` at its
/// end.
pub(super) fn bar(len: usize, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    shown(ProgressBar::new(len as u64).with_style(style))
}

/// Makes a line that says what the program waits for.
pub(super) fn spinner() -> ProgressBar {
    let style =
        ProgressStyle::with_template("{spinner} {wide_msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    shown(ProgressBar::no_length().with_style(style))
}

fn shown(bar: ProgressBar) -> ProgressBar {
    match PROGRESS.get() {
        Some(Progress::Lines | Progress::Silent) => bar.set_draw_target(ProgressDrawTarget::hidden()),
        Some(Progress::Bars) | None => return BARS.add(bar),
    }
    bar
}

/// The stream removes colours that can't be shown or aren't wanted.
fn labelled(label: &str, color: AnsiColor, message: impl Display) {
    let style: Style = color.on_default().bold();
    put(&format!("{style}{label}:{style:#} {}", one_line(&message.to_string())));
}
