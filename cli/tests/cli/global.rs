//! Common to all commands of `qlora`: one JSON value on stdout, --quiet and -v, colours, exit
//! statuses, closed pipes, completions.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common;
use crate::common::model::{path, with_tokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;

fn qlora(line: &str) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    for variable in ["QLORA_DEVICE", "QLORA_TIER", "QLORA_LOG", "NO_COLOR", "CLICOLOR_FORCE"] {
        command.env_remove(variable);
    }
    command.args(shlex::split(line).unwrap()).stdin(Stdio::null());
    command
}

/// A run's stdout and stderr, without drivers' messages.
fn texts(output: &Output) -> (String, String) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stderr = stderr.lines().filter(|line| !line.contains("XDG_RUNTIME_DIR")).collect::<Vec<_>>().join("\n");
    (String::from_utf8(output.stdout.clone()).unwrap(), stderr)
}

fn run(mut command: Command, code: i32) -> (String, String) {
    let output = command.output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {stderr}");
    (stdout, stderr)
}

/// A model with a tokenizer, a text for it, and a folder for results.
struct Setup {
    model: TempDir,
    folder: TempDir,
}

impl Setup {
    fn new() -> Setup {
        let setup = Setup { model: with_tokenizer("llama"), folder: tempfile::tempdir().unwrap() };
        std::fs::write(setup.folder.path().join("data.txt"), "w1 w2 w3 w4 w5 w6 w7").unwrap();
        setup
    }

    /// The line for one command.
    fn line(&self, tag: &str, command: &str) -> String {
        self.lines(tag).into_iter().find(|line| line.starts_with(command)).unwrap()
    }

    /// A short run of every command; those that write use files named after `tag`.
    fn lines(&self, tag: &str) -> Vec<String> {
        let (model, folder) = (self.model.path().display(), self.folder.path().display());
        vec![
            "devices".into(),
            format!("inspect {model}"),
            format!("quantize {model}/model.safetensors {folder}/{tag}-nf4"),
            format!("dequantize {folder}/{tag}-nf4 {folder}/{tag}-f32"),
            format!("plan --model {model} --device cpu"),
            format!("finetune --model {model} --device cpu --data {folder}/data.txt --output {folder}/{tag}-run"),
            format!("merge --model {model} --adapter {folder}/{tag}-run --output {folder}/{tag}-merged"),
            format!("export --model {model} --adapter {folder}/{tag}-run --output {folder}/{tag}.gguf"),
            format!("eval --model {model} --device cpu --data {folder}/data.txt"),
            format!("generate --model {model} --device cpu --prompt 'w1 w2' --max-tokens 4"),
            "bench --device cpu --m 1 --n 32 --k 32".into(),
            format!("demo --device cpu --steps 1 --output {folder}/{tag}-demo"),
        ]
    }
}

#[test]
fn json_is_one_value_on_stdout_and_quiet_leaves_nothing_on_stderr() {
    for line in Setup::new().lines("json") {
        let (stdout, stderr) = run(qlora(&format!("{line} --json --quiet")), 0);
        let value: Value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{line}: {error} in {stdout}"));
        assert!(value.is_object() || value.is_array(), "{line}: {value}");
        assert_eq!(stderr, "", "{line}");
    }
}

#[test]
fn a_closed_pipe_is_no_error() {
    let setup = Setup::new();
    let others = ["--help", "--version", "finetune --help", "completions zsh"].map(String::from);
    for (index, json) in ["", " --json"].into_iter().enumerate() {
        let lines = setup.lines(&format!("pipe{index}")).into_iter().map(|line| line + json);
        for line in lines.chain(others.clone()) {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let output = qlora(&line).stdout(writer).stderr(Stdio::piped()).output().unwrap();
            let (_, stderr) = texts(&output);
            assert_eq!(output.status.code(), Some(0), "{line}: {stderr}");
            assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{line}: {stderr}");
        }
    }
    // The same for progress and messages.
    for line in setup.lines("stderr") {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let status = qlora(&format!("{line} -vv")).stdout(Stdio::null()).stderr(writer).status().unwrap();
        assert_eq!(status.code(), Some(0), "{line}");
    }
}

#[test]
fn generate_tells_the_text_its_end_and_its_speed() {
    let setup = Setup::new();
    let line = |flags: &str| format!("generate --model {} --prompt 'w1 w2' {flags}", setup.model.path().display());
    let device = "--device cpu --max-tokens 4";
    let (plain, _) = run(qlora(&line(device)), 0);
    let report = |flags: &str| -> Value { serde_json::from_str(&run(qlora(&line(flags)), 0).0).unwrap() };
    let all = report(&format!("{device} --json"));
    assert_eq!(all["text"].as_str().unwrap().to_owned() + "\n", plain);
    assert_eq!((&all["end"], &all["prompt_tokens"], &all["tokens"]), (&json!("length"), &json!(2), &json!(4)));
    assert!(
        all["tokens_per_second"].as_f64().unwrap() > 0.0 && all["prompt_tokens_per_second"].as_f64().unwrap() > 0.0
    );

    let second = plain.split_whitespace().nth(1).unwrap();
    let stopped = report(&format!("{device} --json --stop {second}"));
    assert_eq!(stopped["end"], "stop");
    assert!(plain.starts_with(stopped["text"].as_str().unwrap()) && stopped["text"] != all["text"], "{stopped}");

    let (text, stats) = run(qlora(&line(&format!("{device} --stats -q"))), 0);
    assert!(text == plain && stats.starts_with("prompt: 2 tokens, "), "requested output is not progress: {stats}");
}

