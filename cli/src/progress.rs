//! Progress of a run: a bar on a terminal, plain lines elsewhere.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar};
use qlora_wgpu::error::Result;
use qlora_wgpu::train::metrics::{self, Record};
use qlora_wgpu::train::run::{Event, Run, Summary};

use super::output::{self, bytes};
use super::plot::loss;

/// Minimum time between plain lines.
const PAUSE: Duration = Duration::from_secs(5);

/// Shows the events of a run on stderr.
struct Progress {
    bar: ProgressBar,
    total: u32,
    /// When the first shown step ended, and its number. The time before it, such as an evaluation,
    /// says nothing about the speed of steps.
    start: Option<(Instant, u32)>,
    last_line: Option<Instant>,
    eval_loss: Option<f64>,
}

impl Progress {
    /// Progress for a run of `total` steps, of which `done` are done.
    fn new(total: u32, done: u32) -> Progress {
        let bar = output::bar(total as usize, "{bar:10} {pos}/{len} {wide_msg}");
        bar.set_position(done.into());
        Progress { bar, total, start: None, last_line: None, eval_loss: None }
    }

    /// Shows one event.
    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Step(record) => self.step(record),
            Event::Saved(path) if self.bar.is_hidden() => output::progress(format!("saved {}", path.display())),
            Event::Saved(_) => {}
        }
    }

    fn step(&mut self, record: &Record) {
        self.eval_loss = record.eval_loss.or(self.eval_loss);
        if record.step > 0 {
            self.start.get_or_insert((Instant::now(), record.step));
        }
        let message = self.message(record);
        if !self.bar.is_hidden() {
            self.bar.set_message(message);
            self.bar.set_position(record.step.into());
            return;
        }
        let is_due = self.last_line.is_none_or(|last| last.elapsed() >= PAUSE);
        if is_due || record.eval_loss.is_some() || record.step == self.total {
            self.last_line = Some(Instant::now());
            output::progress(format!("step {}/{} {message}", record.step, self.total));
        }
    }

    fn message(&self, record: &Record) -> String {
        let mut parts = Vec::new();
        if let Some(loss) = record.loss {
            parts.push(format!("loss {loss:.4}"));
        }
        if let Some(loss) = self.eval_loss {
            parts.push(format!("eval loss {loss:.4}"));
        }
        if let Some(rate) = record.tokens_per_second {
            parts.push(format!("{rate:.0} tokens/s"));
        }
        if let Some((start, first)) = self.start.filter(|(_, first)| record.step > *first) {
            let per_step = start.elapsed() / (record.step - first);
            parts.push(format!("{} left", HumanDuration(per_step * (self.total - record.step.min(self.total)))));
        }
        parts.push(bytes(record.peak_bytes));
        parts.join(", ")
    }
}

/// Trains to the end, or until `stop` returns true. Shows progress on stderr and plots the losses
/// into the run's folder `output`. Also returns the records of all steps.
pub(super) fn train(
    run: &mut Run<'_>,
    steps: u32,
    output: &Path,
    stop: impl Fn() -> bool,
) -> Result<(Summary, Vec<Record>)> {
    let mut progress = Progress::new(steps, run.step());
    let result = run.train(|event| {
        progress.show(event);
        if stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    progress.bar.finish_and_clear();
    let summary = result?;
    let records = metrics::read(&output.join(metrics::FILE))?;
    // A run interrupted before its first step has no records.
    if !records.is_empty() {
        loss::write(output, &records)?;
    }
    Ok((summary, records))
}
