//! Runs other programs that time the same cases, in the same run, because a machine's speed
//! changes from minute to minute.
//!
//! A peer is a program that prints a line of JSON, `{"name"}`, and then answers every line that it
//! reads. A line is a case with the fields of [`Row`] (op, format, double_quant, m, n, k, rank,
//! and for a step its shape). An answer is a line too: `{"ms_min", "ms_median"}`, or `{"skipped"}`
//! with the reason. `benches/peers` has some.

use std::io::{self, BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::bench::Row;
use serde::{Deserialize, Serialize};

/// A running peer; killed when dropped.
pub struct Peer {
    command: String,
    name: String,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

/// A peer's answer to a case.
#[derive(Clone, Debug, Serialize)]
pub struct PeerTime {
    /// Name and version of the peer.
    pub name: String,
    /// Shortest run, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms_min: Option<f64>,
    /// Median run, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms_median: Option<f64>,
    /// Its median divided by ours: above 1, ours is faster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Why it has no time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

#[derive(Deserialize)]
struct Hello {
    name: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Times { ms_min: f64, ms_median: f64 },
    Skipped { skipped: String },
}

impl Peer {
    /// Starts a peer: a program and its arguments, separated by spaces.
    ///
    /// # Errors
    /// [`Error::Io`] if it does not start, or does not print its name.
    pub fn start(command: &str) -> Result<Peer> {
        let failed = |message: String| Error::io(command, io::Error::other(message));
        let mut words = command.split_whitespace();
        let program = words.next().ok_or_else(|| failed("is not a command".into()))?;
        let mut child = Command::new(program)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(format!("does not start: {error}")))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("has no pipes".into()));
        };
        let output = BufReader::new(output).lines();
        let mut peer = Peer { command: command.into(), name: String::new(), child, input, output };
        let Hello { name } = peer.read()?;
        peer.name = name;
        Ok(peer)
    }

    /// Times the case of a row.
    ///
    /// # Errors
    /// [`Error::Io`] if the peer ends, or its answer has no valid times.
    pub fn measure(&mut self, row: &Row) -> Result<PeerTime> {
        let case = serde_json::to_string(row).map_err(|error| self.failed(error.to_string()))?;
        writeln!(self.input, "{case}")
            .and_then(|()| self.input.flush())
            .map_err(|error| self.failed(format!("does not accept a case: {error}")))?;
        let name = self.name.clone();
        Ok(match self.read()? {
            Answer::Times { ms_min, ms_median } if ms_min > 0.0 && ms_median >= ms_min => PeerTime {
                name,
                ms_min: Some(ms_min),
                ms_median: Some(ms_median),
                ratio: Some(ms_median / row.ms_median),
                skipped: None,
            },
            Answer::Times { ms_min, ms_median } => {
                return Err(self.failed(format!("answers with times of {ms_min} and {ms_median} ms")));
            }
            Answer::Skipped { skipped } => {
                PeerTime { name, ms_min: None, ms_median: None, ratio: None, skipped: Some(skipped) }
            }
        })
    }

    fn read<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T> {
        let line = match self.output.next() {
            Some(Ok(line)) => line,
            Some(Err(error)) => return Err(Error::io(&self.command, error)),
            None => return Err(self.failed("has ended without an answer; stderr says why".into())),
        };
        serde_json::from_str(&line).map_err(|error| self.failed(format!("answers {line:.200?}: {error}")))
    }

    fn failed(&self, message: String) -> Error {
        Error::io(&self.command, io::Error::other(message))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails if it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
