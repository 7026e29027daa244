//! What commands that load a model share.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::checkpoint::BaseFormat;
use crate::formats::gguf::GgufFile;
use crate::formats::peft::PeftAdapter;
use crate::nn::Decoder;
use crate::quant::QuantOptions;
use crate::text::Tokenizer;

/// A model, an adapter and a device.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A Hugging Face directory (config.json and safetensors) or a .gguf file.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// A directory with a PEFT adapter.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// cpu, gpu (any adapter), best, an index of `qlora devices`, or a part of a name.
    #[arg(long, default_value = "best")]
    device: String,
    /// What becomes of linear layers that are not 4-bit in the file.
    #[arg(long, value_enum, default_value_t = Base::AsIs)]
    base_format: Base,
}

/// `--base-format`
#[derive(ValueEnum, Clone, Copy, Debug)]
pub(super) enum Base {
    /// They stay as they are.
    AsIs,
    /// NF4 with double-quantized scales.
    Nf4,
    /// NF4 with plain scales.
    Nf4Plain,
}

impl From<Base> for BaseFormat {
    fn from(base: Base) -> BaseFormat {
        match base {
            Base::AsIs => BaseFormat::AsIs,
            Base::Nf4 => BaseFormat::Quantize(QuantOptions::nf4().double_quant()),
            Base::Nf4Plain => BaseFormat::Quantize(QuantOptions::nf4()),
        }
    }
}

impl ModelArgs {
    /// Loads the model, and the adapter if there is one.
    pub fn load(&self) -> Result<Decoder> {
        let device = Device::named(&self.device)?;
        exists(&self.model)?;
        let mut model = Decoder::load(&device, &self.model, &self.base_format.into())?;
        if let Some(path) = &self.adapter {
            exists(path)?;
            model.attach_peft("default", &PeftAdapter::read(path)?)?;
        }
        Ok(model)
    }

    /// The tokenizer that comes with the model.
    pub fn tokenizer(&self, model: &Decoder) -> Result<Tokenizer> {
        let tokenizer = if self.model.is_dir() {
            Tokenizer::from_dir(&self.model)?
        } else {
            Tokenizer::from_gguf(&GgufFile::open(&self.model)?)?
        };
        tokenizer.check_vocabulary(model.config().vocab_size)?;
        Ok(tokenizer)
    }
}

/// One sentence instead of the system's, for what people mistype most.
pub(super) fn exists(path: &Path) -> Result<()> {
    match path.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Io { path: path.into(), message: "there is no such file or directory".into() }),
        Err(error) => Err(Error::Io { path: path.into(), message: error.to_string() }),
    }
}
