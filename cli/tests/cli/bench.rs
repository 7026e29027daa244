//! `qlora bench` with peers, and the files that it writes.
#![cfg(unix)]

use std::fs;
use std::path::Path;

use crate::common;
use assert_cmd::Command;
use serde_json::{Value, json};

/// The rows printed by a command line.
fn rows(line: &str, peer: &str) -> Value {
    let output = bench(line, peer).assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

/// The error of a command line that fails.
fn failure(line: &str, peer: &str) -> String {
    String::from_utf8(bench(line, peer).assert().code(1).get_output().stderr.clone()).unwrap()
}

fn bench(line: &str, peer: &str) -> Command {
    let mut command = Command::cargo_bin("qlora").unwrap();
    command.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER");
    command.args("bench --device cpu --json --double-quant".split(' ')).args(line.split(' '));
    command.args(["--against", peer]);
    command
}

/// Writes a shell script and returns the command that runs it.
fn script(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    format!("sh {}", path.display())
}

/// A peer that answers forward passes with 7 ms, except those with one row.
const PEER: &str = r#"echo '{"name": "a peer 1.0"}'
    while read -r line; do
        case $line in
        *'"m":1,'*) echo '{"skipped": "too small"}' ;;
        *'"op":"forward"'*'"double_quant":true'*) echo '{"ms_min": 6.5, "ms_median": 7.0}' ;;
        *) echo '{"ms_min": 9, "ms_median": 8}' ;;
        esac
    done"#;

#[test]
fn a_peer_is_timed_beside_us() {
    let folder = tempfile::tempdir().unwrap();
    let peer = script(folder.path(), "peer", PEER);
    let rows = rows("--n 64 --k 64 --m 1,8", &peer);
    assert_eq!(rows[0]["peers"][0], json!({"name": "a peer 1.0", "skipped": "too small"}));
    let (ours, timed) = (rows[1]["ms_median"].as_f64().unwrap(), &rows[1]["peers"][0]);
    assert_eq!((&timed["name"], timed["ms_median"].as_f64()), (&"a peer 1.0".into(), Some(7.0)));
    assert!((timed["ratio"].as_f64().unwrap() - 7.0 / ours).abs() < 1e-9);
}

#[test]
fn a_peer_that_does_not_do_its_part_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let line = "--n 64 --k 64 --m 8";
    let error = failure("--op backward --n 64 --k 64 --m 8", &script(folder.path(), "peer", PEER));
    assert!(error.contains("peer: answers with times of 9 and 8 ms"), "{error}");
    let error = failure(line, "/no/such/peer");
    assert!(error.contains("/no/such/peer: does not start") && error.lines().count() == 1, "{error}");
    let error = failure(line, &script(folder.path(), "none", "exit 3"));
    assert!(error.contains("has ended without an answer"), "{error}");
    let error = failure(line, &script(folder.path(), "mute", "echo '{}'"));
    assert!(error.contains("answers \"{}\"") && error.contains("name"), "{error}");
    let error =
        failure(line, &script(folder.path(), "wrong", "echo '{\"name\": \"x\"}'; read -r line; echo '{\"ms\": 1}'"));
    assert!(error.contains("answers \"{\\\"ms\\\": 1}\""), "{error}");
}

#[test]
fn a_run_becomes_a_file_and_a_plot() {
    let folder = tempfile::tempdir().unwrap();
    let peer = script(folder.path(), "peer", &PEER.replace("9, \"ms_median\": 8", "9, \"ms_median\": 9"));
    let (file, plot) = (folder.path().join("run.json"), folder.path().join("run.svg"));
    let step = "--tokens 8 --hidden 32 --ffn 64 --layers 1 --heads 2 --kv-heads 1 --vocabulary 40";
    let sizes = format!("--op forward,backward,step --n 64 --k 64 --m 1,8 --rank 4 {step}");
    let printed = rows(&format!("{sizes} --output {} --plot {}", file.display(), plot.display()), &peer);
    let report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let keys: Vec<_> = report.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["version", "date", "machine", "device", "driver", "rows"]);
    assert_eq!(report["rows"], printed);
    let cases: Vec<_> =
        printed.as_array().unwrap().iter().map(|row| (row["op"].as_str().unwrap(), &row["m"])).collect();
    let [one, eight] = [json!(1), json!(8)];
    let wanted = [("forward", &one), ("forward", &eight), ("backward", &one), ("backward", &eight), ("step", &eight)];
    assert_eq!(cases, wanted);
    assert_eq!((&report["version"], &report["device"]), (&env!("CARGO_PKG_VERSION").into(), &"cpu".into()));
    let date = report["date"].as_str().unwrap();
    assert!(date.len() == 20 && date.starts_with("20") && date.ends_with('Z'), "{date}");
    assert!(report["driver"].as_str().unwrap().ends_with("threads"), "{report}");
    let machine = &report["machine"];
    assert!(machine["cores"].as_u64().unwrap() > 0 && machine["memory_bytes"].as_u64().unwrap() > 1 << 20, "{machine}");
    assert!(
        machine["cpu"].is_string() && machine["os"].as_str().unwrap().len() > 1 && machine["load"].is_number(),
        "{machine}"
    );
    let svg = fs::read_to_string(&plot).unwrap();
    for text in ["forward, M = 1, 64 x 64", "backward, M = 8", "step of 8 tokens, 1 layers", "a peer 1.0", "9.00 ms"] {
        assert!(svg.contains(text), "{text} in {svg}");
    }
}

