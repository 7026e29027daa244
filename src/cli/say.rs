//! What the command says on stderr: errors, warnings, how things go, and with -v what the library tells of itself. The library
//! warns with `tracing::warn!`, which is shown as a warning whatever the flags. Who reads it may be gone, which is no error.

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

/// The variable with filters of the log, such as `debug` or `qlora_wgpu::train=info`.
const LOG: &str = "QLORA_LOG";

/// Flags of every command.
#[derive(Args, Debug)]
#[command(next_help_heading = "Global options")]
pub struct SayArgs {
    /// Say nothing but errors, warnings and the result that was asked for.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Tell on stderr what is done: devices, models, checkpoints; -vv: compiled kernels and memory too.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Colours of messages: auto has them on a terminal, unless NO_COLOR is set.
    // Read by `color` before the rest, as the parser's own messages have colours too.
    #[arg(long, global = true, value_name = "WHEN", default_value_t = ColorChoice::Auto)]
    color: ColorChoice,
}

/// What becomes of [`progress`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Bars where stderr is a terminal, lines otherwise.
    Bars,
    /// Lines: bars and a log do not go together.
    Lines,
    /// Nothing.
    Silent,
}

static PROGRESS: OnceLock<Progress> = OnceLock::new();

/// All bars, which share the terminal.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Begins as the flags and `QLORA_LOG` say; before that, progress is shown.
///
/// # Errors
/// [`Error::Invalid`] for a filter that is none.
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
    // A program that calls this as a library may have begun, or have a subscriber of its own.
    let _ = PROGRESS.set(progress);
    let log = filter.map(|filter| {
        let lines = tracing_subscriber::fmt::layer().with_writer(|| LogLine).with_timer(uptime()).with_ansi(false);
        // Warnings are shown already.
        lines.with_target(false).with_filter(filter.and(filter_fn(|told| *told.level() > Level::WARN)))
    });
    let warnings = Warnings.with_filter(Targets::new().with_target("qlora_wgpu", Level::WARN));
    let _ = tracing_subscriber::registry().with(log).with(warnings).with(waiting::layer()).try_init();
    Ok(())
}

/// Standard error, to which a line of the log is written at once.
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

/// Shows the library's warnings.
struct Warnings;

impl<S: Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        event.record(&mut Warning);
    }
}

/// Shows an event's message, once.
struct Warning;

impl Visit for Warning {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let message = format!("{value:?}");
        // A model may be looked at several times.
        if field.name() == "message" && TOLD.lock().is_ok_and(|mut told| told.insert(message.clone())) {
            warning(message);
        }
    }
}

/// Takes `--color` from the arguments; what is no such choice is left to the parser.
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

/// What went wrong, in one sentence.
pub(super) fn error(message: impl Display) {
    labelled("error", AnsiColor::Red, message);
}

/// What is done all the same, and may not be what was meant.
pub(super) fn warning(message: impl Display) {
    labelled("warning", AnsiColor::Yellow, message);
}

/// How things go.
pub(super) fn progress(message: impl Display) {
    if PROGRESS.get() != Some(&Progress::Silent) {
        fact(message);
    }
}

/// What was asked for and is no part of the result.
pub(super) fn fact(message: impl Display) {
    put(&one_line(&message.to_string()));
}

/// A line on stdout that sums up what is in files: --quiet leaves it out.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn summary(line: impl Display) -> Result<()> {
    if PROGRESS.get() == Some(&Progress::Silent) { Ok(()) } else { print_line(&line.to_string()) }
}

/// A path or name as a shell takes it, in a command that is shown.
pub(super) fn quoted(word: impl Display) -> String {
    let word = word.to_string();
    // Only a NUL cannot be quoted, and no path or argument has one.
    shlex::try_quote(&word).map(Cow::into_owned).unwrap_or(word)
}

/// What a bar is at, such as a tensor by its name.
pub(super) fn at(bar: &ProgressBar, what: &str) {
    bar.set_message(one_line(what).into_owned());
}

/// Puts a line on stderr, in the place of the bars, which draw themselves again below it.
fn put(line: &str) {
    let _ = BARS.clear();
    let _ = writeln!(stderr(), "{line}");
}

/// A bar, hidden where stderr is no terminal or bars are not wanted. To fit a narrow terminal, a template has one part that
/// takes what is left: `{wide_bar}`, or `{wide_msg}` at its end.
pub(super) fn bar(len: usize, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    shown(ProgressBar::new(len as u64).with_style(style))
}

/// A line that says what is waited for.
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

/// The stream leaves the colours out where they are not shown or not wanted.
fn labelled(label: &str, color: AnsiColor, message: impl Display) {
    let style: Style = color.on_default().bold();
    put(&format!("{style}{label}:{style:#} {}", one_line(&message.to_string())));
}
