//! The demo's model and text, inside the program; assets/README.md says where they are from.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::formats::staged::StagedFile;

/// Definitions of The Devil's Dictionary to train on, and others to evaluate on.
pub(super) const TRAIN: &str = "devil_train.jsonl";
pub(super) const VALID: &str = "devil_valid.jsonl";

/// The model's tensors, in safetensors.
pub(super) static MODEL: &[u8] = include_bytes!("../../assets/tiny-glossary/model.safetensors");

static MODEL_FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../assets/tiny-glossary/config.json")),
    ("tokenizer.json", include_bytes!("../../assets/tiny-glossary/tokenizer.json")),
    ("model.safetensors", MODEL),
    // It must stay beside the model.
    ("WORDNET-LICENSE", include_bytes!("../../assets/WORDNET-LICENSE")),
];
static TEXT_FILES: [(&str, &[u8]); 2] = [
    (TRAIN, include_bytes!("../../assets/devil_train.jsonl")),
    (VALID, include_bytes!("../../assets/devil_valid.jsonl")),
];

/// Writes the model into a folder of `folder`, and returns it.
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
