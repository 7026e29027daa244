//! `qlora quantize` and `qlora dequantize` on bitsandbytes' files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::common::model::repository;
use assert_cmd::Command;
use qlora_wgpu::formats::checkpoint::{BaseFormat, Checkpoint};
use qlora_wgpu::internal::safetensors::{OutData, OutTensor, SafetensorsFile, write};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn golden(file: &str) -> PathBuf {
    repository("tests/golden/quant").join(file)
}

const EMBEDDING: &str = "model.embed_tokens.weight";

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

/// Writes a safetensors file with one sparse tensor, `pad` bytes before it. Returns false if the
/// disk doesn't support such files.
fn sparse(path: &Path, side: u64, pad: usize) -> bool {
    let bytes = side * side * 4;
    let header = format!(r#"{{"{EMBEDDING}":{{"dtype":"F32","shape":[{side},{side}],"data_offsets":[0,{bytes}]}}}}"#);
    let header = format!("{header}{}", " ".repeat(pad));
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).is_ok()
}

#[test]
fn what_does_not_fit_into_memory_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    // Some disks don't support files of 8 or 16 TiB of zeros.
    let Some(side) = [1 << 21, 1 << 20].into_iter().find(|&side| (0..2).all(|pad| sparse(&path, side, pad))) else {
        return;
    };
    for pad in 0..2 {
        sparse(&path, side, pad);
        let output = folder.path().join("out.safetensors");
        let mut command = qlora();
        let run = command.arg("quantize").args([&path, &output]).timeout(std::time::Duration::from_secs(60));
        let error = String::from_utf8(run.assert().code(1).get_output().stderr.clone()).unwrap();
        assert!(error.contains("bytes of memory") && !output.exists(), "{error}");
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let error = checkpoint.matrix(EMBEDDING, side as usize, side as usize, &BaseFormat::AsIs).unwrap_err();
        assert!(error.to_string().contains("bytes of memory"), "{error}");
    }
}
