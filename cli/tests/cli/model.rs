//! `qlora eval` and `qlora generate` on small models.

use std::path::{Path, PathBuf};

use crate::common::model::{distance, f32s, file, i64s, path};
use assert_cmd::Command;
use qlora_wgpu::internal::safetensors::SafetensorsFile;
use serde_json::{Value, json};

fn qlora(command: &str, model: &str) -> Command {
    let mut qlora = Command::cargo_bin("qlora").unwrap();
    qlora.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER").arg(command).arg("--model").arg(path(model));
    qlora.args(["--device", "cpu"]);
    qlora
}

fn failure(command: &mut Command) -> String {
    String::from_utf8(command.assert().code(1).get_output().stderr.clone()).unwrap()
}

#[test]
fn token_ids_are_evaluated_without_a_tokenizer_and_logits_are_those_of_transformers() {
    let golden = file("llama.golden_logits.safetensors");
    let (ids, [rows, length]) = i64s(&golden, "input_ids");
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data.jsonl"), folder.path().join("logits.safetensors"));
    let lines: Vec<String> =
        ids.chunks(length).map(|ids| json!({"input_ids": ids, "labels": ids}).to_string()).collect();
    std::fs::write(&data, lines.join("\n")).unwrap();
    for (model, key) in [("llama", "logits.base_fp32"), ("llama-bnb-nf4_dq", "logits.nf4_dq_dequant")] {
        let mut command = qlora("eval", model);
        command.arg("--data").arg(&data).arg("--dump-logits").arg(&out).arg("--json");
        let found: Value = serde_json::from_slice(&command.assert().success().get_output().stdout).unwrap();

        let dumped = SafetensorsFile::open(&out).unwrap();
        assert_eq!(i64s(&dumped, "input_ids").0, ids);
        let (logits, wanted) = (f32s(&dumped, "logits"), f32s(&golden, key));
        assert_eq!(dumped.get("logits").unwrap().shape, [rows, length, 128]);
        assert!(distance(&logits, &wanted) < 1e-4, "{model}");

        let mut loss = 0.0;
        for at in (0..ids.len()).filter(|at| (at + 1) % length > 0) {
            let row = &wanted[at * 128..][..128];
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            loss += sum.ln() - f64::from(row[ids[at + 1] as usize]);
        }
        let tokens = rows * (length - 1);
        let got = found["loss"].as_f64().unwrap();
        assert!((got - loss / tokens as f64).abs() < 1e-5, "{found}");
        assert!((found["perplexity"].as_f64().unwrap() - got.exp()).abs() < 1e-9);
        assert_eq!(found["tokens"].as_u64().unwrap() as usize, tokens);
    }
}

#[test]
fn what_is_missing_is_named_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "Some text.").unwrap();

    let error = failure(qlora("eval", "no-such-model").arg("--data").arg(&text));
    assert!(error.contains("no-such-model") && error.contains("no such file or directory"), "{error}");
    let error = failure(qlora("eval", "llama").arg("--data").arg(folder.path().join("none.jsonl")));
    assert!(error.contains("none.jsonl"), "{error}");
    let error = failure(qlora("eval", "llama").arg("--data").arg(&text));
    assert!(error.contains("tokenizer.json"), "{error}");
    let error = failure(qlora("generate", "llama").args(["--prompt", "Hello"]));
    assert!(error.contains("tokenizer.json"), "{error}");
    let error = failure(qlora("generate", "llama").args(["--prompt", "Hello", "--temperature=-1"]));
    assert!(error.contains("temperature"), "{error}");
    let error = failure(qlora("generate", "llama").args(["--prompt", "Hello", "--adapter", "nowhere"]));
    assert!(error.contains("nowhere"), "{error}");
    assert_eq!(error.trim().lines().filter(|line| !line.contains("XDG_RUNTIME_DIR")).count(), 1, "{error}");

    let bad = folder.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [1, 2, \"x\"]}\n").unwrap();
    let error = failure(qlora("eval", "llama").arg("--data").arg(&bad));
    assert!(error.contains("bad.jsonl") && error.contains("line 2"), "{error}");
    let mut skipping = qlora("eval", "llama");
    skipping.arg("--data").arg(&bad).arg("--skip-bad-lines");
    let stdout = String::from_utf8(skipping.assert().success().get_output().stdout.clone()).unwrap();
    assert!(stdout.contains("2 tokens"), "{stdout}");
}

