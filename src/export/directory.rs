//! A merged model as a Hugging Face directory.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Value, json};

use super::merged::{Merged, Progress, Source as Model, Watch, proceed};
use crate::error::{Error, Result};
use crate::formats::bitsandbytes;
use crate::formats::checkpoint::{INDEX, SINGLE};
use crate::formats::gguf::{self, TensorType as GgufType};
use crate::formats::input::{MAX_SMALL, read_small};
use crate::formats::json::JsonObject;
use crate::formats::safetensors::{OutData, OutTensor, TensorType, stage};
use crate::formats::staged::StagedFile;
use crate::quant::{Dtype, QuantOptions, QuantizedMatrix, Source};

/// How a directory is written.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryOptions {
    /// Type of all tensors that are not quantized.
    pub dtype: Dtype,
    /// Makes linear layers 4-bit again, in bitsandbytes' serialization; which loses a part of what the adapter learned.
    pub requantize: Option<QuantOptions>,
    /// Most bytes of tensors in a file; a single larger tensor has one of its own.
    pub max_shard_bytes: u64,
}

impl DirectoryOptions {
    /// Tensors of this type in files of up to 5 GB, nothing quantized.
    pub fn new(dtype: Dtype) -> Self {
        DirectoryOptions { dtype, requantize: None, max_shard_bytes: 5_000_000_000 }
    }
}

/// A tensor of the model in the plan of the files.
struct Planned {
    name: String,
    shape: Vec<usize>,
    quantize: bool,
    /// Bytes, of 4-bit ones about.
    bytes: u64,
}

impl Merged<'_> {
    /// Writes the model to a directory that transformers loads: `config.json`, tensors in one file or in shards with their
    /// index, and the tokenizer and other small files of a source that is a directory; of a GGUF file the tokenizer is made
    /// from its metadata. Host memory: about one matrix in f32, or the 4-bit matrices of one shard. All files are complete on
    /// the disk before the first gets its name; files of the same names are replaced, shards of a model that was there before
    /// are removed.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a value that the type cannot hold, [`Error::File`] for a config that cannot be written,
    /// [`Error::Io`] if reading or writing fails, [`Error::Interrupted`] if `watch` ends it.
    pub fn write_directory(&self, output: &Path, options: &DirectoryOptions, watch: &Watch<'_>) -> Result<()> {
        let new = !output.exists();
        let written = self.write_into(output, options, watch);
        if written.is_err() && new {
            // Empty, as every file in it had a temporary name.
            let _ = fs::remove_dir(output.join(TEMPLATES));
            let _ = fs::remove_dir(output);
        }
        written
    }

    /// The files beside the weights of a model that is a directory; of a GGUF file none, as all is in it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn companions(&self) -> Result<Companions> {
        match &self.source {
            Model::Checkpoint(_) => Companions::of(&self.path),
            Model::Gguf(_) => Ok(Companions::default()),
        }
    }

    fn write_into(&self, output: &Path, options: &DirectoryOptions, watch: &Watch<'_>) -> Result<()> {
        let config = self.config_json(options)?;
        let mut texts = match &self.source {
            Model::Checkpoint(_) => small_files(&self.path)?,
            Model::Gguf(file) => crate::text::Tokenizer::from_gguf(file)?.files(&self.path)?,
        };
        texts.push(("config.json".into(), config.into_bytes()));
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

    /// Which tensors go into which file, in the model's order.
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
            // Of the values in the type that they say they had.
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

    /// `config.json` of the result: the source's with the type of the result, and without what says that it is 4-bit.
    fn config_json(&self, options: &DirectoryOptions) -> Result<String> {
        let mut config = match &self.source {
            Model::Checkpoint(_) => JsonObject::read(&self.path.join("config.json"))?.into_map(),
            Model::Gguf(_) => self.config.json(),
        };
        config.shift_remove("quantization_config");
        config.shift_remove("torch_dtype");
        // The model may have a head of its own though its config says otherwise.
        if !self.config.tie_word_embeddings {
            config.entry("tie_word_embeddings").and_modify(|tied| *tied = false.into());
        }
        config.insert("dtype".into(), options.dtype.to_string().into());
        if let Some(quant) = &options.requantize {
            config.insert("quantization_config".into(), bitsandbytes::quantization_config(quant, options.dtype));
        }
        Ok(String::from_utf8_lossy(&pretty(&config.into())).into_owned())
    }
}

/// JSON as transformers prints it.
fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// A folder of further chat templates, as transformers has it.
const TEMPLATES: &str = "additional_chat_templates";

/// Files beside a model's weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Companions {
    /// Those that a merged model has too: tokenizer, chat templates, generation settings, licences. Paths in the folder.
    pub copied: Vec<String>,
    /// Of these, links that lead out of the folder, and where to. Links of the hub's cache, to blobs of the same model, are not
    /// among them.
    pub outside: Vec<(String, PathBuf)>,
    /// Files and folders that do not come along, but for the weights' own and hidden ones.
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

/// The names of what is in a folder, in order.
fn names_in(folder: &Path) -> Result<Vec<String>> {
    let error = |e: io::Error| Error::io(folder, e);
    let entries = fs::read_dir(folder).map_err(error)?.collect::<io::Result<Vec<_>>>().map_err(error)?;
    let mut names: Vec<String> = entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// The folder that a model's files may lie in: its own, or in the hub's cache (`models--ORG--NAME/snapshots/COMMIT`) that of
/// the repository, where the blobs are.
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

/// Paths in the folder and contents of the files that come along.
fn small_files(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |name: String| {
        let bytes = read_small(&folder.join(&name), MAX_SMALL)?;
        Ok((name, bytes))
    };
    Companions::of(folder)?.copied.into_iter().map(read).collect()
}

/// Removes the tensor files of a model that was in the folder, but for those of these names, which have replaced them.
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
