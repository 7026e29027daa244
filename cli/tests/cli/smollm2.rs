//! The command with SmolLM2-135M-Instruct, compared with the reference's recorded answers.

use crate::common::model::{repository, smollm2};
use serde_json::Value;

fn json() -> Value {
    let golden = std::fs::read(repository("tests/golden/smollm2/smollm2.golden.json")).unwrap();
    serde_json::from_slice(&golden).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn the_command_answers_and_evaluates_as_the_reference_does() {
    let run = |arguments: &[&str]| {
        let mut command = assert_cmd::Command::cargo_bin("qlora").unwrap();
        command.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER").arg(arguments[0]).arg("--model").arg(smollm2());
        let output =
            command.args(["--device", "cpu"]).args(&arguments[1..]).assert().success().get_output().stdout.clone();
        String::from_utf8(output).unwrap()
    };
    let question = ["--chat", "--prompt", "What is the capital of France?"];
    let answer = run(&[&["generate"][..], &question, &["--max-tokens", "20"]].concat());
    assert_eq!(answer, "The capital of France is Paris.\n");
    let cut = run(&[&["generate"][..], &question, &["--stop", " is"]].concat());
    assert_eq!(cut, "The capital of France\n");

    let golden = json();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.jsonl");
    std::fs::write(&data, serde_json::json!({ "input_ids": golden["nll"]["ids"] }).to_string()).unwrap();
    let found: Value = serde_json::from_str(&run(&["eval", "--data", data.to_str().unwrap(), "--json"])).unwrap();
    let wanted = golden["nll"]["mean_nll"].as_f64().unwrap();
    assert!((found["loss"].as_f64().unwrap() - wanted).abs() < 1e-4, "{found} {wanted}");
    assert_eq!(found["tokens"].as_u64().unwrap() as usize, ids(&golden["nll"]["ids"]).len() - 1);
}

#[test]
#[cfg(target_os = "linux")]
fn loading_takes_less_than_twice_the_file_in_memory() {
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    command.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER").arg("generate").arg("--model").arg(smollm2());
    command.args(["--device", "cpu", "--prompt", "Once", "--max-tokens", "2"]).stdout(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    // The process's maximum memory, read while it runs.
    let mut peak_kib = 0;
    while child.try_wait().unwrap().is_none() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line =
            status.lines().find_map(|line| line.strip_prefix("VmHWM:")).and_then(|l| l.split_whitespace().next());
        peak_kib = line.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(peak_kib);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(child.wait().unwrap().success());
    let file = std::fs::metadata(smollm2()).unwrap().len();
    println!("peak {} MiB, file {} MiB", peak_kib >> 10, file >> 20);
    assert!(peak_kib << 10 > file / 2, "the peak was not seen: {peak_kib} KiB");
    assert!(peak_kib << 10 < 2 * file, "{peak_kib} KiB at the peak for a file of {} KiB", file >> 10);
}
