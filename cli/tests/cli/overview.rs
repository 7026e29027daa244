//! `qlora` as users meet it: help, devices, bench, demo, wrong usage.

use crate::common;
use assert_cmd::Command;
use serde_json::Value;

fn qlora() -> Command {
    let mut command = Command::cargo_bin("qlora").unwrap();
    command.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER");
    command
}

fn stdout(command: &mut Command) -> String {
    String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
}

/// Standard error of a run that ends with this exit code, without drivers' own messages.
fn failure(command: &mut Command, code: i32) -> String {
    let stderr = String::from_utf8(command.assert().code(code).get_output().stderr.clone()).unwrap();
    stderr.lines().filter(|line| !line.contains("XDG_RUNTIME_DIR")).collect::<Vec<_>>().join("\n")
}

#[test]
fn help_names_every_command_and_variable() {
    let help = stdout(qlora().arg("--help"));
    let commands = [
        "devices",
        "inspect",
        "quantize",
        "dequantize",
        "finetune",
        "plan",
        "eval",
        "generate",
        "bench",
        "demo",
        "completions",
    ];
    let others = ["QLORA_DEVICE", "QLORA_TIER", "QLORA_LOG", "NO_COLOR", "Exit status: 0 done, 1", "130"];
    for word in commands.into_iter().chain(others) {
        assert!(help.contains(word), "{word} in:\n{help}");
    }
    for command in commands {
        assert!(!stdout(qlora().args([command, "--help"])).is_empty());
    }
    assert!(stdout(qlora().arg("--version")).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn devices_lists_the_cpu_and_every_adapter() {
    let found: Value = serde_json::from_str(&stdout(qlora().args(["devices", "--json"]))).unwrap();
    let found = found.as_array().unwrap();
    assert_eq!((found[0]["name"].as_str(), found[0]["index"].as_u64()), (Some("cpu"), Some(0)));
    let table = stdout(qlora().arg("devices"));
    for info in common::adapters() {
        let listed = &found[info.index];
        assert_eq!(listed["name"].as_str(), Some(info.name.as_str()));
        assert!(listed["tiers"].as_array().unwrap().iter().any(|tier| tier == &listed["tier"]));
        assert!(table.contains(&info.name), "{table}");
    }
}

#[test]
fn bench_prints_a_row_a_case_with_every_field() {
    let devices = std::iter::once("cpu".to_owned()).chain(common::adapters().into_iter().map(|info| info.name));
    for device in devices {
        let run =
            stdout(
                qlora()
                    .args(["bench", "--device", &device, "--json", "--m", "1,20", "--n", "40", "--k", "64,128"])
                    .args(["--rank", "4", "--format", "nf4", "--double-quant"]),
            );
        let rows: Value = serde_json::from_str(&run).unwrap();
        let rows = rows.as_array().unwrap();
        assert_eq!(rows.len(), 4);
        for row in rows {
            let mut keys: Vec<_> = row.as_object().unwrap().keys().map(String::as_str).collect();
            keys.sort_unstable();
            let mut wanted = [
                "op",
                "device",
                "adapter",
                "tier",
                "format",
                "double_quant",
                "m",
                "n",
                "k",
                "rank",
                "ms_min",
                "ms_median",
                "gflops",
                "weight_gb_per_s",
                "max_rel_err_vs_cpu",
            ];
            wanted.sort_unstable();
            assert_eq!(keys, wanted);
            assert_eq!((row["op"].as_str(), row["double_quant"].as_bool()), (Some("forward"), Some(true)));
            assert_eq!(row["adapter"].as_str(), Some(device.as_str()));
            assert!(row["ms_median"].as_f64().unwrap() > 0.0);
            let allowed = if row["tier"].as_str().unwrap().contains("f16") { 2e-3 } else { 1e-5 };
            assert!(row["max_rel_err_vs_cpu"].as_f64().unwrap() < allowed, "{row}");
        }
    }
    let small = ["bench", "--device", "cpu", "--m", "1", "--n", "32", "--k", "32", "--rank", "0"];
    for op in ["forward", "backward"] {
        let table = stdout(qlora().args(small).args(["--op", op]));
        assert!(table.starts_with("cpu\n") && table.contains("GFLOP/s") && table.contains(op), "{table}");
    }
}

#[test]
fn every_device_is_checked_against_the_cpu() {
    let found: Value = serde_json::from_str(&stdout(qlora().args(["devices", "--check", "--json"]))).unwrap();
    for device in found.as_array().unwrap() {
        let check = device["check"].as_array().unwrap();
        assert_eq!(check.iter().map(|row| row["m"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 256], "{device}");
        for row in check {
            assert!(
                row["agrees"] == true && row["error"].is_null() && row["ms_median"].as_f64().unwrap() > 0.0,
                "{row}"
            );
            assert!(row["max_rel_err_vs_cpu"].as_f64().unwrap() <= 2e-3, "{row}");
        }
    }
    let text = stdout(qlora().args(["devices", "--check"]));
    assert!(text.contains("4.127 bits per weight") && text.contains("Every device agrees"), "{text}");
    for info in common::adapters() {
        assert!(text.matches(&info.name).count() >= 3, "listed, and measured twice: {text}");
    }
}

#[test]
fn the_demo_trains_and_a_second_one_has_a_folder_of_its_own() {
    let here = tempfile::tempdir().unwrap();
    let demo = |arguments: &[&str]| stdout(qlora().arg("demo").args(arguments).current_dir(here.path()));
    let text = demo(&["--device", "cpu", "--steps", "12"]);
    let loss = |end: &str| -> f64 {
        let before = &text[..text.find(end).unwrap_or_else(|| panic!("{end} in {text}"))];
        before.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!((loss(" before, ") - 3.876).abs() < 2e-3 && loss(" after\n") < 3.8, "{text}");
    assert_eq!(text.matches("  before: ").count(), 4);
    let run = here.path().join("qlora-demo/adapter");
    for name in ["adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "loss.png", "loss.svg"] {
        assert!(run.join(name).is_file(), "{name}");
    }

    let report: Value = serde_json::from_str(&demo(&["--device", "cpu", "--steps", "1", "--json"])).unwrap();
    assert_eq!((&report["output"], &report["steps"]), (&"qlora-demo-2/adapter".into(), &1.into()));
    assert!((report["eval_loss_before"].as_f64().unwrap() - 3.876).abs() < 2e-3, "{report}");
    assert_eq!(report["definitions"].as_array().unwrap().len(), 4);
    let mut again = qlora();
    again.args(["demo", "--device", "cpu", "--output", "qlora-demo"]).current_dir(here.path());
    let error = failure(&mut again, 1);
    assert!(error.contains("qlora-demo") && error.contains("another run"), "{error}");

    let mut command = qlora();
    command.args(["demo", "--model", "./no/such/model.gguf"]).current_dir(here.path());
    let error = failure(&mut command, 1);
    assert!(error.contains("no such file"), "{error}");
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 2, "a folder that is not needed");
}

#[test]
fn the_environment_chooses_device_and_tier() {
    let run = |name: &str, tier: &str| {
        let mut command = qlora();
        command.args(["bench", "--json", "--m", "9", "--n", "8", "--k", "32", "--rank", "1"]);
        command.env("QLORA_DEVICE", name).env("QLORA_TIER", tier);
        command
    };
    let row = |mut command: Command| serde_json::from_str::<Value>(&stdout(&mut command)).unwrap()[0].clone();
    assert_eq!(row(run("cpu", ""))["device"], "cpu");
    for info in common::adapters() {
        for tier in &info.tiers {
            let row = row(run(&info.index.to_string(), tier));
            assert_eq!(
                (row["adapter"].as_str(), row["tier"].as_str()),
                (Some(info.name.as_str()), Some(tier.as_str()))
            );
        }
        let error = failure(&mut run(&info.index.to_string(), "fastest"), 1);
        assert!(error.starts_with("error: ") && error.contains("fastest") && error.contains("plain"), "{error}");
    }
}

#[test]
fn wrong_usage_and_wrong_input_are_told_apart() {
    let error = failure(qlora().args(["bench", "--device", "no such thing"]), 1);
    assert!(error.contains("no such thing") && error.lines().count() == 1, "{error}");
    let error = failure(qlora().args(["bench", "--device", "cpu", "--m", "0", "--n", "8", "--k", "8"]), 2);
    assert!(error.contains("--m"), "{error}");
    let error = failure(qlora().args(["bench", "--device", "cpu", "--rank", "99999999999999"]), 2);
    assert!(error.contains("--rank"), "{error}");
    failure(qlora().args(["bench", "--format", "nf5"]), 2);
    failure(qlora().args(["bench", "--block", "7"]), 2);
    failure(&mut qlora(), 2);
    let error = failure(qlora().args(["quantize", "no/such/file.safetensors", "out.safetensors"]), 1);
    assert!(error.contains("no/such/file.safetensors"), "{error}");
}
