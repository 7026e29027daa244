//! `qlora finetune`: recorded PEFT runs by the command alone, memory, settings files, and bad
//! input.

use std::fs;
use std::process::Output;

use crate::common;
use crate::common::model::{i64s, path};
use crate::common::run::{Setup, adapter, fail, metrics, qlora, succeed, text};
use qlora_wgpu::formats::peft::PeftConfig;
use qlora_wgpu::internal::safetensors::SafetensorsFile;
use serde_json::{Value, json};

/// Lines of a recorded run's micro-batches, without padding.
fn recorded_lines(name: &str, micro_batches: usize) -> Vec<String> {
    let file = SafetensorsFile::open(path(name).join("batches.safetensors")).unwrap();
    let mut lines = Vec::new();
    for index in 0..micro_batches {
        let read = |what: &str| i64s(&file, &format!("batch{index}.{what}"));
        let ((ids, [_, length]), (labels, _)) = (read("input_ids"), read("labels"));
        let mask = file.get(&format!("batch{index}.attention_mask")).map(|_| read("attention_mask").0);
        for row in 0..ids.len() / length {
            let kept: Vec<usize> = (row * length..(row + 1) * length)
                .filter(|&at| mask.as_ref().is_none_or(|mask| mask[at] != 0))
                .collect();
            let of = |values: &[i64]| kept.iter().map(|&at| values[at]).collect::<Vec<_>>();
            lines.push(json!({ "input_ids": of(&ids), "labels": of(&labels) }).to_string());
        }
    }
    lines
}

fn check_recorded(device: &str, name: &str, micro_batches: usize, arguments: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let (data, output) = (folder.path().join("data.jsonl"), folder.path().join("run"));
    let lines = recorded_lines(name, micro_batches);
    let rows = (lines.len() / micro_batches).to_string();
    fs::write(&data, lines.join("\n")).unwrap();
    let mut command = qlora(&["finetune", "--device", device, "--no-shuffle", "--no-packing", "--model"]);
    command.arg(path("llama-bnb-nf4_dq")).arg("--data").arg(&data).arg("--output").arg(&output);
    command.arg("--init-adapter").arg(path(name).join("adapter-init")).args(["--batch-size", &rows]).args(arguments);
    succeed(command);

    let curve: Value = serde_json::from_slice(&fs::read(path(name).join("curve.json")).unwrap()).unwrap();
    let (got, wanted) = (metrics(&output), curve["records"].as_array().unwrap());
    assert_eq!(got.len(), wanted.len());
    for (got, wanted) in got.iter().zip(wanted) {
        assert_eq!(got["step"].as_u64().unwrap(), wanted["step"].as_u64().unwrap() + 1);
        for key in ["loss", "grad_norm", "lr"] {
            let (got, wanted) = (got[key].as_f64().unwrap(), wanted[key].as_f64().unwrap());
            assert!((got / wanted - 1.0).abs() < 1e-4, "{device} {name}: {key} {got} instead of {wanted}");
        }
    }
}

const BASIC20: (&str, usize, &[&str]) = (
    "train-basic20",
    1,
    &["--max-steps", "20", "--lr", "5e-3", "--schedule", "constant", "--warmup", "0", "--clip", "0"],
);
const FULL: (&str, usize, &[&str]) = (
    "train-full",
    12,
    &["--epochs", "1", "--grad-accum", "2", "--lr", "2e-3", "--warmup", "2", "--weight-decay", "0.1", "--clip", "0.5"],
);

#[test]
fn recorded_runs_of_peft_on_the_cpu() {
    for (name, micro_batches, arguments) in [BASIC20, FULL] {
        check_recorded("cpu", name, micro_batches, arguments);
    }
}

#[test]
fn recorded_runs_of_peft_on_a_gpu() {
    // In f32. Other tiers are tested through the library.
    if let Some(device) = common::gpus_with(|options| options.tier = Some(qlora_wgpu::Tier::Software)).first() {
        for (name, micro_batches, arguments) in [BASIC20, FULL] {
            check_recorded(device.name(), name, micro_batches, arguments);
        }
    }
}

#[test]
fn memory_does_not_grow_over_300_steps() {
    let setup = Setup::new(40);
    succeed(setup.finetune("run", &["--max-steps", "300", "--no-shuffle", "--save-every", "0"]));
    let text = fs::read_to_string(setup.output("run").join("metrics.jsonl")).unwrap();
    let peaks: Vec<u64> =
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["peak_bytes"].as_u64().unwrap()).collect();
    assert!(peaks[0] > 0);
    // Every row was seen by then. What remains is how the tasks of two threads overlap, as each
    // decodes its own tiles.
    assert!(peaks[299] as f64 <= 1.02 * peaks[40] as f64, "{} bytes became {}", peaks[40], peaks[299]);
}