#[test]
fn verbose_tells_of_device_model_and_checkpoints_on_stderr() {
    let setup = Setup::new();
    let eval = setup.line("x", "eval");
    let (wanted, silent) = run(qlora(&eval), 0);
    assert_eq!(silent, "");
    let (stdout, stderr) = run(qlora(&format!("-v {eval}")), 0);
    assert_eq!(stdout, wanted);
    for part in [" INFO ", "device: cpu", "loaded ", "layers=2"] {
        assert!(stderr.contains(part), "{part} in {stderr}");
    }
    let mut finetune = qlora(&setup.line("v", "finetune"));
    finetune.arg("-vv");
    let (_, stderr) = run(finetune, 0);
    for part in
        ["micro-batches chosen", "rows=", "DEBUG", "active adapter: default", "checkpoint-1", "wrote the adapter"]
    {
        assert!(stderr.contains(part), "{part} in {stderr}");
    }
    let bench = run(qlora("bench -vv --device cpu --m 1 --n 2048 --k 2048"), 0).1;
    assert!(bench.contains("memory of cpu has grown held_bytes="), "{bench}");
    if let Some(info) = common::adapters().first() {
        let (_, stderr) = run(qlora(&format!("bench -vv --device {} --m 1 --n 32 --k 32", info.index)), 0);
        for part in [&format!("device: {}", info.name), "tier=", "max_binding_bytes=", "compiled qmatmul"] {
            assert!(stderr.contains(part), "{part} in {stderr}");
        }
    }

    let mut filtered = qlora(&eval);
    filtered.env("QLORA_LOG", "qlora_wgpu::nn=info");
    let (_, stderr) = run(filtered, 0);
    assert!(stderr.contains("loaded ") && !stderr.contains("device: cpu"), "{stderr}");
    let mut wrong = qlora(&eval);
    wrong.env("QLORA_LOG", "qlora_wgpu=loud");
    let (_, stderr) = run(wrong, 1);
    assert!(stderr.starts_with("error: ") && stderr.contains("QLORA_LOG is qlora_wgpu=loud"), "{stderr}");
    run(qlora(&format!("{eval} -q -v")), 2);
}

#[test]
fn colours_come_where_they_are_wanted() {
    let line = "inspect ./no/such/file";
    let colored = |line: &str, variables: &[(&str, &str)], code| {
        let mut command = qlora(line);
        command.envs(variables.iter().copied());
        let (stdout, stderr) = run(command, code);
        let text = stdout + &stderr;
        assert!(text.contains("no/such/file") || text.contains("Usage"), "{text}");
        text.contains("\x1b[")
    };
    let force = ("CLICOLOR_FORCE", "1");
    assert!(!colored(line, &[], 1), "no terminal");
    assert!(colored(line, &[force], 1));
    assert!(!colored(line, &[("NO_COLOR", "1")], 1));
    for (choice, wanted) in [("always", true), ("never", false)] {
        for line in [format!("{line} --color {choice}"), format!("--color={choice} {line}")] {
            assert_eq!(colored(&line, &[if wanted { ("NO_COLOR", "1") } else { force }], 1), wanted, "{line}");
        }
        for (line, code) in [("--help", 0), ("eval", 2)] {
            assert_eq!(colored(&format!("{line} --color {choice}"), &[], code), wanted, "{line}");
        }
    }
    run(qlora(&format!("{line} --color sometimes")), 2);
}

#[test]
fn statuses_tell_errors_from_wrong_usage() {
    let setup = Setup::new();
    let (model, folder) = (setup.model.path().display(), setup.folder.path().display());
    // One sentence that says what to do.
    for (line, hint) in [
        ("bench --device nothing".to_owned(), "Install a Vulkan driver"),
        (format!("inspect {folder}"), "neither config.json nor adapter_config.json"),
        (format!("quantize {model}/model.safetensors {model}/model.safetensors"), "choose another output"),
        (format!("generate --model {model} --device cpu --prompt w1 --temperature=-1"), "must be at least 0"),
        (format!("plan --model {folder}"), "not a model directory"),
        (format!("eval --model {} --data {folder}/data.txt", path("llama").display()), "put the model's own there"),
        (format!("finetune --model {model} --data {folder}/none --output {folder}/run"), "no such file"),
    ] {
        let (stdout, stderr) = run(qlora(&line), 1);
        assert!(stdout.is_empty() && stderr.starts_with("error: ") && stderr.lines().count() == 1, "{line}: {stderr}");
        assert!(stderr.contains(hint), "{line}: {stderr}");
    }
    for line in ["", "nonsense", "inspect", "bench --m 0", "finetune --model x", "completions csh", "eval --use"] {
        let (stdout, stderr) = run(qlora(line), 2);
        assert!(stdout.is_empty() && stderr.contains("--help"), "{line}: {stderr}");
    }
}

#[test]
fn shells_can_read_their_completions() {
    let folder = tempfile::tempdir().unwrap();
    for (shell, parser) in [("bash", "bash"), ("zsh", "zsh"), ("fish", "fish"), ("powershell", ""), ("elvish", "")] {
        let (script, _) = run(qlora(&format!("completions {shell}")), 0);
        for word in ["finetune", "base-format", "completions"] {
            assert!(script.contains(word), "{word} for {shell}");
        }
        let file = folder.path().join(shell);
        std::fs::write(&file, script).unwrap();
        if let Some(status) = check_syntax(parser, &file) {
            assert!(status.status.success(), "{shell}: {}", String::from_utf8_lossy(&status.stderr));
        }
    }
}

/// `None` if this machine lacks the shell.
fn check_syntax(shell: &str, script: &Path) -> Option<Output> {
    if shell.is_empty() { None } else { Command::new(shell).arg("-n").arg(script).output().ok() }
}
