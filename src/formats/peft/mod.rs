//! LoRA adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Tensors of the module at `PATH`, such as `model.layers.0.self_attn.q_proj`:
//!
//! | key | shape | |
//! |---|---|---|
//! | `base_model.model.PATH.lora_A.weight` | `[r, in]` | |
//! | `base_model.model.PATH.lora_B.weight` | `[out, r]` | |
//! | `base_model.model.PATH.lora_B.bias` | `[out]` | with `lora_bias` |
//! | `base_model.model.PATH.lora_magnitude_vector` | `[out]` | with `use_dora` |

mod config;
mod targets;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use ndarray::Array2;

use serde_json::{Map, Value};

use super::json::JsonObject;
use super::safetensors::{self, OutData, OutTensor, SafetensorsFile, TensorType};
use super::staged::StagedFile;
use crate::error::{Error, Result};

pub use config::{InitLoraWeights, PeftConfig};
pub use targets::{ModulePatterns, ModuleRegex, TargetModules, Targets};

/// Name of the config in an adapter's folder.
#[doc(hidden)]
pub const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const BIAS: &str = ".lora_B.bias";
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// Path of the output head.
const HEAD: &str = "lm_head";

/// Key of a module's tensor; `kind` is "lora_A", "lora_B" or "lora_magnitude_vector".
pub(crate) fn tensor_name(path: &str, kind: &str) -> String {
    let weight = if kind.starts_with("lora_magnitude") { "" } else { ".weight" };
    format!("{PREFIX}{path}.{kind}{weight}")
}

/// Contents of `adapter_config.json` in `folder`, whatever kind of adapter it describes.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] if it can't be read or isn't a JSON object.
#[doc(hidden)]
pub fn config_json(folder: impl AsRef<Path>) -> Result<Map<String, Value>> {
    Ok(JsonObject::read(&folder.as_ref().join(CONFIG))?.map().clone())
}

/// Maps the tensors of the adapter in `folder`.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] for a missing or malformed file.
#[doc(hidden)]
pub fn open_tensors(folder: impl AsRef<Path>) -> Result<SafetensorsFile> {
    let folder = folder.as_ref();
    let path = folder.join(TENSORS);
    if !path.exists() && folder.join("adapter_model.bin").exists() {
        let message = format!("has adapter_model.bin, but no {TENSORS}; convert it to safetensors");
        return Err(Error::File { path: folder.into(), message });
    }
    SafetensorsFile::open(path)
}

/// Path of the module that tensor `key` in an adapter's file belongs to; `None` if it isn't part
/// of a LoRA layer.
#[doc(hidden)]
pub fn module_of(key: &str) -> Option<&str> {
    split_key(key).ok().map(|(path, _)| path)
}

/// A LoRA adapter in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftAdapter {
    /// Its configuration.
    pub config: PeftConfig,
    /// Its values, by module path.
    pub modules: BTreeMap<String, PeftModule>,
}

/// Values for one module [out, in].
#[derive(Clone, Debug, PartialEq)]
pub struct PeftModule {
    /// A, [r, in].
    pub a: Array2<f32>,
    /// B, [out, r].
    pub b: Array2<f32>,
    /// DoRA's magnitude, \[out\].
    pub magnitude: Option<Vec<f32>>,
    /// The bias of B, \[out\].
    pub bias: Option<Vec<f32>>,
}

impl PeftAdapter {
    /// Reads the adapter in `folder`. 16-bit tensors are widened.
    ///
    /// # Errors
    /// Errors of [`PeftConfig::read`]; [`Error::Io`] or [`Error::File`] for a missing or malformed
    /// tensor file; [`Error::Tensor`] for a tensor that is missing or unknown, has another type or
    /// shape than its module's rank requires, or belongs to a module that the config doesn't
    /// target.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let config = PeftConfig::read(folder)?;
        let file = open_tensors(folder)?;
        let mut modules = BTreeMap::new();
        for key in file.names() {
            let (path, suffix) = split_key(key).map_err(|message| file.tensor_error(key, message))?;
            let a = key_of(path, A);
            if file.get(&a).is_none() {
                return Err(file.tensor_error(&a, format!("is missing, but there is {key:?}")));
            }
            if suffix == A {
                let module = PeftModule::read(&file, path)?;
                module.check(&config, path).map_err(|(suffix, e)| file.tensor_error(&key_of(path, suffix), e))?;
                modules.insert(path.to_owned(), module);
            }
        }
        if modules.is_empty() {
            return Err(Error::File { path: file.path().into(), message: "has no LoRA tensors".into() });
        }
        Ok(PeftAdapter { config, modules })
    }

    /// Writes the adapter to `folder`, creating it if needed, so that PEFT can load it. Both files
    /// are complete on disk before the first is renamed into place, so a failure leaves an old
    /// adapter unchanged.
    ///
    /// # Errors
    /// [`Error::Io`] if writing fails; [`Error::File`] or [`Error::Tensor`] for anything that
    /// [`read`](Self::read) would refuse.
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let (config_path, path) = (folder.join(CONFIG), folder.join(TENSORS));
        let config_error = |message: String| Error::File { path: config_path.clone(), message };
        self.config.check().map_err(|(key, message)| config_error(format!("`{key}`: {message}")))?;
        let text = self.config.text().map_err(|e| config_error(e.to_string()))?;
        if self.modules.is_empty() {
            return Err(Error::File { path, message: "would have no LoRA tensors".into() });
        }
        let mut tensors = Vec::new();
        for (module, values) in &self.modules {
            let error = |(suffix, message)| Error::Tensor { path: path.clone(), key: key_of(module, suffix), message };
            values.check(&self.config, module).map_err(error)?;
            tensors.extend(values.tensors(module));
        }
        let io_error = |path: &Path, e: io::Error| Error::io(path, e);
        fs::create_dir_all(folder).map_err(|e| io_error(folder, e))?;
        let tensors = safetensors::stage(&path, tensors, BTreeMap::new())?;
        let config =
            StagedFile::new(&config_path, |out| out.write_all(text.as_bytes()).map_err(|e| io_error(&config_path, e)))?;
        tensors.commit()?;
        config.commit()
    }
}

