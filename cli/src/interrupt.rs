//! Ctrl-C, and other requests to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::output::progress;

/// Exit status after Ctrl-C: 128 plus the signal's number, as in shells.
pub(super) const INTERRUPTED: u8 = 130;

/// Returns a flag that Ctrl-C or a request to terminate sets, and prints `told` then. A second one
/// ends the process, which leaves nothing half-written. A closing terminal counts too, unless
/// hangups are ignored, as under nohup.
pub(super) fn interrupts(told: &'static str) -> Arc<AtomicBool> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    keeping_ignored_hangups(|| {
        let _ = ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(INTERRUPTED.into());
            }
            progress(told);
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
