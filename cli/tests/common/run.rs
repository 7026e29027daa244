//! Runs of `qlora finetune` in a folder of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::library::model::path;

pub fn qlora(arguments: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    command.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER").args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn succeed(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    output
}

/// The message of a command that fails.
pub fn fail(mut command: Command, code: i32) -> String {
    let output = command.output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {message}");
    message
}

/// The records of a run, without what depends on the clock.
pub fn metrics(folder: &Path) -> Vec<Value> {
    let lines = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let record = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        let object = record.as_object_mut().unwrap();
        object.remove("tokens_per_second");
        object.remove("peak_bytes");
        record
    };
    lines.lines().map(record).collect()
}

pub fn adapter(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

/// A small model and a text for it, of `count` lines.
pub struct Setup {
    pub folder: TempDir,
    pub data: PathBuf,
}

impl Setup {
    pub fn new(count: u32) -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data.jsonl");
        let line = |i: u32| json!({ "input_ids": (0..6 + i % 9).map(|j| (i * 7 + j * j) % 128).collect::<Vec<_>>() });
        fs::write(&data, (0..count).map(|i| line(i).to_string() + "\n").collect::<String>()).unwrap();
        Setup { folder, data }
    }

    pub fn output(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A run on the CPU in folder `name`.
    pub fn finetune(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = qlora(&["finetune", "--device", "cpu", "--model"]);
        command.arg(path("llama")).arg("--data").arg(&self.data).arg("--output").arg(self.output(name));
        command.args(["--batch-size", "2"]).args(arguments);
        command
    }
}

pub fn has_checkpoint(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).unwrap();
    entries.into_iter().any(|entry| entry.unwrap().file_name().to_string_lossy().starts_with("checkpoint-"))
}

#[cfg(unix)]
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}
