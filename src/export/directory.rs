//! Writes a merged model as a Hugging Face directory.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Value, json};

use super::merged::{Merged, Progress, Watch, proceed};
use crate::error::{Error, Result};
use crate::formats::bitsandbytes;
use crate::formats::checkpoint::{INDEX, SINGLE};
use crate::formats::gguf::{self, TensorType as GgufType};
use crate::formats::input::{MAX_SMALL, read_small};
use crate::formats::safetensors::{OutData, OutTensor, TensorType, stage};
use crate::formats::staged::StagedFile;
use crate::model_files::Weights;
use crate::quant::{Dtype, QuantOptions, QuantizedMatrix, Source};

/// Options for writing a directory.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryOptions {
    /// Type of all tensors that aren't quantized.
    pub dtype: Dtype,
    /// Quantizes linear layers to 4 bits again, in bitsandbytes' serialization. Loses part of what
    /// the adapter learned.
    pub requantize: Option<QuantOptions>,
    /// Maximum bytes of tensors per file. A larger tensor gets a file of its own.
    pub max_shard_bytes: u64,
}

impl DirectoryOptions {
    /// Stores tensors with this type, in files of up to 5 GB, nothing quantized.
    pub fn new(dtype: Dtype) -> Self {
        DirectoryOptions { dtype, requantize: None, max_shard_bytes: 5_000_000_000 }
    }
}

/// A tensor in the plan of output files.
struct Planned {
    name: String,
    shape: Vec<usize>,
    quantize: bool,
    /// Size in bytes, approximate for 4-bit tensors.
    bytes: u64,
}

