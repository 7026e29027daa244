//! Shows what the first use of a GPU waits for if it takes long: compiling kernels, and timing
//! variants of kernels.
//!
//! The library wraps both in spans, which a layer of the command's subscriber sees.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use tracing::Subscriber;
use tracing::span::Id;
use tracing_subscriber::filter::{FilterFn, filter_fn};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use super::output;

/// Shorter waits aren't reported.
const PATIENCE: Duration = Duration::from_secs(1);
/// Interval between checks.
const TICK: Duration = Duration::from_millis(150);
/// The library's spans to watch.
const NAMES: [&str; 2] = ["compiling kernels", "tuning kernels"];

/// Line for each span, where there are no bars.
const LINES: [&str; 2] =
    ["compiling kernels for this device", "tuning kernels for this device; later runs reuse the result"];

static STATE: Mutex<State> = Mutex::new(State::new());

struct State {
    /// Indices in [`NAMES`] of the open spans, innermost last.
    running: Vec<usize>,
    /// When waiting began, and time waited before that.
    since: Option<Instant>,
    before: Duration,
    /// Number of spans of each kind, and whether a line was printed for it.
    counts: [usize; 2],
    told: [bool; 2],
    bar: Option<ProgressBar>,
    /// Whether a thread is watching.
    is_watched: bool,
}

impl State {
    const fn new() -> State {
        State {
            running: Vec::new(),
            since: None,
            before: Duration::ZERO,
            counts: [0; 2],
            told: [false; 2],
            bar: None,
            is_watched: false,
        }
    }

    fn enter(&mut self, kind: usize) {
        self.since.get_or_insert_with(Instant::now);
        self.running.push(kind);
        self.counts[kind] += 1;
    }

    fn exit(&mut self, kind: usize) {
        if let Some(at) = self.running.iter().rposition(|running| *running == kind) {
            self.running.remove(at);
        }
        if self.running.is_empty() {
            self.before += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        }
    }

    /// Describes the innermost span, if the wait is long enough to report.
    fn message(&self) -> Option<(usize, String)> {
        let (kind, waited) = (*self.running.last()?, self.before + self.since?.elapsed());
        (waited >= PATIENCE).then(|| (kind, format!("{}, {} so far", NAMES[kind], self.counts[kind])))
    }

    /// Shows the current wait: in a bar, or in a line once per kind.
    fn show(&mut self) {
        let Some((kind, message)) = self.message() else { return };
        let bar = self.bar.get_or_insert_with(output::spinner);
        if !bar.is_hidden() {
            bar.set_message(message);
            bar.tick();
        } else if !std::mem::replace(&mut self.told[kind], true) {
            output::progress(LINES[kind]);
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the bar before other output.
pub(super) fn clear() {
    state().clear();
}

/// The layer that sees the spans, with its filter.
pub(super) fn layer<S: Subscriber + for<'a> LookupSpan<'a>>() -> impl Layer<S> {
    let wanted: FilterFn = filter_fn(|of| of.is_span() && of.target().starts_with("qlora_wgpu::device"));
    Waiting.with_filter(wanted.with_max_level_hint(tracing::Level::TRACE))
}

struct Waiting;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Waiting {
    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let Some(kind) = kind(id, &context) else { return };
        let mut state = state();
        state.enter(kind);
        if !state.is_watched {
            state.is_watched = thread::Builder::new().name("waiting".into()).spawn(watch).is_ok();
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        if let Some(kind) = kind(id, &context) {
            state().exit(kind);
        }
    }
}

fn kind<S: Subscriber + for<'a> LookupSpan<'a>>(id: &Id, context: &Context<'_, S>) -> Option<usize> {
    let name = context.metadata(id)?.name();
    NAMES.iter().position(|known| *known == name)
}

/// Checks periodically until no span is open.
fn watch() {
    let mut idle = 0;
    // A short pause between two kernels isn't the end.
    while idle < 4 {
        thread::sleep(TICK);
        let mut state = state();
        idle = if state.running.is_empty() { idle + 1 } else { 0 };
        state.show();
    }
    let mut state = state();
    state.clear();
    state.is_watched = !state.running.is_empty();
    if state.is_watched {
        drop(state);
        watch();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_takes_long_is_told_and_the_innermost() {
        let mut state = State::new();
        state.enter(1);
        assert!(state.message().is_none(), "it has just begun");
        state.enter(0);
        state.before = PATIENCE;
        assert_eq!(state.message().unwrap().1, "compiling kernels, 1 so far");
        state.exit(0);
        assert_eq!(state.message().unwrap().1, "tuning kernels, 1 so far");
        state.exit(1);
        assert!(state.message().is_none() && state.since.is_none() && state.before > PATIENCE);
        state.enter(1);
        assert_eq!(state.message().unwrap().1, "tuning kernels, 2 so far");
    }

    #[test]
    fn spans_of_the_library_are_seen() {
        use tracing_subscriber::layer::SubscriberExt;
        let subscriber = tracing_subscriber::registry().with(layer());
        let (before, span) = tracing::subscriber::with_default(subscriber, || {
            let before = state().counts;
            let span = tracing::trace_span!(target: "qlora_wgpu::device::tune", "tuning kernels").entered();
            assert_eq!(state().running.last(), Some(&1));
            (before, drop(span))
        });
        assert_eq!((state().counts[1], span), (before[1] + 1, ()));
        assert!(state().running.is_empty());
    }
}
