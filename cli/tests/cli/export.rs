//! `qlora merge` and `qlora export` as commands: output, refusals, and what they leave behind.

use std::fs;
use std::path::Path;

use crate::common::model::path;
use assert_cmd::Command;
use tempfile::TempDir;

fn qlora(line: &str) -> Command {
    let mut qlora = Command::cargo_bin("qlora").unwrap();
    qlora.current_dir(path("")).args(line.split(' '));
    qlora
}

/// Runs a command that fails. The last line on stderr must contain `parts`.
fn failure(line: &str, parts: &[&str]) {
    let error = String::from_utf8(qlora(line).assert().code(1).get_output().stderr.clone()).unwrap();
    let last = error.lines().last().unwrap();
    assert!(last.starts_with("error: "), "{error}");
    assert!(error.lines().rev().skip(1).all(|line| line.starts_with("warning: ")), "{error}");
    for part in parts {
        assert!(last.contains(part), "{part} in {last}");
    }
}

/// Names of the folder's files.
fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_told() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().display();
    let merge = format!("merge --model llama --adapter adapter-lora --output {out}/merged");
    let assert = qlora(&format!("{merge} --json --dtype bf16")).assert().success();
    let report: serde_json::Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
    assert_eq!((&report["tensors"], &report["merged"]), (&21.into(), &14.into()));
    assert_eq!(report["dtype"], "bfloat16");
    assert_eq!(files(&folder.path().join("merged")), ["config.json", "generation_config.json", "model.safetensors"]);
    // The adapter was trained on `tiny-llama`.
    let warning = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(
        warning.starts_with("warning: ") && warning.contains("tiny-llama") && warning.contains("llama"),
        "{warning}"
    );

    failure(&merge, &["merged: exists", "--force"]);
    let line = qlora(&format!("{merge} --force --dtype f32")).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(line).unwrap().contains("21 tensors as float32, 14 of them merged"));
    let quiet = qlora(&format!("{merge} --force --quiet --requantize nf4")).assert().success();
    assert_eq!(quiet.get_output().stdout, b"");
    assert!(String::from_utf8_lossy(&quiet.get_output().stderr).contains("loses part of what the adapter learned"));

    let export = format!("export --model llama --adapter adapter-lora --output {out}/a.gguf");
    let line = qlora(&export).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(line).unwrap().contains("a.gguf: an adapter of 14 modules"));
    failure(&export, &["a.gguf: exists", "--force"]);
    let report = qlora(&format!("{export} --force --json")).assert().success().get_output().stdout.clone();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&report).unwrap()["modules"], 14);
}

#[test]
fn what_does_not_fit_is_one_sentence() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().display();
    fs::write(folder.path().join("file"), "").unwrap();
    fs::create_dir_all(folder.path().join("folder.gguf/x")).unwrap();
    for (line, parts) in [
        ("merge --model qwen2 --adapter adapter-lora --output @/m", &["does not fit the model", "tiny-llama"][..]),
        ("merge --model qwen2 --adapter adapter-dora --output @/m.gguf", &["does not fit the model"]),
        ("merge --model llama --adapter llama --output @/m", &["not a PEFT adapter directory"]),
        ("merge --model adapter-lora --adapter adapter-lora --output @/m", &["is an adapter"]),
        ("merge --model none --adapter adapter-lora --output @/m", &["none: no such file"]),
        ("merge --model llama --adapter none --output @/m", &["none: no such file"]),
        ("merge --model llama --adapter adapter-lora --output @/m --dtype q8_0", &["q8_0", "ends in .gguf"]),
        ("merge --model llama --adapter adapter-lora --output @/m.gguf --requantize nf4", &["--requantize", "q4_0"]),
        ("merge --model llama --adapter adapter-lora --output @/m --max-shard-size 0", &["--max-shard-size is 0"]),
        ("merge --model llama --adapter adapter-lora --output @/m.gguf", &["tokenizer.json"]),
        ("merge --model llama --adapter adapter-lora --output @/file --force", &["is a file", ".gguf"]),
        ("merge --model llama --adapter adapter-lora --output @/folder.gguf --force", &["is a directory"]),
        ("merge --model llama --adapter adapter-lora --output ./llama --force", &["is the model too"]),
        ("merge --model llama --adapter adapter-lora --output adapter-lora --force", &["is the adapter too"]),
        ("merge --model llama --adapter adapter-lora --output @/file/m", &["file"]),
        ("export --model llama --adapter adapter-dora --output @/a.gguf", &["use_dora", "qlora merge"]),
        ("export --model qwen3 --adapter adapter-lora --output @/a.gguf", &["does not fit the model", "tiny-llama"]),
        ("export --model llama --adapter adapter-lora --output @/a.safetensors", &["must end in .gguf"]),
        ("export --model llama --adapter adapter-lora --output @/none/a.gguf", &["none/a.gguf: "]),
    ] {
        failure(&line.replace('@', &out.to_string()), parts);
    }
    assert_eq!(files(folder.path()), ["file", "folder.gguf"], "nothing is half-written");
    qlora("merge --model llama --adapter adapter-lora --output x --dtype q5_k").assert().code(2);
    qlora("merge --model llama --output x").assert().code(2);
}

/// Runs where no file may be longer than 64 KiB, as on a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.path().join("there")).unwrap();
    fs::write(folder.path().join("there/config.json"), "old").unwrap();
    for output in ["new", "there"] {
        let mut command = Command::new("sh");
        command.current_dir(path("")).args(["-c", "trap '' XFSZ; ulimit -f 128; \"$0\" \"$@\""]);
        command.arg(assert_cmd::cargo::cargo_bin("qlora")).args(["merge", "--model", "llama", "--adapter"]);
        command.args(["adapter-lora", "--force", "--output"]).arg(folder.path().join(output));
        let error = String::from_utf8(command.assert().code(1).get_output().stderr.clone()).unwrap();
        assert!(error.contains("model.safetensors: "), "{error}");
    }
    assert_eq!(files(folder.path()), ["there"]);
    assert_eq!(files(&folder.path().join("there")), ["config.json"]);
    assert_eq!(fs::read_to_string(folder.path().join("there/config.json")).unwrap(), "old");
}