impl Merged<'_> {
    /// Writes the model to a directory that transformers loads: `config.json`, and tensors in one
    /// file or in shards with an index. If the source is a directory, its tokenizer and other
    /// small files are copied. For a GGUF file, the tokenizer is made from its metadata. Needs
    /// host memory for about one matrix in f32, or for the 4-bit matrices of one shard. All files
    /// are complete on disk before the first gets its name. Files with the same names are
    /// replaced, and shards of an older model are removed.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a value that the type can't hold, [`Error::File`] for a config that
    /// can't be written, [`Error::Io`] if reading or writing fails, [`Error::Interrupted`] if
    /// `watch` breaks.
    pub fn write_directory(&self, output: &Path, options: &DirectoryOptions, watch: &Watch<'_>) -> Result<()> {
        let new = !output.exists();
        let written = self.write_into(output, options, watch);
        if written.is_err() && new {
            // The folder is empty, because every file in it had a temporary name.
            let _ = fs::remove_dir(output.join(TEMPLATES));
            let _ = fs::remove_dir(output);
        }
        written
    }

    /// Files beside the weights, if the model is a directory. A GGUF file has none.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn companions(&self) -> Result<Companions> {
        match self.weights {
            Weights::Checkpoint(_) => Companions::of(self.files.path()),
            Weights::Gguf(_) => Ok(Companions::default()),
        }
    }

    fn write_into(&self, output: &Path, options: &DirectoryOptions, watch: &Watch<'_>) -> Result<()> {
        let mut texts = match self.weights {
            Weights::Checkpoint(_) => small_files(self.files.path())?,
            Weights::Gguf(file) => crate::text::Tokenizer::from_gguf(file)?.files(self.files.path())?,
        };
        texts.push(("config.json".into(), self.config_json(options)));
        fs::create_dir_all(output).map_err(|e| Error::io(output, e))?;

        let shards = self.plan(options);
        let total = shards.iter().map(Vec::len).sum();
        let count = shards.len();
        let done = Cell::new(0);
        let mut staged = Vec::with_capacity(count + texts.len() + 1);
        let mut weight_map = BTreeMap::new();
        let mut bytes = 0;
        for (i, planned) in shards.iter().enumerate() {
            let file = if count == 1 { SINGLE.into() } else { format!("model-{:05}-of-{count:05}.safetensors", i + 1) };
            let begin = |name: &str| {
                let at = done.replace(done.get() + 1);
                proceed(watch, Progress { name, done: at, total })
            };
            let matrices = self.requantized(output, planned, options, &begin)?;
            let mut tensors = Vec::new();
            for tensor in planned {
                match matrices.get(&tensor.name) {
                    Some(matrix) => tensors.extend(bitsandbytes::tensors(&tensor.name, matrix)?),
                    None => tensors.push(self.dense(output, tensor, options.dtype, &begin)),
                }
            }
            for tensor in &tensors {
                weight_map.insert(tensor.name.clone(), file.clone());
                bytes += tensor.shape.iter().product::<usize>() as u64 * tensor.dtype.bitsize() as u64 / 8;
            }
            staged.push(stage(&output.join(file), tensors, BTreeMap::new())?);
        }
        if count > 1 {
            let index = json!({"metadata": {"total_size": bytes}, "weight_map": weight_map});
            texts.push((INDEX.into(), pretty(&index)));
        }
        for (name, bytes) in &texts {
            let path = output.join(name);
            let error = |e: io::Error| Error::io(&path, e);
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
            }
            staged.push(StagedFile::new(&path, |out| out.write_all(bytes).map_err(error))?);
        }
        let files: Vec<String> = weight_map.into_values().chain(texts.into_iter().map(|(name, _)| name)).collect();
        staged.into_iter().try_for_each(StagedFile::commit)?;
        remove_old(output, &files)
    }

    /// Assigns tensors to files, in the model's order.
    fn plan(&self, options: &DirectoryOptions) -> Vec<Vec<Planned>> {
        let linear = |name: &str| name.contains(".self_attn.") || name.contains(".mlp.");
        let mut shards: Vec<(u64, Vec<Planned>)> = vec![(0, vec![])];
        for (name, shape) in self.config.tensors() {
            let quantize = options.requantize.is_some() && shape.len() == 2 && linear(&name);
            let values = shape.iter().product::<usize>() as u64;
            let bytes = if quantize { values * 9 / 16 } else { values * options.dtype.bytes() as u64 };
            let tensor = Planned { name, shape, quantize, bytes };
            match shards.last_mut() {
                Some((used, shard)) if shard.is_empty() || *used + tensor.bytes <= options.max_shard_bytes => {
                    *used += tensor.bytes;
                    shard.push(tensor);
                }
                _ => shards.push((tensor.bytes, vec![tensor])),
            }
        }
        shards.into_iter().map(|(_, shard)| shard).collect()
    }

    fn requantized(
        &self,
        output: &Path,
        planned: &[Planned],
        options: &DirectoryOptions,
        begin: &dyn Fn(&str) -> Result<()>,
    ) -> Result<BTreeMap<String, QuantizedMatrix>> {
        let mut matrices = BTreeMap::new();
        let Some(quant) = &options.requantize else { return Ok(matrices) };
        for Planned { name, shape, .. } in planned.iter().filter(|tensor| tensor.quantize) {
            begin(name)?;
            let (values, [rows, cols]) = (self.values(name)?, [shape[0], shape[1]]);
            // Quantize the values rounded to the type that is recorded as their original one.
            let quantize = |values: Source<'_>| QuantizedMatrix::quantize(values, rows, cols, quant);
            let matrix = match options.dtype {
                Dtype::F32 => quantize(values.as_slice().into()),
                Dtype::F16 => quantize(values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>().as_slice().into()),
                Dtype::Bf16 => {
                    quantize(values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>().as_slice().into())
                }
            };
            matrices.insert(name.clone(), matrix.map_err(|e| self.tensor_error(output, name, e))?);
        }
        Ok(matrices)
    }

    fn dense<'t>(
        &'t self,
        output: &'t Path,
        Planned { name, shape, .. }: &'t Planned,
        dtype: Dtype,
        begin: &'t dyn Fn(&str) -> Result<()>,
    ) -> OutTensor<'t> {
        let (stored, kind) = match dtype {
            Dtype::F32 => (TensorType::F32, GgufType::F32),
            Dtype::F16 => (TensorType::F16, GgufType::F16),
            Dtype::Bf16 => (TensorType::BF16, GgufType::Bf16),
        };
        let make = move || {
            begin(name)?;
            gguf::encode(kind, &self.values(name)?).map_err(|message| self.tensor_error(output, name, message))
        };
        OutTensor { name: name.clone(), dtype: stored, shape: shape.clone(), data: OutData::Lazy(Box::new(make)) }
    }

    /// `config.json` of the result: the source's with the new type, and without its own
    /// quantization.
    fn config_json(&self, options: &DirectoryOptions) -> Vec<u8> {
        let mut config = self.files.json().map_or_else(|| self.config.json(), |json| json.map().clone());
        config.shift_remove("quantization_config");
        config.shift_remove("torch_dtype");
        // The model may have its own head although its config says otherwise.
        if !self.config.tie_word_embeddings {
            config.entry("tie_word_embeddings").and_modify(|tied| *tied = false.into());
        }
        config.insert("dtype".into(), options.dtype.to_string().into());
        if let Some(quant) = &options.requantize {
            config.insert("quantization_config".into(), bitsandbytes::quantization_config(quant, options.dtype));
        }
        pretty(&config.into())
    }
}

