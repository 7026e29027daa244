//! Prints everything. Results go to stdout, as text or JSON; errors, warnings and progress
//! to stderr. Control characters that come from files are escaped. A closed stdout or stderr isn't
//! an error.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write, stdout};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, OnceLock};

use anstream::stderr;
use clap::builder::styling::{AnsiColor, Style};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::{is_hidden, lines, one_line};

/// Style of [`progress`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
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

/// Whether an output file is standard output.
static STDOUT_IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// Sets how progress is shown. Until this is called, it is shown as bars.
pub(super) fn show_progress(progress: Progress) {
    // Only the first call counts.
    let _ = PROGRESS.set(progress);
}

/// Prints results on stderr from now on, because an output file goes to stdout.
pub(super) fn leave_stdout() {
    STDOUT_IS_TAKEN.store(true, Ordering::Relaxed);
}

/// Prints a value as JSON on stdout.
pub(super) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::io("standard output", error))?;
    print(&format!("{}\n", json_escaped(&text))).map(drop)
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
pub(super) fn print_line(text: &str) -> Result<()> {
    print(&format!("{}\n", lines(text))).map(drop)
}

/// Prints on stdout, flushed at once on a terminal; on stderr if an output file goes to stdout. A
/// closed pipe (as after `head`) isn't an error, but a reason to end.
pub(super) fn print(text: &str) -> Result<ControlFlow<()>> {
    let _ = BARS.clear();
    if STDOUT_IS_TAKEN.load(Ordering::Relaxed) {
        let _ = std::io::stderr().write_all(text.as_bytes());
        return Ok(ControlFlow::Continue(()));
    }
    let mut out = stdout();
    match out.write_all(text.as_bytes()).and_then(|()| if out.is_terminal() { out.flush() } else { Ok(()) }) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(Error::io("standard output", error)),
    }
}

/// Prints a line on stdout that sums up what was written to files. --quiet omits it.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn summary(line: impl Display) -> Result<()> {
    if PROGRESS.get() == Some(&Progress::Silent) { Ok(()) } else { print_line(&line.to_string()) }
}

/// A table for people: header and rows without borders, columns from `numbers_from` on aligned
/// right.
pub(super) fn table<const N: usize>(
    header: [&str; N],
    numbers_from: usize,
    rows: Vec<[String; N]>,
) -> comfy_table::Table {
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

/// Formats bytes in MiB or GiB.
pub(super) fn bytes(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// Quotes a path or name for a shell, in a command that is shown.
pub(super) fn quoted(word: impl Display) -> String {
    let word = word.to_string();
    // Only NUL can't be quoted, and no path or argument contains one.
    shlex::try_quote(&word).map(Cow::into_owned).unwrap_or(word)
}

/// Prints an error as one line.
pub(super) fn error(message: impl Display) {
    labelled("error", AnsiColor::Red, message);
}

/// Prints a warning: the work continues, but may not do what was meant.
pub(super) fn warning(message: impl Display) {
    labelled("warning", AnsiColor::Yellow, message);
}

/// The stream removes colours that can't be shown or aren't wanted.
fn labelled(label: &str, color: AnsiColor, message: impl Display) {
    let style: Style = color.on_default().bold();
    message_line(&format!("{style}{label}:{style:#} {}", one_line(&message.to_string())));
}

/// Prints a progress message.
pub(super) fn progress(message: impl Display) {
    if PROGRESS.get() != Some(&Progress::Silent) {
        fact(message);
    }
}

/// Prints a line that was asked for but isn't part of the result.
pub(super) fn fact(message: impl Display) {
    message_line(&one_line(&message.to_string()));
}

/// Prints a line on stderr in place of the bars. They redraw themselves below it.
fn message_line(line: &str) {
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

/// Shows what a bar is working on, such as a tensor's name.
pub(super) fn at(bar: &ProgressBar, what: &str) {
    bar.set_message(one_line(what).into_owned());
}
