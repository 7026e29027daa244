//! `metrics.jsonl`: a record of each step, one JSON object per line.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::formats::input::read_small_text;
use crate::formats::staged::StagedFile;

/// Name of the file in a run's folder and in its checkpoints.
pub const FILE: &str = "metrics.jsonl";

/// Maximum file size. A step has about 150 bytes, so millions of steps fit.
const MOST_BYTES: u64 = 2 << 30;

/// A line: a step, or (as step 0) the evaluation before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Number of updates done, including this one.
    pub step: u32,
    /// Mean cross-entropy of the step's label tokens, before its update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f32>,
    /// Mean cross-entropy of the evaluation data after the update, if evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Norm of the gradient, before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f32>,
    /// Learning rate of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f32>,
    /// Number of tokens seen so far, without padding.
    pub tokens: u64,
    /// Tokens per second in this step, without evaluation and checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Peak bytes on the device since the run started or resumed.
    pub peak_bytes: u64,
}

/// The open metrics file.
#[derive(Debug)]
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Creates an empty file for a new run in `folder`.
    pub(super) fn start(folder: &Path) -> Result<Metrics> {
        let path = folder.join(FILE);
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(|e| Error::io(&path, e))?;
        file.set_len(0).map_err(|e| Error::io(&path, e))?;
        Ok(Metrics { path, file })
    }

    /// Opens the file in `folder` in its state when `checkpoint` was saved. If lines are missing,
    /// changed or too many, restores the checkpoint's copy. Also returns whether the file had any
    /// fault other than extra lines.
    pub(super) fn resume(folder: &Path, checkpoint: &Path) -> Result<(Metrics, bool)> {
        let path = folder.join(FILE);
        let io_error = |e: io::Error| Error::io(&path, e);
        let saved = checkpoint.join(FILE);
        let wanted = fs::read(&saved).map_err(|e| Error::io(&saved, e))?;
        let found = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            found => found.map_err(io_error)?,
        };
        if found != wanted {
            StagedFile::new(&path, |out| out.write_all(&wanted).map_err(io_error))?.commit()?;
        }
        let file = OpenOptions::new().append(true).open(&path).map_err(io_error)?;
        Ok((Metrics { path, file }, !found.starts_with(&wanted)))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn push(&mut self, record: &Record) -> Result<()> {
        // Write the line at once, so that neither a reader nor a kill sees half of it.
        self.file.write_all(&line(record)).map_err(|e| Error::io(&self.path, e))
    }

    /// Flushes all lines to disk and copies the file into a checkpoint's folder.
    pub(super) fn save(&self, checkpoint: &Path) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io(&self.path, e))?;
        let copy = checkpoint.join(FILE);
        fs::copy(&self.path, &copy).and_then(|_| File::open(&copy)?.sync_all()).map_err(|e| Error::io(&copy, e))
    }
}

fn line(record: &Record) -> Vec<u8> {
    let mut line = serde_json::to_vec(record).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Reads the records of a file. Ignores an incomplete last line, which a killed run may leave.
///
/// # Errors
/// [`Error::Io`], and [`Error::File`] with the line number for an invalid record or missing steps.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = read_small_text(path, MOST_BYTES)?;
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut records: Vec<Record> = Vec::new();
    for (number, line) in (1..).zip(complete.lines()) {
        let malformed =
            |message: String| Error::File { path: path.into(), message: format!("line {number}: {message}") };
        let record: Record = serde_json::from_str(line).map_err(|e| malformed(e.to_string()))?;
        let expected = records.last().map_or(record.step.min(1), |last| last.step + 1);
        if record.step != expected {
            return Err(malformed(format!("is step {}, expected {expected}: lines are missing", record.step)));
        }
        records.push(record);
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(step: u32) -> Record {
        Record { step, loss: Some(0.1), tokens: 7, ..Record::default() }
    }

    #[test]
    fn what_came_after_a_checkpoint_is_dropped_and_half_a_line_too() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("checkpoint-2");
        fs::create_dir(&checkpoint).unwrap();
        let mut metrics = Metrics::start(folder.path()).unwrap();
        (1..=2).for_each(|step| metrics.push(&record(step)).unwrap());
        metrics.save(&checkpoint).unwrap();
        (3..=4).for_each(|step| metrics.push(&record(step)).unwrap());
        metrics.file.write_all(b"{\"step\": 5, \"lo").unwrap();
        let path = folder.path().join(FILE);
        assert_eq!(read(&path).unwrap().len(), 4);
        let (mut metrics, damaged) = Metrics::resume(folder.path(), &checkpoint).unwrap();
        assert!(!damaged);
        metrics.push(&record(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [record(1), record(2), record(3)]);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().next().unwrap(), r#"{"step":1,"loss":0.1,"tokens":7,"peak_bytes":0}"#);

        // Missing lines, a hole, and a missing file.
        let second = text.lines().nth(1).unwrap().to_owned() + "\n";
        for damage in [second.clone(), second.replace("0.1", "\0\0\0"), String::new()] {
            fs::write(&path, damage).unwrap();
            assert!(Metrics::resume(folder.path(), &checkpoint).unwrap().1);
            assert_eq!(read(&path).unwrap(), [record(1), record(2)]);
        }
        fs::remove_file(&path).unwrap();
        assert!(Metrics::resume(folder.path(), &checkpoint).unwrap().1);
        Metrics::start(folder.path()).unwrap();
        assert_eq!(read(&path).unwrap(), []);
    }

    #[test]
    fn lines_that_are_none_or_missing_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let error = |text: &str| {
            fs::write(&path, text).unwrap();
            read(&path).unwrap_err().to_string()
        };
        assert!(error("nonsense\n").contains("metrics.jsonl: line 1: "));
        let lines = |steps: &[u32]| -> String {
            steps.iter().map(|&step| String::from_utf8(line(&record(step))).unwrap()).collect()
        };
        assert!(error(&lines(&[0, 1, 3])).contains("line 3: is step 3, expected 2"));
        assert!(error(&lines(&[2])).contains("line 1: is step 2, expected 1"));
    }

    proptest! {
        #[test]
        fn numbers_come_back_to_the_bit(
            loss in any::<f32>(), eval_loss in any::<f64>(), tokens_per_second in any::<f64>(), tokens in any::<u64>()
        ) {
            let record = Record {
                step: 1,
                loss: Some(loss),
                eval_loss: Some(eval_loss),
                grad_norm: Some(loss.sqrt().abs()),
                tokens,
                tokens_per_second: Some(tokens_per_second),
                ..Record::default()
            };
            let back: Record = serde_json::from_slice(&line(&record)).unwrap();
            // JSON has neither NaN nor infinity.
            prop_assert_eq!(back.loss.map(f32::to_bits), record.loss.filter(|x| x.is_finite()).map(f32::to_bits));
            prop_assert_eq!(back.eval_loss.map(f64::to_bits), record.eval_loss.filter(|x| x.is_finite()).map(f64::to_bits));
            prop_assert_eq!(back.grad_norm, record.grad_norm.filter(|x| x.is_finite()));
            prop_assert_eq!(back.tokens_per_second, record.tokens_per_second.filter(|x| x.is_finite()));
            prop_assert_eq!(back.tokens, tokens);
        }
    }
}
