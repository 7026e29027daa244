//! The files of a model, opened once.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::checkpoint::{BaseFormat, Checkpoint};
use crate::formats::gguf::{GgufFile, is_gguf};
use crate::formats::json::JsonObject;
use crate::nn::{Decoder, ModelConfig, ModelSpec};
use crate::text::Tokenizer;

/// An open model: a Hugging Face directory (`config.json`, and `model.safetensors` or its shards)
/// or a GGUF file. Everything that is read of it comes from the same headers and mapped files.
///
/// Files are mapped, so they must not be written to in place meanwhile. A file truncated before one
/// of its tensors is read is an error, but one truncated during the read ends the process (SIGBUS).
/// Replacing a file by renaming another over it is safe.
///
/// ```no_run
/// use qlora_wgpu::formats::checkpoint::BaseFormat;
/// use qlora_wgpu::{Device, ModelFiles};
///
/// # fn main() -> qlora_wgpu::Result<()> {
/// let files = ModelFiles::open("model.gguf")?;
/// let tokenizer = files.tokenizer()?;
/// let model = files.load(&Device::best()?, &BaseFormat::AsIs)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    /// As the files state it.
    config: Result<ModelConfig>,
    contents: Contents,
}

#[derive(Debug)]
enum Contents {
    Directory {
        json: JsonObject,
        /// Opened when it is needed, because tokenizing needs no weights.
        weights: OnceLock<Box<Opened>>,
    },
    Gguf(GgufFile),
}

/// A checkpoint, and the configuration with the head that it has.
#[derive(Debug)]
struct Opened {
    checkpoint: Checkpoint,
    config: Result<ModelConfig>,
}

