//! The demo's model and text, bundled into the program. assets/README.md has their sources.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::StagedFile;

/// Definitions from The Devil's Dictionary for training, and others for evaluation.
pub(super) const TRAIN: &str = "devil_train.jsonl";
pub(super) const VALID: &str = "devil_valid.jsonl";

/// The model's safetensors file.
pub(super) static MODEL: &[u8] = include_bytes!("../assets/tiny-glossary/model.safetensors");

static MODEL_FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../assets/tiny-glossary/config.json")),
    ("tokenizer.json", include_bytes!("../assets/tiny-glossary/tokenizer.json")),
    ("model.safetensors", MODEL),
    // The license must stay beside the model.
    ("WORDNET-LICENSE", include_bytes!("../assets/WORDNET-LICENSE")),
];
static TEXT_FILES: [(&str, &[u8]); 2] =
    [(TRAIN, include_bytes!("../assets/devil_train.jsonl")), (VALID, include_bytes!("../assets/devil_valid.jsonl"))];

/// Writes the model into a subfolder of `folder` and returns its path.
pub(super) fn write_model(folder: &Path) -> Result<PathBuf> {
    let model = folder.join("tiny-glossary");
    fs::create_dir_all(&model).map_err(|e| Error::io(&model, e))?;
    write(&model, &MODEL_FILES)?;
    Ok(model)
}

/// Writes both texts into `folder`.
pub(super) fn write_texts(folder: &Path) -> Result<()> {
    write(folder, &TEXT_FILES)
}

fn write(folder: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    files.iter().try_for_each(|(name, bytes)| {
        let path = folder.join(name);
        StagedFile::new(&path, |out| out.write_all(bytes).map_err(|e| Error::io(&path, e)))?.commit()
    })
}
