//! `metrics.jsonl`: what every step did, a JSON object a line.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::formats::staged::StagedFile;

/// The file's name in a run's folder.
pub const FILE: &str = "metrics.jsonl";

/// A line: a step, or (with step 0) what there was before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Updates done, this one included.
    pub step: u32,
    /// Mean cross-entropy of the step's label tokens, before its update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f32>,
    /// Mean cross-entropy of the evaluation data, after the update, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Norm of the gradient, before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f32>,
    /// The learning rate of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f32>,
    /// Tokens seen so far, padding left out.
    pub tokens: u64,
    /// Of this step, evaluation and checkpoints left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// The most bytes that the device held since the run was started or resumed.
    pub peak_bytes: u64,
}

/// The open file.
#[derive(Debug)]
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file in `folder`, keeping the records of the first `steps` steps.
    pub(super) fn open(folder: &Path, steps: u32) -> Result<Metrics> {
        let path = folder.join(FILE);
        let io_error = |e: io::Error| Error::io(&path, e);
        if path.exists() {
            let kept: Vec<Record> = read(&path)?.into_iter().filter(|record| record.step <= steps).collect();
            StagedFile::new(&path, |out| {
                kept.iter().try_for_each(|record| out.write_all(&line(record)).map_err(io_error))
            })?
            .commit()?;
        }
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(io_error)?;
        Ok(Metrics { path, file })
    }

    pub(super) fn push(&mut self, record: &Record) -> Result<()> {
        // At once: a reader, or a kill, never sees half a line of an older step.
        self.file.write_all(&line(record)).map_err(|e| Error::io(&self.path, e))
    }
}

fn line(record: &Record) -> Vec<u8> {
    let mut line = serde_json::to_vec(record).unwrap_or_default();
    line.push(b'\n');
    line
}

/// The records of a file. A last line that was cut off, when a run was killed, does not count.
///
/// # Errors
/// [`Error::Io`], and [`Error::File`] with the line's number for one that is no record.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let record = |(number, line): (usize, &str)| {
        let malformed = |e| Error::File { path: path.into(), message: format!("line {}: {e}", number + 1) };
        serde_json::from_str(line).map_err(malformed)
    };
    complete.lines().enumerate().map(record).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_after_a_checkpoint_is_dropped_and_half_a_line_too() {
        let folder = tempfile::tempdir().unwrap();
        let record = |step| Record { step, loss: Some(0.1), tokens: 7, ..Record::default() };
        let mut metrics = Metrics::open(folder.path(), 0).unwrap();
        (1..=4).for_each(|step| metrics.push(&record(step)).unwrap());
        metrics.file.write_all(b"{\"step\": 5, \"lo").unwrap();
        let path = folder.path().join(FILE);
        assert_eq!(read(&path).unwrap().len(), 4);
        let mut metrics = Metrics::open(folder.path(), 2).unwrap();
        metrics.push(&record(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [record(1), record(2), record(3)]);
        assert_eq!(
            fs::read_to_string(&path).unwrap().lines().next().unwrap(),
            r#"{"step":1,"loss":0.1,"tokens":7,"peak_bytes":0}"#
        );
        fs::write(&path, "nonsense\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 1"));
    }
}
