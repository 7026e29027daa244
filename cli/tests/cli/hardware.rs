//! `qlora bench --hardware`, with tiny sizes.

use std::fs;

use crate::common;
use assert_cmd::Command;
use serde_json::Value;

fn qlora(line: &str) -> Command {
    let mut command = Command::cargo_bin("qlora").unwrap();
    command.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER").env("QLORA_TUNE", "0").args(line.split(' '));
    command
}

#[test]
fn a_gpu_is_measured_into_a_file() {
    for info in common::adapters() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = qlora(&format!("bench --hardware --quick --device {}", info.index));
        command.env("QLORA_TIER", &info.tier).arg("--output").arg(folder.path());
        // There is no program with this name: its part fails, and the others continue.
        command.args(["--ceilings", "/no/such/program"]);
        let done = command.assert().code(1);
        let printed = String::from_utf8(done.get_output().stdout.clone()).unwrap();
        let errors = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        assert!(
            errors.trim_end().lines().last().unwrap().contains("ceilings: /no/such/program does not start"),
            "{errors}"
        );
        let files: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path()).collect();
        let [file] = &files[..] else { panic!("{files:?}") };
        let report: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        let keys: Vec<_> = report.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["version", "date", "machine", "device", "quick", "parts"]);
        assert_eq!((&report["device"]["name"], &report["quick"]), (&info.name.clone().into(), &true.into()));
        let parts: Vec<(&str, Option<u64>)> = report["parts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|part| (part["name"].as_str().unwrap(), part["m"].as_u64()))
            .collect();
        let wanted = [("layer", Some(1)), ("layer", Some(16)), ("smollm2-step", None), ("7b-step", None)];
        assert_eq!(parts[..2], [("copy", None), ("ceilings", None)]);
        assert_eq!(parts[2..], wanted, "{report}");
        assert!(report["parts"][0]["result"]["buffer_gb_per_s"].as_f64().unwrap() > 0.0, "{report}");
        for part in &report["parts"].as_array().unwrap()[2..] {
            assert_eq!((&part["tier"], &part["agrees"]), (&info.tier.clone().into(), &true.into()), "{part}");
            let rows = part["result"].as_array().unwrap();
            assert!(rows.iter().all(|row| row["ms_median"].as_f64().unwrap() > 0.0), "{part}");
        }
        for text in
            ["| tier | pass | M = 1 | M = 16 |", "% of a copy", "tokens/s", "benches/results", &*file.to_string_lossy()]
        {
            assert!(printed.contains(text), "{text} in {printed}");
        }
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    for (line, reason) in [
        ("bench --hardware --m 8", "cannot be used with"),
        ("bench --hardware --op step", "cannot be used with"),
        ("bench --quick", "--hardware"),
        ("bench --ceilings true", "--hardware"),
        ("bench --copy 0", "1..=65536"),
    ] {
        let errors = String::from_utf8(qlora(line).assert().code(2).get_output().stderr.clone()).unwrap();
        assert!(errors.contains(reason), "{line}: {errors}");
    }
    for line in ["bench --hardware --quick --device cpu", "bench --copy 1 --device cpu"] {
        let errors = String::from_utf8(qlora(line).assert().code(1).get_output().stderr.clone()).unwrap();
        assert!(errors.contains("GPUs") && errors.lines().count() == 1, "{line}: {errors}");
    }
}
