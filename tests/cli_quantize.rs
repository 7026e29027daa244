//! `qlora quantize` and `qlora dequantize` on bitsandbytes' files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use qlora_wgpu::formats::safetensors::{OutData, OutTensor, SafetensorsFile, write};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/quant").join(file)
}

fn qlora() -> Command {
    Command::cargo_bin("qlora").unwrap()
}

fn stdout(command: &mut Command) -> String {
    String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
}

fn stderr(command: &mut Command) -> String {
    String::from_utf8(command.assert().failure().get_output().stderr.clone()).unwrap()
}

/// Writes a golden case's original bf16 weights as `weight`.
fn original(folder: &TempDir) -> PathBuf {
    let reference = SafetensorsFile::open(golden("bf16_64x128_s9.ref.safetensors")).unwrap();
    let raw = reference.tensor("raw").unwrap();
    let tensor = OutTensor {
        name: "weight".into(),
        dtype: raw.dtype,
        shape: raw.shape.to_vec(),
        data: OutData::Bytes(raw.bytes.into()),
    };
    let path = folder.path().join("original.safetensors");
    write(&path, vec![tensor], BTreeMap::new()).unwrap();
    path
}

#[test]
fn quantize_writes_what_bitsandbytes_writes() {
    let folder = TempDir::new().unwrap();
    let input = original(&folder);
    for (format, flags) in [("nf4", &[][..]), ("nf4_dq", &["--double-quant"]), ("fp4", &["--format", "fp4"])] {
        let output = folder.path().join(format);
        let line = stdout(qlora().arg("quantize").args([&input, &output]).args(flags));
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(line.contains("1 tensor quantized to"), "{line}");

        let ours = SafetensorsFile::open(&output).unwrap();
        let theirs = SafetensorsFile::open(golden(&format!("bf16_64x128_s9.{format}.bnb.safetensors"))).unwrap();
        assert_eq!(ours.names(), theirs.names());
        assert_eq!(ours.metadata(), BTreeMap::from([("format".into(), "pt".into())]));
        for name in theirs.names() {
            let [ours, theirs] = [&ours, &theirs].map(|file| file.tensor(name).unwrap());
            assert_eq!((ours.dtype, ours.shape, ours.bytes), (theirs.dtype, theirs.shape, theirs.bytes), "{name}");
        }
    }
}

#[test]
fn dequantize_reads_every_golden_file() {
    let folder = TempDir::new().unwrap();
    let index: serde_json::Value = serde_json::from_slice(&fs::read(golden("cases.json")).unwrap()).unwrap();
    for case in index["cases"].as_array().unwrap() {
        let input = golden(case["file"].as_str().unwrap());
        let output = folder.path().join("out.safetensors");
        let line = stdout(qlora().arg("dequantize").args([&input, &output]).arg("--force"));
        assert!(line.contains("1 tensor dequantized, 0 copied"), "{line}");
        let file = SafetensorsFile::open(&output).unwrap();
        assert_eq!(file.names(), ["weight"]);
        let weight = file.tensor("weight").unwrap();
        let sha256: String = Sha256::digest(weight.bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(sha256, case["dequant_sha256"], "{}", input.display());
        assert_eq!(serde_json::json!(weight.shape), case["shape"]);
    }
}

#[test]
fn mistakes_are_explained() {
    let folder = TempDir::new().unwrap();
    let input = original(&folder);
    let output = folder.path().join("out.safetensors");
    let quantize = |flags: &[&str]| stderr(qlora().arg("quantize").args([&input, &output]).args(flags));
    assert!(quantize(&["--format", "nf5"]).contains("expected nf4, fp4 or int4"));
    assert!(quantize(&["--block", "63"]).contains("power of two"));
    assert!(quantize(&["--include", "("]).contains("regex"));
    assert!(quantize(&["--exclude", "w"]).contains("nothing to quantize"));
    assert!(stderr(qlora().arg("quantize").args([&input, &input])).contains("is the input too"));

    let bytes = fs::read(&input).unwrap();
    let broken = folder.path().join("broken.safetensors");
    fs::write(&broken, &bytes[..bytes.len() - 1]).unwrap();
    let message = stderr(qlora().arg("quantize").args([&broken, &output]));
    assert!(message.contains("broken.safetensors") && message.contains("is truncated"), "{message}");
    assert!(!output.exists());
}

#[test]
fn quiet_prints_nothing_and_json_prints_numbers() {
    let folder = TempDir::new().unwrap();
    let (input, output, back) = (original(&folder), folder.path().join("out"), folder.path().join("back"));
    let json = |command: &str, paths: [&PathBuf; 2]| -> serde_json::Value {
        let text = stdout(qlora().arg(command).args(paths).args(["--json", "--quiet"]));
        serde_json::from_str(&text).unwrap()
    };
    qlora().arg("quantize").args([&input, &output]).arg("--quiet").assert().success().stdout("").stderr("");
    assert!(output.exists());
    fs::remove_file(&output).unwrap();
    let size = |path: &PathBuf| fs::metadata(path).unwrap().len();
    let packed = json("quantize", [&input, &output]);
    let wanted = serde_json::json!({
        "output": output, "format": "nf4", "bits_per_weight": packed["bits_per_weight"], "tensors": 1, "copied": 0,
        "input_bytes": size(&input), "output_bytes": size(&output),
    });
    assert_eq!(packed, wanted);
    assert!((packed["bits_per_weight"].as_f64().unwrap() - 4.5).abs() < 0.1, "{packed}");
    let unpacked = json("dequantize", [&output, &back]);
    let wanted = serde_json::json!({
        "output": back, "tensors": 1, "copied": 0, "input_bytes": size(&output), "output_bytes": size(&back),
    });
    assert_eq!(unpacked, wanted);
}