impl PeftModule {
    fn read(file: &SafetensorsFile, path: &str) -> Result<Self> {
        let matrix = |suffix| {
            let key = key_of(path, suffix);
            let (shape, values) = read_tensor(file, &key)?;
            let error = || file.tensor_error(&key, format!("has shape {shape:?}, but it must be a matrix"));
            let &[rows, cols] = shape else { return Err(error()) };
            Array2::from_shape_vec((rows, cols), values).map_err(|_| error())
        };
        let vector = |suffix| {
            let key = key_of(path, suffix);
            if file.get(&key).is_none() {
                return Ok(None);
            }
            match read_tensor(file, &key)? {
                ([_], values) => Ok(Some(values)),
                (shape, _) => Err(file.tensor_error(&key, format!("has shape {shape:?}, but it must be a vector"))),
            }
        };
        Ok(PeftModule { a: matrix(A)?, b: matrix(B)?, magnitude: vector(MAGNITUDE)?, bias: vector(BIAS)? })
    }

    /// Checks the values against the config. The error is the end of a key and what is wrong with
    /// its tensor.
    fn check(&self, config: &PeftConfig, path: &str) -> Result<(), (&'static str, String)> {
        let rank = config.rank(path);
        let ((a_rows, d_in), (d_out, b_cols)) = (self.a.dim(), self.b.dim());
        let vector = |suffix, values: &Option<Vec<f32>>, key: &str, wanted: bool| match values {
            None if wanted => Err((suffix, format!("is missing, but `{key}` is set in {CONFIG}"))),
            Some(_) if !wanted => Err((suffix, format!("exists, but `{key}` is not set in {CONFIG}"))),
            Some(values) if values.len() != d_out => {
                Err((suffix, format!("has shape [{}], expected [{d_out}], the number of rows of B", values.len())))
            }
            _ => Ok(()),
        };
        if !config.targets.matches(path, path == HEAD) {
            Err((A, format!("belongs to a module that `target_modules` in {CONFIG} leaves out")))
        } else if a_rows != rank {
            Err((A, format!("has shape [{a_rows}, {d_in}], expected [{rank}, {d_in}], the rank of the config")))
        } else if b_cols != rank {
            Err((B, format!("has shape [{d_out}, {b_cols}], expected [{d_out}, {rank}], the rank of the config")))
        } else {
            vector(MAGNITUDE, &self.magnitude, "use_dora", config.use_dora)?;
            vector(BIAS, &self.bias, "lora_bias", config.lora_bias)
        }
    }

    fn tensors<'a>(&'a self, path: &str) -> Vec<OutTensor<'a>> {
        let tensor = |suffix, shape: &[usize], bytes| OutTensor {
            name: key_of(path, suffix),
            dtype: TensorType::F32,
            shape: shape.into(),
            data: OutData::Bytes(bytes),
        };
        let matrix = |suffix, values: &'a Array2<f32>| tensor(suffix, values.shape(), bytes(values));
        let vector = |suffix, values: &'a Option<Vec<f32>>| {
            let values = values.as_ref()?;
            Some(tensor(suffix, &[values.len()], Cow::Borrowed(bytemuck::cast_slice(values))))
        };
        let vectors = [vector(MAGNITUDE, &self.magnitude), vector(BIAS, &self.bias)];
        [matrix(A, &self.a), matrix(B, &self.b)].into_iter().chain(vectors.into_iter().flatten()).collect()
    }
}

/// Bytes of the values, row by row.
fn bytes(values: &Array2<f32>) -> Cow<'_, [u8]> {
    match values.as_slice() {
        Some(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
        None => Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
    }
}

/// Splits `key` into the module's path and the kind of tensor. The error says what is wrong with
/// the key.
fn split_key(key: &str) -> Result<(&str, &'static str), &'static str> {
    let rest = key.strip_prefix(PREFIX).ok_or("lacks the prefix `base_model.model.`, so PEFT wouldn't load it")?;
    let known = [A, B, BIAS, MAGNITUDE].into_iter().find_map(|suffix| Some((rest.strip_suffix(suffix)?, suffix)));
    known.ok_or(if rest.contains(".lora_embedding_") {
        "adapts an embedding, which is not supported"
    } else if rest.contains(".lora_") {
        "not a known LoRA tensor"
    } else {
        "is a whole weight (of `modules_to_save`, or a resized embedding), which is not supported"
    })
}

fn key_of(path: &str, suffix: &str) -> String {
    format!("{PREFIX}{path}{suffix}")
}

/// Reads shape and values of tensor `key`.
fn read_tensor<'a>(file: &'a SafetensorsFile, key: &str) -> Result<(&'a [usize], Vec<f32>)> {
    let tensor = file.tensor(key)?;
    let message = || format!("is {}, expected F32, F16 or BF16", tensor.dtype);
    let floats = tensor.floats().ok_or_else(|| file.tensor_error(key, message()))?;
    Ok((tensor.shape, floats.into_f32()))
}

#[cfg(test)]
mod tests;
