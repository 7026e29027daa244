//! Writes a merged model as a GGUF file.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use super::merged::{Merged, Progress, Watch, proceed};
use crate::error::{Error, Result};
use crate::formats::gguf::{self, GgufFile, Metadata, OutTensor, OutValue, TensorType};
use crate::model_files::Weights;
use crate::nn::gguf::{gguf_name, row_order};
use crate::text::Tokenizer;

/// Version of ggml's quantized types.
const QUANTIZATION_VERSION: u32 = 2;

/// `general.file_type` of files with matrices of this type; llama.cpp's `llama_ftype`.
fn file_type(kind: TensorType) -> Option<u32> {
    match kind {
        TensorType::F32 => Some(0),
        TensorType::F16 => Some(1),
        TensorType::Q4_0 => Some(2),
        TensorType::Q8_0 => Some(7),
        TensorType::Bf16 => Some(32),
        _ => None,
    }
}

/// Type of a tensor in a file of type `kind`. Vectors are F32, as llama.cpp requires. Embedding
/// and head, which Q4_0 would hurt most, are Q8_0 instead. Rows that aren't a multiple of the
/// block size are F16.
fn kind_of(name: &str, shape: &[usize], kind: TensorType) -> TensorType {
    let &[_, cols] = shape else { return TensorType::F32 };
    let outer = name.starts_with("model.embed_tokens.") || name.starts_with("lm_head.");
    let kind = if outer && kind == TensorType::Q4_0 { TensorType::Q8_0 } else { kind };
    if cols.is_multiple_of(kind.block()) { kind } else { TensorType::F16 }
}

impl Merged<'_> {
    /// Writes the model to a GGUF file with matrices as F32, F16, BF16, Q8_0 or Q4_0 (with Q8_0
    /// for embedding and head). Metadata and tokenizer of a GGUF file are copied. For a directory
    /// they are made from `config.json`, `tokenizer.json` and the files beside it. Needs host
    /// memory for about one matrix in f32. The file appears complete or not at all.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a value that the type can't hold, [`Error::File`] for a tokenizer
    /// that GGUF can't represent, [`Error::Invalid`] for another type, [`Error::Io`] if reading or
    /// writing fails, [`Error::Interrupted`] if `watch` breaks.
    pub fn write_gguf(&self, output: &Path, kind: TensorType, watch: &Watch<'_>) -> Result<()> {
        let Some(file_type) = file_type(kind) else {
            return Err(Error::invalid("merge", "the type", kind, "supported types are F32, F16, BF16, Q8_0 and Q4_0"));
        };
        let (mut metadata, names) = match self.weights {
            Weights::Gguf(file) => {
                let mut metadata = Metadata::of(file);
                // We write with the default alignment.
                metadata.remove("general.alignment");
                // The output is a single file.
                gguf::SPLIT_KEYS.iter().for_each(|key| metadata.remove(key));
                (metadata, self.names_of(file))
            }
            Weights::Checkpoint(_) => {
                let path = self.files.path();
                let folder = fs::canonicalize(path).unwrap_or_else(|_| path.into());
                let name = folder.file_name().unwrap_or_default().to_string_lossy();
                let mut metadata = self.config.gguf_metadata(&name)?;
                let tokenizer = Tokenizer::from_dir(path)?;
                let ids = &self.config;
                let stated = [ids.bos_token_id, ids.eos_token_ids.first().copied(), ids.pad_token_id];
                tokenizer.write_gguf(path, ids.vocab_size, stated, &mut metadata)?;
                (metadata, self.config.tensors().into_iter().map(|(name, _)| name).collect())
            }
        };
        metadata.set("general.file_type", OutValue::U32(file_type));
        metadata.set("general.quantization_version", OutValue::U32(QUANTIZATION_VERSION));

        let freqs = self.freqs()?;
        let total = names.len() + usize::from(freqs.is_some());
        let mut tensors = Vec::with_capacity(total);
        tensors.extend(freqs.map(|(name, values)| OutTensor {
            name: name.into(),
            kind: TensorType::F32,
            shape: vec![values.len()],
            data: Box::new(move || Ok(Cow::Owned(bytemuck::cast_slice(&values).to_vec()))),
        }));
        for name in &names {
            let shape = self.tensors[name].clone();
            let kind = kind_of(name, &shape, kind);
            let theirs = gguf_name(name).unwrap_or_else(|| name.clone());
            let done = tensors.len();
            let progress_name = theirs.clone();
            let data = move || {
                proceed(watch, Progress { name: &progress_name, done, total })?;
                match self.unchanged(name, kind) {
                    Some(bytes) => Ok(Cow::Borrowed(bytes)),
                    None => self.encoded(output, name, kind).map(Cow::Owned),
                }
            };
            tensors.push(OutTensor { name: theirs, kind, shape, data: Box::new(data) });
        }
        gguf::write(output, &metadata, &tensors)
    }

    /// Hugging Face's names of the tensors, in the file's order.
    fn names_of(&self, file: &GgufFile) -> Vec<String> {
        let order = file.names_in_order();
        let place = |name: &String| gguf_name(name).and_then(|theirs| order.iter().position(|known| *known == theirs));
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort_by_cached_key(place);
        names
    }

    /// The divisors of the rotary frequencies, if there are any.
    fn freqs(&self) -> Result<Option<(&'static str, Vec<f32>)>> {
        let Some((name, values)) = self.config.gguf_rope_freqs() else { return Ok(None) };
        match self.weights {
            // Copied from the file, to keep them to the bit.
            Weights::Gguf(file) => Ok(Some((name, file.vector(name, values.len(), gguf::RowOrder::Plain)?))),
            Weights::Checkpoint(_) => Ok(Some((name, values))),
        }
    }

    /// A tensor's encoded blocks, with rows in GGUF's order.
    fn encoded(&self, output: &Path, name: &str, kind: TensorType) -> Result<Vec<u8>> {
        let error = |message: String| self.tensor_error(output, name, message);
        let bytes = gguf::encode(kind, &self.values(name)?).map_err(error)?;
        let ordered = row_order(&self.config, name).arrange(bytes, self.tensors[name][0]);
        ordered.ok_or_else(|| error("has a number of rows that doesn't divide into heads".into()))
    }
}
