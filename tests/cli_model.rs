//! `qlora eval` and `qlora generate` on small models.

mod common;

use assert_cmd::Command;
use common::model::{distance, f32s, file, i64s, path};
use qlora_wgpu::formats::safetensors::SafetensorsFile;
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
