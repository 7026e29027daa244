//! What the command says on stderr: errors, warnings, and how things go. Who reads it may be gone, which is no error.

use std::fmt::Display;
use std::io::Write;

use anstream::stderr;
use clap::builder::styling::{AnsiColor, Style};

/// What went wrong, in one sentence.
pub(super) fn error(message: impl Display) {
    labelled("error", AnsiColor::Red, message);
}

/// What is done all the same, and may not be what was meant.
pub(super) fn warning(message: impl Display) {
    labelled("warning", AnsiColor::Yellow, message);
}

/// What is going on.
pub(super) fn progress(message: impl Display) {
    let _ = writeln!(stderr(), "{message}");
}

/// The stream leaves the colours out where they are not shown or not wanted.
fn labelled(label: &str, color: AnsiColor, message: impl Display) {
    let style: Style = color.on_default().bold();
    let _ = writeln!(stderr(), "{style}{label}:{style:#} {message}");
}
