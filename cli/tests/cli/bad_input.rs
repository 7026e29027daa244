//! Errors of `qlora eval` and `generate` for broken models, adapters and texts.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::model::{path, tokenizer, with_tokenizer};
use assert_cmd::Command;

fn qlora(command: &str, model: &Path) -> Command {
    let mut qlora = Command::cargo_bin("qlora").unwrap();
    qlora.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER").env("RUST_BACKTRACE", "1");
    qlora.arg(command).arg("--model").arg(model).args(["--device", "cpu"]);
    qlora
}

/// Runs a command that fails. Its one line on stderr must contain `parts`.
fn failure(command: &mut Command, parts: &[&str]) {
    let error = String::from_utf8(command.assert().code(1).get_output().stderr.clone()).unwrap();
    assert!(error.starts_with("error: ") && error.lines().count() == 1, "{error}");
    for part in parts {
        assert!(error.contains(part), "{part} in {error}");
    }
}

fn generate(model: &Path, arguments: &[&str], parts: &[&str]) {
    failure(qlora("generate", model).args(arguments), parts);
}

#[test]
fn prompts_and_settings() {
    let folder = with_tokenizer("llama");
    let model = folder.path();
    let text = qlora("generate", model)
        .args(["--prompt", "w1 w2", "--max-tokens", "2"])
        .assert()
        .success()
        .get_output()
        .clone();
    assert!(text.stdout.starts_with(b"w") && text.stderr.is_empty(), "{text:?}");
    generate(model, &["--prompt", ""], &["the prompt is empty"]);
    let long = "w1 ".repeat(128);
    generate(model, &["--prompt", &long], &["the prompt is 128 tokens", "128 positions", "shorten it"]);
    generate(model, &["--prompt", "w1", "--temperature", "-1"], &["the temperature is -1", "at least 0"]);
    generate(model, &["--prompt", "w1", "--temperature", "NaN"], &["the temperature is NaN"]);
    generate(model, &["--prompt", "w1", "--top-p", "-0.5"], &["top_p is -0.5"]);
    generate(model, &["--prompt", "w1", "--chat"], &["chat template is missing"]);
    qlora("generate", model).args(["--prompt", "w1", "--temperature", "hot"]).assert().code(2);
    qlora("generate", model).assert().code(2);
    qlora("generate", model).args(["--prompt", "w1", "--system", "s"]).assert().code(2);
}

#[test]
fn folders_and_files_of_another_kind() {
    let folder = with_tokenizer("llama");
    let text = folder.path().join("notes.txt");
    fs::write(&text, "Some text.").unwrap();
    generate(&text, &["--prompt", "w1"], &["notes.txt", "give a .gguf file, or a directory"]);
    let tensors = folder.path().join("model.safetensors");
    generate(&tensors, &["--prompt", "w1"], &["model.safetensors", "give the directory"]);
    generate(&path("adapter-lora"), &["--prompt", "w1"], &["adapter-lora", "--adapter"]);
    let none = folder.path().join("none.gguf");
    generate(&none, &["--prompt", "w1"], &["none.gguf", "no such file or directory"]);
    fs::remove_file(folder.path().join("config.json")).unwrap();
    generate(folder.path(), &["--prompt", "w1"], &[folder.path().to_str().unwrap(), "no config.json"]);
    fs::write(folder.path().join("a.gguf"), "").unwrap();
    generate(folder.path(), &["--prompt", "w1"], &["no config.json", "a.gguf"]);
}

#[test]
fn damaged_models() {
    let cut = |name: &str, len: usize, parts: &[&str]| {
        let folder = with_tokenizer("llama");
        let file = folder.path().join(name);
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..len]).unwrap();
        generate(folder.path(), &["--prompt", "w1"], &[&[file.to_str().unwrap()], parts].concat());
    };
    cut("model.safetensors", 5000, &["is truncated", "download it again"]);
    cut("model.safetensors", 4, &["too short"]);
    cut("config.json", 100, &["malformed", "download it again"]);
    cut("generation_config.json", 5, &["malformed", "download it again"]);
    cut("tokenizer.json", 100, &["malformed"]);

    let folder = with_tokenizer("llama");
    fs::write(folder.path().join("tokenizer.json"), tokenizer(200)).unwrap();
    let name = folder.path().to_str().unwrap();
    generate(folder.path(), &["--prompt", "w1"], &[name, "200 tokens", "128", "belongs to another model"]);
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    generate(folder.path(), &["--prompt", "w1"], &[name, "no tokenizer.json"]);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    generate(folder.path(), &["--prompt", "w1"], &[name, "neither model.safetensors nor"]);
    let gguf = folder.path().join("cut.gguf");
    fs::write(&gguf, b"GGUF\x03\0\0\0\x01\0").unwrap();
    generate(&gguf, &["--prompt", "w1"], &["cut.gguf", "is truncated", "download it again"]);
}

#[test]
fn adapters() {
    let folder = with_tokenizer("llama");
    let with = |adapter: PathBuf, parts: &[&str]| {
        generate(folder.path(), &["--prompt", "w1", "--adapter", adapter.to_str().unwrap()], parts);
    };
    with(
        path("../smollm2/adapter-init"),
        &["adapter-init: does not fit the model", "its base is SmolLM2-135M-Instruct"],
    );
    with(path("llama"), &["llama: not a PEFT adapter directory", "adapter_config.json"]);
    with(path("adapter-none"), &["adapter-none", "no such file or directory"]);

    let adapter = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(path("adapter-lora").join(name), adapter.path().join(name)).unwrap();
    }
    let tensors = fs::read(adapter.path().join("adapter_model.safetensors")).unwrap();
    fs::write(adapter.path().join("adapter_model.safetensors"), &tensors[..tensors.len() / 2]).unwrap();
    with(adapter.path().into(), &["adapter_model.safetensors", "is truncated", "download it again"]);
    fs::remove_file(adapter.path().join("adapter_model.safetensors")).unwrap();
    with(adapter.path().into(), &["adapter_model.safetensors"]);
}

#[test]
fn data() {
    let folder = with_tokenizer("llama");
    let with = |name: &str, text: &[u8], parts: &[&str]| {
        let data = folder.path().join(name);
        fs::write(&data, text).unwrap();
        failure(qlora("eval", folder.path()).arg("--data").arg(&data), &[&[data.to_str().unwrap()], parts].concat());
    };
    with("empty.jsonl", b"", &["no examples"]);
    with("empty.txt", b"", &["is empty"]);
    with("train.csv", b"question,answer\na,b\n", &["comma-separated values", "question, answer"]);
    with("train.jsonl", b"\x1f\x8b\x08\0", &["compressed with gzip"]);
    with("cut.jsonl", b"{\"text\": \"w1\"}\n{\"text\": ", &["line 2"]);
    with("ids.jsonl", b"{\"input_ids\": [1, 500]}", &["line 1", "500", "128"]);
    with("bytes.txt", b"w1 \xff w2", &["UTF-8"]);
    failure(qlora("eval", folder.path()).arg("--data").arg(folder.path()), &[folder.path().to_str().unwrap()]);
    qlora("eval", folder.path()).assert().code(2);
}