/// Peak bytes that a run reports, for three configurations. Rows have equal length, so all steps
/// are equally large.
#[test]
fn the_plan_says_what_the_run_then_takes() {
    let setup = Setup::new(0);
    let line = |i: u32| json!({ "input_ids": (0..48).map(|j| (i * 7 + j * j) % 128).collect::<Vec<u32>>() });
    fs::write(&setup.data, (0..24).map(|i| line(i).to_string() + "\n").collect::<String>()).unwrap();
    let cases: [&[&str]; 3] =
        [&["--rank", "4"], &["--rank", "8", "--dora", "--grad-accum", "2"], &["--targets", "q_proj,down_proj"]];
    for (index, case) in cases.into_iter().enumerate() {
        for checkpoint in [&[][..], &["--checkpoint-activations"]] {
            let flags = [case, checkpoint, &["--seq-len", "48"]].concat();
            let name = format!("run{index}{}", checkpoint.len());
            succeed(setup.finetune(&name, &[&flags[..], &["--max-steps", "3"]].concat()));
            let text = fs::read_to_string(setup.output(&name).join("metrics.jsonl")).unwrap();
            let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
            // Exactly the flags of the run.
            let mut plan = qlora(&["plan", "--json"]);
            plan.args(setup.finetune(&name, &flags).get_args().skip(1));
            let plan: Value = serde_json::from_slice(&succeed(plan).stdout).unwrap();
            let (got, planned) = (last["peak_bytes"].as_f64().unwrap(), plan["peak_bytes"].as_f64().unwrap());
            println!("{flags:?}: {got} of {planned}");
            assert!((got / planned - 1.0).abs() <= 0.05, "{flags:?}: {got} bytes, planned {planned}");
        }
    }
}

#[test]
fn an_adapter_to_go_on_with_becomes_one_of_this_model() {
    let setup = Setup::new(4);
    let initial = path("train-full/adapter-init");
    let arguments = ["--max-steps", "1", "--init-adapter", initial.to_str().unwrap()];
    succeed(setup.finetune("run", &arguments));
    let config = PeftConfig::read(setup.output("run")).unwrap();
    let base = Some(path("llama").display().to_string());
    assert_eq!(config, PeftConfig { base_model_name_or_path: base, ..PeftConfig::read(&initial).unwrap() });
    // It also counts as the same run, with nothing left to do.
    let output = succeed(setup.finetune("run", &[&arguments[..], &["--resume"]].concat()));
    assert!(text(&output.stderr).contains("finished"), "{}", text(&output.stderr));
    let message = fail(setup.finetune("run", &["--max-steps", "1", "--rank", "4", "--resume"]), 1);
    assert!(message.contains("--init-adapter"), "{message}");
}

#[test]
fn early_stopping_keeps_the_best_adapter() {
    let setup = Setup::new(20);
    let arguments =
        ["--max-steps", "400", "--lr", "0.05", "--eval-split", "0.3", "--eval-every", "2", "--early-stop", "3"];
    let output = succeed(setup.finetune("run", &arguments));
    assert!(text(&output.stdout).contains("ended after"), "{}", text(&output.stdout));
    let run = setup.output("run");
    let losses: Vec<f64> = metrics(&run).iter().filter_map(|record| record["eval_loss"].as_f64()).collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(losses[losses.len() - 4], best, "{losses:?}");
    assert_eq!(adapter(&run), adapter(&run.join("best")));
}

#[test]
fn json_sums_up_the_metrics_and_quiet_leaves_only_that() {
    let setup = Setup::new(20);
    let arguments = ["--max-steps", "6", "--eval-split", "0.3", "--eval-every", "2", "--json", "--quiet"];
    let run = setup.output("run");
    let output = succeed(setup.finetune("run", &arguments));
    assert_eq!(chatter_left_out(&output), "");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let evals: Vec<&Value> = records.iter().map(|record| &record["eval_loss"]).filter(|loss| !loss.is_null()).collect();
    let last = records.last().unwrap();
    assert_eq!((&report["end"], &report["output"]), (&json!("finished"), &json!(run)));
    assert_eq!((&report["steps"], &report["loss"], &report["tokens"]), (&json!(6), &last["loss"], &last["tokens"]));
    assert_eq!((&report["eval_loss_before"], &report["eval_loss"]), (evals[0], evals[evals.len() - 1]));
    assert!(evals.contains(&&report["best_eval_loss"]) && report["peak_bytes"] == last["peak_bytes"], "{report}");
    let rates: Vec<f64> = records.iter().filter_map(|record| record["tokens_per_second"].as_f64()).collect();
    let (least, most) = rates.iter().fold((f64::MAX, 0.0_f64), |(a, b), &rate| (a.min(rate), b.max(rate)));
    let rate = report["tokens_per_second"].as_f64().unwrap();
    assert!(rates.len() == 6 && least * 0.999 <= rate && rate <= most * 1.001, "{rate} of {rates:?}");

    let output = succeed(setup.finetune("silent", &["--max-steps", "1", "-q"]));
    assert_eq!((text(&output.stdout), chatter_left_out(&output)), (String::new(), String::new()));
    assert!(!adapter(&setup.output("silent")).is_empty());
}

