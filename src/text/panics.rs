//! Calls into libraries that panic for some input. A panic becomes an error that names the file.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;

use crate::error::{Error, Result};

thread_local! {
    /// Whether the library is running on this thread. Its panics aren't printed, because they
    /// become errors.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// Panic payload for places where the library ignores errors.
struct Refusal(String);

/// Ends a call into the library; [`guarded`] turns this into an error.
pub(super) fn refuse(message: String) -> ! {
    panic::resume_unwind(Box::new(Refusal(message)))
}

/// Calls the library for the tokenizer in the file at `path`.
///
/// # Errors
/// [`Error::File`] that says `what` failed and why: the library's error, a refusal, or its panic.
pub(super) fn guarded<T>(path: &Path, what: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let reason = match caught(call) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(payload) => reason(payload),
    };
    Err(Error::File { path: path.into(), message: format!("{what}: {reason}") })
}

/// Calls a library that panics for some input, without printing the panic. What the panic leaves
/// behind is dropped or still intact.
///
/// # Errors
/// The panic's payload.
pub(super) fn caught<T>(call: impl FnOnce() -> T) -> Result<T, Box<dyn Any + Send>> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !AT_WORK.get() {
                before(info);
            }
        }));
    });
    let before = AT_WORK.replace(true);
    // A panic leaves at most a cache of words, and a tokenizer that wasn't built.
    let done = panic::catch_unwind(AssertUnwindSafe(call));
    AT_WORK.set(before);
    done
}

fn reason(payload: Box<dyn Any + Send>) -> String {
    let payload = match payload.downcast::<Refusal>() {
        Ok(refusal) => return refusal.0,
        Err(payload) => payload,
    };
    let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    format!("the tokenizers library can't use it ({})", text.unwrap_or("it panicked"))
}