/// JSON in transformers' layout.
fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// Folder with more chat templates, named as in transformers.
const TEMPLATES: &str = "additional_chat_templates";

/// Files beside a model's weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Companions {
    /// Files that are copied: tokenizer, chat templates, generation settings, licences. Paths
    /// relative to the folder.
    pub copied: Vec<String>,
    /// Copied files that are links out of the folder, and their targets. Links in the hub's cache
    /// to blobs of the same model don't count.
    pub outside: Vec<(String, PathBuf)>,
    /// Files and folders that aren't copied, except the weights' own and hidden ones.
    pub left_out: Vec<String>,
}

impl Companions {
    fn of(folder: &Path) -> Result<Companions> {
        let mut found = Companions::default();
        let real_folder = fs::canonicalize(folder).map_err(|e| Error::io(folder, e))?;
        let root = repository(&real_folder);
        let templates = folder.join(TEMPLATES);
        let mut names = names_in(folder)?;
        if templates.is_dir() {
            names.extend(names_in(&templates)?.into_iter().map(|name| format!("{TEMPLATES}/{name}")));
        }
        for name in names {
            let path = folder.join(&name);
            if is_own(&name) || name == TEMPLATES && path.is_dir() {
                continue;
            }
            if !comes_along(&name) || !is_small_file(&path) {
                found.left_out.push(name);
                continue;
            }
            let real = fs::canonicalize(&path).map_err(|e| Error::io(&path, e))?;
            if !real.starts_with(root) {
                found.outside.push((name.clone(), real));
            }
            found.copied.push(name);
        }
        Ok(found)
    }
}

/// Names of a folder's entries, sorted.
fn names_in(folder: &Path) -> Result<Vec<String>> {
    let error = |e: io::Error| Error::io(folder, e);
    let entries = fs::read_dir(folder).map_err(error)?.collect::<io::Result<Vec<_>>>().map_err(error)?;
    let mut names: Vec<String> = entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// The folder that a model's files may lie in: the model's own, or in the hub's cache
/// (`models--ORG--NAME/snapshots/COMMIT`) the repository's, which has the blobs.
fn repository(folder: &Path) -> &Path {
    let snapshots = folder.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"));
    snapshots.and_then(Path::parent).unwrap_or(folder)
}

/// Whether a file is written anew, belongs to the weights, or is hidden.
fn is_own(name: &str) -> bool {
    name == "config.json" || name.ends_with(".index.json") || name.ends_with(".safetensors") || name.starts_with('.')
}

fn comes_along(name: &str) -> bool {
    let name = name.to_lowercase();
    let is_text = [".json", ".txt", ".model", ".jinja", ".tiktoken"].iter().any(|end| name.ends_with(end));
    let is_licence = ["licen", "notice", "copying"].iter().any(|part| name.contains(part));
    (is_text || is_licence || name.starts_with("tokenizer.")) && !name.starts_with("adapter_")
}

fn is_small_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.len() <= MAX_SMALL)
}

/// Relative paths and contents of the copied files.
fn small_files(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |name: String| {
        let bytes = read_small(&folder.join(&name), MAX_SMALL)?;
        Ok((name, bytes))
    };
    Companions::of(folder)?.copied.into_iter().map(read).collect()
}

/// Removes the tensor files of an older model from the folder, except `files`, which have just
/// been written.
fn remove_old(folder: &Path, files: &[String]) -> Result<()> {
    let error = |e: io::Error| Error::io(folder, e);
    for entry in fs::read_dir(folder).map_err(error)? {
        let entry = entry.map_err(error)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_shard = name.starts_with("model-") && name.ends_with(".safetensors");
        if (is_shard || name == SINGLE || name == INDEX) && !files.contains(&name) {
            fs::remove_file(entry.path()).map_err(error)?;
        }
    }
    Ok(())
}