/// The file or files with a model's tensors.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// Those of a Hugging Face directory.
    Checkpoint(&'a Checkpoint),
    /// A GGUF file.
    Gguf(&'a GgufFile),
}

impl ModelFiles {
    /// Opens a model and reads its configuration. A configuration that isn't supported is an error
    /// only where it is needed.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that can't be opened, [`Error::File`] for a malformed one, or for a
    /// path that is neither a directory nor a GGUF file.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFiles> {
        let path = path.as_ref();
        let (config, contents) = if path.is_dir() {
            let json = JsonObject::read(&path.join("config.json"))?;
            (ModelConfig::from_json(&json), Contents::Directory { json, weights: OnceLock::new() })
        } else if is_gguf(path)? {
            let file = GgufFile::open(path)?;
            (ModelConfig::from_gguf(&file), Contents::Gguf(file))
        } else {
            let message = if path.extension().is_some_and(|extension| extension == "safetensors") {
                "has only tensors; give the directory that contains it and a config.json"
            } else {
                "not a GGUF file; give a .gguf file, or a directory with config.json and safetensors"
            };
            return Err(Error::File { path: path.into(), message: message.into() });
        };
        Ok(ModelFiles { path: path.into(), config, contents })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The architecture's name in the files, whether it is supported or not.
    ///
    /// # Errors
    /// [`Error::File`] if it isn't text.
    pub fn architecture(&self) -> Result<Option<String>> {
        match &self.contents {
            Contents::Directory { json, .. } => json.get("model_type"),
            Contents::Gguf(file) => Ok(file.get::<&str>("general.architecture")?.map(String::from)),
        }
    }

    /// The model's name in the files.
    ///
    /// # Errors
    /// [`Error::File`] if it isn't text.
    pub fn name(&self) -> Result<Option<String>> {
        match &self.contents {
            Contents::Directory { json, .. } => json.get("_name_or_path"),
            Contents::Gguf(file) => Ok(file.get::<&str>("general.name")?.map(String::from)),
        }
    }

    /// Number of rows of the embedding. Needs no weights.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Tensor`] for a configuration that isn't supported.
    pub fn vocab_size(&self) -> Result<usize> {
        self.config.as_ref().map(|config| config.vocab_size).map_err(Error::clone)
    }

    /// The model's sizes and settings. If `config.json` ties the head to the embedding but the
    /// checkpoint has a different head, the model has that one.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Tensor`] for a configuration that isn't supported; errors of
    /// [`weights`](Self::weights).
    pub fn config(&self) -> Result<&ModelConfig> {
        let config = match &self.contents {
            Contents::Directory { weights, .. } => &self.opened(weights)?.config,
            Contents::Gguf(_) => &self.config,
        };
        config.as_ref().map_err(Error::clone)
    }

    /// The tensors. A directory's files are opened at the first call.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    #[doc(hidden)]
    pub fn weights(&self) -> Result<Weights<'_>> {
        match &self.contents {
            Contents::Directory { weights, .. } => Ok(Weights::Checkpoint(&self.opened(weights)?.checkpoint)),
            Contents::Gguf(file) => Ok(Weights::Gguf(file)),
        }
    }

    /// Describes the model that [`load`](Self::load) would build, from headers alone.
    ///
    /// # Errors
    /// Those of [`load`](Self::load) that the headers reveal.
    pub fn spec(&self, base: &BaseFormat) -> Result<ModelSpec> {
        let config = self.config()?.clone();
        match self.weights()? {
            Weights::Checkpoint(checkpoint) => ModelSpec::of_checkpoint(config, checkpoint, base),
            Weights::Gguf(file) => ModelSpec::of_gguf(config, file, base),
        }
    }

    /// Loads the model. Matrices go to the device one by one, so the host never holds more than one
    /// of them in f32. `base` is the format for linear layers that aren't 4-bit in the file.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Tensor`] and [`Error::Io`], with file and key; errors of the
    /// device.
    pub fn load(&self, device: &Device, base: &BaseFormat) -> Result<Decoder> {
        let start = Instant::now();
        let config = self.config()?.clone();
        let decoder = match self.weights()? {
            Weights::Checkpoint(checkpoint) => Decoder::from_checkpoint(device, config, checkpoint, base),
            Weights::Gguf(file) => Decoder::from_gguf(device, config, file, base),
        }?;
        let config = decoder.config();
        tracing::info!(
            target: "qlora_wgpu::nn",
            architecture = ?config.architecture,
            layers = config.layers,
            hidden = config.hidden_size,
            vocabulary = config.vocab_size,
            bytes = decoder.resident_bytes().0,
            seconds = start.elapsed().as_secs_f64(),
            "loaded {}",
            self.path.display()
        );
        Ok(decoder)
    }

    /// Reads the tokenizer, with the model's chat template if it has one.
    ///
    /// # Errors
    /// Those of [`Tokenizer::from_dir`] or [`Tokenizer::from_gguf`]; [`Error::File`] if a directory
    /// has no `tokenizer.json`, or if the tokenizer has more tokens than the model.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let file_error = |message: String| Error::File { path: self.path.clone(), message };
        let tokenizer = match &self.contents {
            Contents::Gguf(file) => Tokenizer::from_gguf(file)?,
            Contents::Directory { .. } if self.path.join("tokenizer.json").exists() => Tokenizer::from_dir(&self.path)?,
            Contents::Directory { .. } => {
                return Err(file_error("has no tokenizer.json, which text needs; put the model's own there".into()));
            }
        };
        tokenizer.check_vocabulary(self.vocab_size()?).map_err(|e| file_error(e.to_string()))?;
        Ok(tokenizer)
    }

    /// The contents of `config.json`, if the model is a directory.
    pub(crate) fn json(&self) -> Option<&JsonObject> {
        match &self.contents {
            Contents::Directory { json, .. } => Some(json),
            Contents::Gguf(_) => None,
        }
    }

    fn opened<'a>(&self, weights: &'a OnceLock<Box<Opened>>) -> Result<&'a Opened> {
        if let Some(opened) = weights.get() {
            return Ok(opened);
        }
        let checkpoint = Checkpoint::open(&self.path)?;
        let config = self.config.clone().and_then(|config| config.with_head_of(&checkpoint));
        Ok(weights.get_or_init(|| Box::new(Opened { checkpoint, config })))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::formats::gguf::writer::Writer;

    fn repository(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
    }

    #[test]
    fn a_directory_without_weights_has_a_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json"] {
            fs::copy(repository("cli/assets/tiny-glossary").join(name), folder.path().join(name)).unwrap();
        }
        let files = ModelFiles::open(folder.path()).unwrap();
        assert_eq!(files.vocab_size().unwrap(), files.tokenizer().unwrap().vocab_size());
        assert_eq!(files.architecture().unwrap().as_deref(), Some("llama"));
        let error = files.config().unwrap_err().to_string();
        assert!(error.contains("has neither model.safetensors nor"), "{error}");

        fs::copy(repository("cli/assets/tiny-glossary/model.safetensors"), folder.path().join("model.safetensors"))
            .unwrap();
        assert_eq!(files.config().unwrap().vocab_size, 2048);
        // Opened files stay as they were.
        fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        assert_eq!(files.spec(&BaseFormat::AsIs).unwrap().config(), files.config().unwrap());
    }

    #[test]
    fn a_gguf_file_is_known_by_its_name_or_its_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let bytes = Writer::default().string("general.architecture", "gpt2").bytes();
        for name in ["a.gguf", "b.GGUF", "c"] {
            fs::write(path(name), &bytes).unwrap();
            let files = ModelFiles::open(path(name)).unwrap();
            assert_eq!(files.architecture().unwrap().as_deref(), Some("gpt2"));
            let error = files.config().unwrap_err().to_string();
            assert!(error.contains("supported are llama, qwen2, qwen3"), "{error}");
        }
        let error = |name: &str| {
            fs::write(path(name), "text").unwrap();
            ModelFiles::open(path(name)).unwrap_err().to_string()
        };
        assert!(error("d").contains("not a GGUF file; give a .gguf file, or a directory"));
        assert!(error("d.gguf").contains("does not begin with \"GGUF\""));
        assert!(error("d.safetensors").contains("has only tensors"));
    }
}