#[test]
fn a_profile_has_the_kernels_of_every_case() {
    let line = |device: &str| {
        let mut command = Command::cargo_bin("qlora").unwrap();
        command.env_remove("QLORA_DEVICE").env("QLORA_TUNE", "0");
        let sizes = "--op forward,backward --n 64 --k 64 --m 1,8 --rank 4";
        command.args(format!("bench --json --profile --device {device} {sizes}").split(' '));
        command.output().unwrap()
    };
    let cpu = line("cpu");
    let unsupported = |output: &std::process::Output| {
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("time of each kernel"), "{output:?}");
    };
    unsupported(&cpu);
    for info in common::adapters() {
        let output = line(&info.index.to_string());
        if !output.status.success() {
            // A backend without timestamps.
            unsupported(&output);
            continue;
        }
        let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(rows.as_array().unwrap().len(), 4);
        for row in rows.as_array().unwrap() {
            let kernels = row["profile"]["kernels"].as_array().unwrap();
            assert!(kernels.iter().all(|kernel| kernel["ms"].as_f64().unwrap() > 0.0), "{row}");
            assert!(!kernels.is_empty() && row["profile"]["outside_kernels"].is_number(), "{row}");
        }
    }
}

/// The command for llama.cpp's peer, with another program in place of `test-backend-ops`.
fn llama_cpp(program: &str) -> String {
    format!("python3 {} --release 1.2 {program}", common::model::repository("benches/peers/llama_cpp.py").display())
}

/// Stands in for llama.cpp's program: knows one row and eight, but has no product for eight.
const TEST_BACKEND_OPS: &str = r#"
    names='test_time, backend_name, op_name, op_params, supported, error_message, time_us, n_runs'
    case "$*" in
    *'no such case'*) printf 'Testing 1 devices\n\nBackend 1/2: Vulkan0\n  Skipping\nBackend 2/2: CPU\n  Device description: EPYC\n' ;;
    'perf -b CPU -o MUL_MAT -p ^type_a=q4_0,type_b=f32,m=64,n=1,k=32,'*'--output sql')
        echo 'CREATE TABLE IF NOT EXISTS test_backend_ops ('
        echo "INSERT INTO test_backend_ops ($names) VALUES ('now', 'CPU', 'MUL_MAT', 'type_a=q4_0,m=64,bs=[1,1]', '1', '', '2500.5', '36');" ;;
    *,m=64,n=8,k=32,*)
        echo "INSERT INTO test_backend_ops ($names) VALUES ('now', 'CPU', 'MUL_MAT', 'type_a=q4_0', '0', 'not supported', '0', '0');" ;;
    esac"#;

#[test]
fn llama_cpp_answers_with_what_its_program_prints() {
    let folder = tempfile::tempdir().unwrap();
    let peer = llama_cpp(&script(folder.path(), "test-backend-ops", TEST_BACKEND_OPS));
    let answers = rows("--op forward,backward --rank 0 --n 64 --k 32 --m 1,8,9", &peer);
    let answers: Vec<&Value> = answers.as_array().unwrap().iter().map(|row| &row["peers"][0]).collect();
    assert_eq!(
        (&answers[0]["name"], answers[0]["ms_median"].as_f64()),
        (&"llama.cpp 1.2, q4_0, CPU".into(), Some(2.5005))
    );
    let reasons = [
        "CPU has no product of q4_0 with m=64,n=8,k=32",
        "test-backend-ops has no case of q4_0 with m=64,n=9,k=32",
        "test-backend-ops times a product forward, no backward",
    ];
    for (answer, reason) in answers[1..].iter().zip(reasons) {
        assert_eq!(answer["skipped"], reason);
    }
}

#[test]
fn llama_cpp_that_is_not_there_is_an_error_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let line = "--rank 0 --n 64 --k 32 --m 1";
    let error = failure(line, &llama_cpp("/no/such/test-backend-ops"));
    assert!(
        error.contains("/no/such/test-backend-ops does not start") && error.contains("scripts/peers.sh"),
        "{error}"
    );
    assert!(error.contains("has ended without an answer; stderr says why"), "{error}");
    let program = script(folder.path(), "test-backend-ops", TEST_BACKEND_OPS);
    let error = failure(line, &llama_cpp(&format!("--backend CUDA0 {program}")));
    assert!(error.contains("llama.cpp has no backend CUDA0; it has: Vulkan0, CPU"), "{error}");
}
