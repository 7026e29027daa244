//! Exercises the readers and writers of adapters, given a config.

use std::collections::BTreeMap;
use std::fs;
use std::sync::LazyLock;

use ndarray::Array2;
use qlora_wgpu::Result;
use qlora_wgpu::formats::peft::{PeftAdapter, PeftConfig, PeftModule};

use super::file;

const HEAD: &str = "lm_head";

/// Modules that a config may apply to.
const MODULES: [&str; 5] = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.12.mlp.down_proj",
    HEAD,
];

/// Reads `bytes` as an adapter's config: its modules, ranks and scales. Writes an adapter that
/// fits it, and reads the one whose tensors have rank 2, on all modules but the head.
///
/// # Errors
/// Errors of the config.
///
/// # Panics
/// If a written adapter differs when it is read back.
pub fn adapter_config(bytes: &[u8]) -> Result<()> {
    static TENSORS: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fitting(PeftConfig::new(2, 4.0)).write(folder.path()).expect("an adapter");
        fs::read(folder.path().join("adapter_model.safetensors")).expect("its tensors")
    });
    let (folder, _) = file("adapter_config.json", bytes);
    fs::write(folder.path().join("adapter_model.safetensors"), &*TENSORS).expect("a file beside it");

    let config = PeftConfig::read(folder.path())?;
    assert!(MODULES.iter().all(|path| !config.scaling(path).is_nan()));
    let adapter = fitting(config);
    if !adapter.modules.is_empty() {
        rewrite(&adapter);
    }
    PeftAdapter::read(folder.path()).iter().for_each(rewrite);
    Ok(())
}

/// Makes an adapter with the config's modules, as long as their rank is small.
fn fitting(config: PeftConfig) -> PeftAdapter {
    let meant = |path: &&str| config.targets.matches(path, *path == HEAD) && config.rank(path) <= 16;
    let modules = MODULES.into_iter().filter(meant).map(|path| (path.to_owned(), module(&config, path)));
    PeftAdapter { modules: modules.collect::<BTreeMap<_, _>>(), config }
}

/// Makes the values of a module [2, 3].
fn module(config: &PeftConfig, path: &str) -> PeftModule {
    let values = |(i, j): (usize, usize)| (i * 3 + j) as f32 * 0.25 - 1.0;
    let vector = |wanted: bool| wanted.then(|| vec![0.5, -0.25]);
    PeftModule {
        a: Array2::from_shape_fn((config.rank(path), 3), values),
        b: Array2::from_shape_fn((2, config.rank(path)), values),
        magnitude: vector(config.use_dora),
        bias: vector(config.lora_bias),
    }
}

fn rewrite(adapter: &PeftAdapter) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    adapter.write(folder.path()).expect("an adapter of a config that was read");
    assert_eq!(PeftAdapter::read(folder.path()).expect("an adapter that was written"), *adapter);
}