/// Data with the ids that the adapters' logits were recorded for, and a path to dump logits to.
fn adapter_data(folder: &Path) -> (PathBuf, PathBuf) {
    let (ids, [_, length]) = i64s(&file("llama.golden_adapter_logits.safetensors"), "input_ids");
    let (data, out) = (folder.join("data.jsonl"), folder.join("logits.safetensors"));
    let lines: Vec<String> =
        ids.chunks(length).map(|ids| json!({"input_ids": ids, "labels": ids}).to_string()).collect();
    std::fs::write(&data, lines.join("\n")).unwrap();
    (data, out)
}

#[test]
fn one_of_several_adapters_is_chosen_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = adapter_data(folder.path());
    let golden = file("llama.golden_adapter_logits.safetensors");
    let run = |arguments: &[&str]| {
        let mut command = qlora("eval", "llama-bnb-nf4_dq");
        command.arg("--data").arg(&data).arg("--dump-logits").arg(&out).args(arguments);
        command.assert().success();
        f32s(&SafetensorsFile::open(&out).unwrap(), "logits")
    };
    let base = run(&[]);
    // Adapters with different targets and ranks, and with magnitudes.
    let adapters = ["lora", "dora", "rslora_qv"];
    let named: Vec<String> = adapters
        .iter()
        .map(|name| format!("--adapter={name}={}", path(&format!("adapter-{name}")).display()))
        .collect();
    let all = |name: &'static str| -> Vec<&str> { named.iter().map(String::as_str).chain(["--use", name]).collect() };
    for name in adapters {
        let got = run(&all(name));
        assert!(distance(&got, &f32s(&golden, &format!("logits.{name}"))) < 1e-4, "{name}");
        let directory = path(&format!("adapter-{name}"));
        assert!(got == run(&["--adapter", directory.to_str().unwrap()]), "{name} alone has no other logits");
        assert!(distance(&got, &base) > 1e-3, "{name} changes something");
    }
    assert!(run(&all("base")) == base && run(&all("none")) == base);

    // One after the other gives the same as each on its own.
    let report = |uses: &[&str]| -> Value {
        let mut command = qlora("eval", "llama-bnb-nf4_dq");
        command.arg("--data").arg(&data).arg("--json").args(&named);
        command.args(uses.iter().flat_map(|name| ["--use", *name]));
        serde_json::from_slice(&command.assert().success().get_output().stdout).unwrap()
    };
    let together = report(&["dora", "base", "lora", "dora"]);
    for (at, name) in ["dora", "base", "lora", "dora"].into_iter().enumerate() {
        assert_eq!(together[at], report(&[name]), "{name}");
        assert_eq!(together[at]["adapter"], if name == "base" { Value::Null } else { name.into() });
    }
    assert!(together[0]["loss"] != together[1]["loss"] && together.as_array().unwrap().len() == 4);

    let fails = |arguments: &[&str], parts: &[&str]| {
        let error = failure(qlora("eval", "llama").arg("--data").arg(&data).args(arguments));
        for part in parts {
            assert!(error.contains(part), "{part} in {error}");
        }
    };
    fails(&all("other"), &["no adapter named \"other\"", "loaded: lora, dora, rslora_qv"]);
    fails(&["--use", "lora"], &["no adapter named \"lora\"", "loaded: none"]);
    fails(&[&named[0], &named[1]], &["--use is not given", "lora, dora, or base"]);
    fails(&[&named[0], &named[0], "--use", "lora"], &["the name of two adapters is lora", "NAME=DIR"]);
    let dump = out.display().to_string();
    fails(&[&named[0], "--use=lora", "--use=base", "--dump-logits", &dump], &["--use is 2 times", "of one adapter"]);
    fails(&["--adapter", "a=nowhere"], &["error: nowhere: no such file or directory"]);
    let model = format!("a={}", path("llama").display());
    fails(&["--adapter", &model], &["llama: not a PEFT adapter directory"]);
}

#[test]
fn an_adapter_of_another_base_is_used_with_a_warning_that_names_both() {
    let folder = tempfile::tempdir().unwrap();
    let (data, _) = adapter_data(folder.path());
    let named = folder.path().join("Tiny-Llama-NF4");
    std::fs::create_dir(&named).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(path("llama").join(name), named.join(name)).unwrap();
    }
    let stderr = |model: &str| {
        let mut command = qlora("eval", model);
        command.arg("--data").arg(&data).arg("--adapter").arg(path("adapter-lora")).arg("--quiet");
        String::from_utf8(command.assert().success().get_output().stderr.clone()).unwrap()
    };
    let warning = stderr("qwen2/../llama");
    let parts = ["warning: ", "adapter-lora: was trained on tiny-llama, not on ", "qwen2/../llama"];
    assert!(parts.iter().all(|part| warning.contains(part)) && warning.lines().count() == 1, "{warning}");
    assert_eq!(stderr(named.to_str().unwrap()), "", "a name in other letters, and with a format at its end");
}