/// Standard error without drivers' messages.
fn chatter_left_out(output: &Output) -> String {
    text(&output.stderr).lines().filter(|line| !line.contains("XDG_RUNTIME_DIR")).collect()
}

#[test]
fn settings_may_come_from_a_file() {
    let setup = Setup::new(10);
    let file = setup.output("run.toml");
    let data = setup.data.display();
    fs::write(&file, format!("data = '{data}'\nmax-steps = 3\nrank = 2\nlr = 1e-3\ntargets = ['q_proj', 'v_proj']\n"))
        .unwrap();
    // Global flags may come before the command's name.
    let mut command =
        qlora(&["--color", "never", "-q", "finetune", "--device", "cpu", "--lr", "2e-3", "--warmup", "0", "--model"]);
    command.arg(path("llama")).arg("--output").arg(setup.output("run")).arg("--config").arg(&file);
    succeed(command);
    let run = setup.output("run");
    let config: Value = serde_json::from_slice(&fs::read(run.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((config["r"].as_u64(), config["target_modules"].as_array().unwrap().len()), (Some(2), 2));
    assert_eq!(config["base_model_name_or_path"], path("llama").to_str().unwrap());
    let records = metrics(&run);
    assert_eq!(records.len(), 3);
    assert!((records[0]["lr"].as_f64().unwrap() - 2e-3).abs() < 1e-9, "{records:?}");

    // A resumed run keeps its batch size, whatever memory is free by then.
    let mut command = qlora(&["finetune", "--device", "cpu", "--lr", "2e-3", "--warmup", "0", "--model"]);
    command
        .arg(path("llama"))
        .arg("--output")
        .arg(&run)
        .arg("--config")
        .arg(&file)
        .args(["--resume", "--memory", "1KiB"]);
    let message = text(&succeed(command).stderr);
    assert!(message.contains("already finished, after 3 steps"), "{message}");
    assert!(message.contains("warning: memory: the run's memory is "), "{message}");

    fs::write(&file, "rnak = 2\n").unwrap();
    let mut command = qlora(&["finetune", "--config"]);
    command.arg(&file);
    let message = fail(command, 1);
    assert!(message.contains("`rnak` isn't an option of finetune"), "{message}");
}

#[test]
fn what_cannot_work_is_one_sentence_and_leaves_nothing() {
    let setup = Setup::new(10);
    let one = |arguments: &[&str], code| {
        let message = fail(setup.finetune("run", &[&["--max-steps", "2"][..], arguments].concat()), code);
        assert!(!setup.output("run").exists(), "{arguments:?} left a folder");
        message
    };
    assert!(fail(qlora(&["finetune", "--model", "x"]), 2).contains("--data FILE and --output DIR"));
    assert!(one(&["--epochs", "2"], 2).contains("cannot be used with"));
    assert!(one(&["--rank", "0"], 2).contains("at least 1"));
    assert!(one(&["--eval-split", "1.5"], 2).contains("between 0 and 1"));
    assert!(one(&["--targets", "nonsense"], 1).contains("no linear layer of the model matches"));
    assert!(one(&["--seq-len", "100000"], 1).contains("positions"));
    assert!(one(&["--early-stop", "3"], 1).contains("evaluation data"));
    assert!(one(&["--eval-data", "missing.jsonl"], 1).contains("missing.jsonl: no such file"));
    let other = path("adapter-lora");
    fs::create_dir(setup.output("other")).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(other.join(file), setup.output("other").join(file)).unwrap();
    }
    let config = setup.output("other/adapter_config.json");
    fs::write(&config, fs::read_to_string(&config).unwrap().replace("\"r\": ", "\"r\": 1")).unwrap();
    assert!(one(&["--init-adapter", setup.output("other").to_str().unwrap()], 1).contains("other"));

    let with_data = |lines: &str, arguments: &[&str], code| {
        fs::write(&setup.data, lines).unwrap();
        one(arguments, code)
    };
    assert!(with_data("", &[], 1).contains("data.jsonl: has no examples"));
    let bad = "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [1, 2\n";
    assert!(with_data(bad, &[], 1).contains("data.jsonl: line 2"));
    let late = json!({ "input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4] }).to_string();
    let message = with_data(&late, &["--seq-len", "3"], 1);
    assert!(message.contains("data.jsonl") && message.contains("cut to 3 tokens"), "{message}");

    fs::write(&setup.data, bad).unwrap();
    let output = succeed(setup.finetune("run", &["--max-steps", "2", "--skip-bad-lines"]));
    assert!(text(&output.stderr).contains("left out 1 bad lines"), "{}", text(&output.stderr));
    let before = adapter(&setup.output("run"));
    let message = fail(setup.finetune("run", &["--max-steps", "2", "--skip-bad-lines"]), 1);
    assert!(message.contains("holds another run"), "{message}");
    assert_eq!(adapter(&setup.output("run")), before);
    let message = fail(setup.finetune("run", &["--max-steps", "3", "--skip-bad-lines", "--resume"]), 1);
    assert!(message.contains("steps 2, now 3 (--max-steps"), "{message}");
}
