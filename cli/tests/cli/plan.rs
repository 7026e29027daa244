//! `qlora plan`.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::model::{path, smollm2};
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::PeftConfig;
use qlora_wgpu::optim::{AdamW, Schedule};
use qlora_wgpu::quant::QuantOptions;
use qlora_wgpu::train::TrainOptions;
use qlora_wgpu::train::plan::{MicroBatches, Plan};
use qlora_wgpu::{Device, ModelFiles};
use serde_json::Value;

fn base() -> BaseFormat {
    BaseFormat::Quantize(QuantOptions::nf4().double_quant())
}

fn command(model: &Path, arguments: &[&str], status: i32) -> String {
    let mut command = assert_cmd::Command::cargo_bin("qlora").unwrap();
    command.env_remove("QLORA_DEVICE").env_remove("QLORA_TIER").args(["plan", "--device", "cpu", "--model"]).arg(model);
    String::from_utf8(command.args(arguments).assert().code(status).get_output().stdout.clone()).unwrap()
}

#[test]
fn the_command_prints_the_plan() {
    for (model, tokens) in [(path("llama"), 128), (smollm2(), 512)] {
        let start = Instant::now();
        let json = command(&model, &["--json", "--batch-size", "2", "--dora", "--checkpoint-activations"], 0);
        assert!(start.elapsed() < Duration::from_secs(10), "headers only: {:?}", start.elapsed());
        let found: Value = serde_json::from_str(&json).unwrap();
        let spec = ModelFiles::open(&model).unwrap().spec(&base()).unwrap();
        let adapter = PeftConfig { use_dora: true, ..PeftConfig::new(16, 32.0) };
        let batches = MicroBatches { count: 1, rows: 2, tokens };
        // Its number of threads differs from this process's, and so does its number of tiles.
        let options = TrainOptions {
            optimizer: AdamW::default(),
            schedule: Schedule::constant(),
            max_norm: Some(1.0),
            checkpoint_activations: true,
            seed: 0,
        };
        let wanted = Plan::new(&spec, &adapter, batches, &options, &Device::cpu()).unwrap();
        assert_eq!(found["batches"], serde_json::to_value(batches).unwrap());
        for part in ["base", "adapters", "gradients", "optimizer", "logits"] {
            assert_eq!(found["most"][part], serde_json::to_value(wanted).unwrap()["most"][part], "{part}");
        }
        let peak = found["peak_bytes"].as_u64().unwrap();
        assert!(peak.abs_diff(wanted.peak_bytes) <= wanted.peak_bytes / 20, "{found} {wanted:?}");
        assert_eq!(found["device"], "cpu");
        assert!(found["memory_bytes"].as_u64().unwrap() > 1 << 20 && found["fits"].is_boolean());
    }
    let tight = command(&smollm2(), &["--memory", "300MiB"], 1);
    assert!(tight.contains("1 x 512 tokens\n") && tight.contains("does not fit: it holds more than 90 %"), "{tight}");
    let roomy = command(&smollm2(), &["--memory", "1TB", "--targets", "q_proj,v_proj"], 0);
    assert!(roomy.contains("8 x 512 tokens (the most that fit") && roomy.contains("It fits"), "{roomy}");
}
