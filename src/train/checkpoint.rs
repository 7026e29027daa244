//! Checkpoints of a run: folders `checkpoint-STEP`, written atomically.
//!
//! | file | content |
//! | --- | --- |
//! | `adapter_model.safetensors`, `adapter_config.json` | the adapter in PEFT's format |
//! | `optimizer.safetensors` | moments of each tensor: `NAME.exp_avg`, `NAME.exp_avg_sq` |
//! | `metrics.jsonl` | the run's records so far |
//! | `state.json` | a [`State`]; digests (SHA-256) of the other files and of itself |
//!
//! A folder is filled under a temporary name, flushed to disk and renamed. So a run that is killed
//! at any moment leaves only complete checkpoints. Digests reveal later damage.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::metrics::Metrics;
use crate::autograd::Parameter;
use crate::error::{Error, Result};
use crate::formats::peft::PeftAdapter;
use crate::formats::safetensors::{OutData, OutTensor, SafetensorsFile, TensorType, write};
use crate::formats::temporary;
use crate::nn::Decoder;
use crate::optim::{AdamW, Optimizer};
use crate::tensor::Tensor;

const PREFIX: &str = "checkpoint-";
/// Suffix of the names of damaged checkpoints.
const DAMAGED: &str = ".damaged";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
/// Keys of the state's file besides those of [`State`].
const FILES: &str = "files";
const DIGEST: &str = "digest";
const MOMENTS: [&str; 2] = [".exp_avg", ".exp_avg_sq"];

/// State of a run besides its tensors. Data order and dropout follow from the step and the seed
/// (in the settings).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Number of updates done.
    pub step: u32,
    /// Number of tokens seen, without padding.
    pub tokens: u64,
    /// Lowest evaluation loss so far.
    pub best_eval_loss: Option<f64>,
    /// Number of evaluations since then.
    pub evaluations_since_best: u32,
    /// Settings that determine the run's course.
    pub settings: Map<String, Value>,
}

/// Writes a checkpoint to `output` and returns its folder. `moments` are those of each parameter,
/// by its name.
pub(super) fn save(
    output: &Path,
    adapter: &PeftAdapter,
    moments: &[(String, [&Tensor; 2])],
    metrics: &Metrics,
    state: &State,
) -> Result<PathBuf> {
    let folder = output.join(format!("{PREFIX}{}", state.step));
    let start = Instant::now();
    let io_error = |e: io::Error| Error::io(&folder, e);
    // The temporary folder is removed if anything below fails.
    let hidden = tempfile::Builder::new().prefix(temporary::PREFIX).tempdir_in(output).map_err(io_error)?;
    fill(hidden.path(), adapter, moments, metrics, state).map_err(|e| renamed(e, hidden.path(), &folder))?;
    make_readable(hidden.path()).map_err(io_error)?;
    fs::rename(hidden.path(), &folder).map_err(io_error)?;
    temporary::sync_folder(output).map_err(io_error)?;
    // The folder was renamed, so nothing is left to remove.
    let _ = hidden.keep();
    tracing::info!(step = state.step, seconds = start.elapsed().as_secs_f64(), "wrote {}", folder.display());
    Ok(folder)
}

fn fill(
    folder: &Path,
    adapter: &PeftAdapter,
    moments: &[(String, [&Tensor; 2])],
    metrics: &Metrics,
    state: &State,
) -> Result<()> {
    adapter.write(folder)?;
    let mut tensors = Vec::new();
    for (name, both) in moments {
        for (suffix, tensor) in MOMENTS.into_iter().zip(both) {
            let bytes: Vec<u8> = bytemuck::cast_slice(&tensor.to_vec()?).to_vec();
            let (name, shape) = (format!("{name}{suffix}"), tensor.shape().to_vec());
            tensors.push(OutTensor { name, dtype: TensorType::F32, shape, data: OutData::Bytes(bytes.into()) });
        }
    }
    write(&folder.join(OPTIMIZER), tensors, BTreeMap::new())?;
    metrics.save(folder)?;

    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.insert(name, digest(&path).map_err(|e| Error::io(&path, e))?);
    }
    let path = folder.join(STATE);
    let io_error = |e: io::Error| Error::io(&path, e);
    let text = seal(state, &files).map_err(|e| io_error(e.into()))?;
    fs::write(&path, text).and_then(|()| File::open(&path)?.sync_all()).map_err(io_error)?;
    temporary::sync_folder(folder).map_err(|e| Error::io(folder, e))
}

/// Serializes the state file.
fn seal(state: &State, files: &BTreeMap<String, String>) -> serde_json::Result<Vec<u8>> {
    let mut all = serde_json::to_value(state)?;
    all[FILES] = json!(files);
    all[DIGEST] = hex(Sha256::digest(serde_json::to_vec(&all)?)).into();
    serde_json::to_vec_pretty(&all)
}

/// Parses the output of [`seal`]; the error says what is wrong with it.
fn unseal(text: &[u8]) -> Result<(State, BTreeMap<String, String>), String> {
    let mut all: Map<String, Value> = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    let stated = all.shift_remove(DIGEST).ok_or(format!("`{DIGEST}` is missing"))?;
    let found = hex(Sha256::digest(serde_json::to_vec(&all).map_err(|e| e.to_string())?));
    if stated != found.as_str() {
        return Err("its digest doesn't match".into());
    }
    let files = all.shift_remove(FILES).ok_or(format!("`{FILES}` is missing"))?;
    let files = serde_json::from_value(files).map_err(|e| e.to_string())?;
    Ok((serde_json::from_value(all.into()).map_err(|e| e.to_string())?, files))
}

/// SHA-256 digest of a file.
fn digest(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hex(hasher.finalize()))
}

fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Rewrites an error about a file in the temporary folder to the file's final name.
fn renamed(error: Error, hidden: &Path, folder: &Path) -> Error {
    match error {
        Error::Io { path, kind, message } => {
            let path = path.strip_prefix(hidden).map_or(path.clone(), |file| folder.join(file));
            Error::Io { path, kind, message }
        }
        other => other,
    }
}

/// Gives the folder ordinary permissions, not only the owner's.
fn make_readable(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        let parent = folder.parent().unwrap_or(Path::new("."));
        fs::set_permissions(folder, fs::metadata(parent)?.permissions())?;
    }
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

/// Checkpoints in `output`, by step.
pub(super) fn list(output: &Path) -> Result<BTreeMap<u32, PathBuf>> {
    let io_error = |e: io::Error| Error::io(output, e);
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(output).map_err(io_error)? {
        let entry = entry.map_err(io_error)?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|step| step.parse().ok());
        // A file of that name isn't a checkpoint.
        if let Some(step) = step.filter(|_| entry.path().is_dir()) {
            found.insert(step, entry.path());
        }
    }
    Ok(found)
}

/// Removes all but the newest `keep` checkpoints.
pub(super) fn remove_old(output: &Path, keep: usize) -> Result<()> {
    let all = list(output)?;
    for (step, folder) in all.iter().take(all.len().saturating_sub(keep)) {
        // Rename first, so that no half-removed folder keeps its name.
        let hidden = output.join(format!("{}old-{step}", temporary::PREFIX));
        fs::rename(folder, &hidden).and_then(|()| fs::remove_dir_all(&hidden)).map_err(|e| Error::io(folder, e))?;
    }
    Ok(())
}

/// Removes what a killed run left half-written or half-removed. No run may be alive.
pub(super) fn remove_leftovers(output: &Path) -> Result<()> {
    temporary::remove_abandoned(output);
    for entry in fs::read_dir(output).map_err(|e| Error::io(output, e))? {
        let path = entry.map_err(|e| Error::io(output, e))?.path();
        let is_hidden = |name: &str| name.starts_with(temporary::PREFIX);
        if path.is_dir() && path.file_name().and_then(|name| name.to_str()).is_some_and(is_hidden) {
            fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// Returns the newest intact checkpoint in `output` and its state. Renames newer ones that are
/// damaged, with a warning.
///
/// # Errors
/// [`Error::File`] if all checkpoints are damaged, [`Error::Io`] if one can't be read.
pub(super) fn newest(output: &Path) -> Result<Option<(PathBuf, State)>> {
    let mut damaged: Vec<(PathBuf, String)> = Vec::new();
    for folder in list(output)?.into_values().rev() {
        match check(&folder)? {
            Ok(state) => {
                for (path, what) in damaged {
                    let aside = set_aside(&path).map_err(|e| Error::io(&path, e))?;
                    tracing::warn!(
                        "{what}; continuing from {}; the damaged checkpoint is now {}",
                        folder.display(),
                        aside.display()
                    );
                }
                return Ok(Some((folder, state)));
            }
            Err(what) => damaged.push((folder, what)),
        }
    }
    match damaged.into_iter().next() {
        None => Ok(None),
        Some((_, what)) => {
            let message = format!("no intact checkpoint is left: {what}; start again in another folder");
            Err(Error::File { path: output.into(), message })
        }
    }
}

/// Returns the state of an intact checkpoint, or says what is damaged.
fn check(folder: &Path) -> Result<Result<State, String>> {
    let damage = |path: &Path, what: &str| format!("{} is damaged: {what}", path.display());
    let unreadable = |path: &Path, error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(damage(path, "it is missing")),
        // EIO: the disk can't read a block any more. Other errors may be temporary.
        _ if cfg!(unix) && error.raw_os_error() == Some(5) => Ok(damage(path, &error.to_string())),
        _ => Err(Error::io(path, error)),
    };
    let path = folder.join(STATE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) => return unreadable(&path, error).map(Err),
    };
    let (state, files) = match unseal(&text) {
        Ok(found) => found,
        Err(what) => return Ok(Err(damage(&path, &what))),
    };
    for (name, wanted) in files {
        let path = folder.join(name);
        match digest(&path) {
            Ok(found) if found == wanted => {}
            Ok(_) => return Ok(Err(damage(&path, "its digest doesn't match"))),
            Err(error) => return unreadable(&path, error).map(Err),
        }
    }
    Ok(Ok(state))
}

/// Renames a damaged checkpoint so that it isn't found any more.
fn set_aside(folder: &Path) -> io::Result<PathBuf> {
    let mut name = folder.as_os_str().to_owned();
    name.push(DAMAGED);
    let aside = PathBuf::from(name);
    if aside.exists() {
        fs::remove_dir_all(&aside)?;
    }
    fs::rename(folder, &aside)?;
    temporary::sync_parent(folder)?;
    Ok(aside)
}

/// Settings of the run that wrote the newest checkpoint in `output` with a readable state.
pub(super) fn settings(output: &Path) -> Result<Option<Map<String, Value>>> {
    if !output.is_dir() {
        return Ok(None);
    }
    let states =
        list(output)?.into_values().rev().filter_map(|folder| unseal(&fs::read(folder.join(STATE)).ok()?).ok());
    Ok(states.map(|(state, _)| state.settings).next())
}

/// Loads the optimizer from the checkpoint in `folder`, saved after `step` updates. The model has
/// the checkpoint's adapter already.
pub(super) fn optimizer(folder: &Path, step: u32, model: &Decoder, config: AdamW) -> Result<Optimizer> {
    let file = SafetensorsFile::open(folder.join(OPTIMIZER))?;
    let parameters: HashMap<String, &Parameter> = model.parameters().collect();
    let mut moments = Vec::new();
    for name in file.names().iter().filter_map(|name| name.strip_suffix(MOMENTS[0])) {
        let tensor = |suffix: &str| {
            let key = format!("{name}{suffix}");
            let found = file.tensor(&key)?;
            let values = found.f32s().ok_or_else(|| file.tensor_error(&key, format!("is {}, not F32", found.dtype)))?;
            Tensor::from_slice(model.device(), found.shape, &values)
        };
        let parameter = parameters.get(name).ok_or_else(|| file.tensor_error(name, "isn't in the adapter"))?;
        moments.push((*parameter, [tensor(MOMENTS[0])?, tensor(MOMENTS[1])?]));
    }
    Optimizer::restored(config, step, moments)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_state_comes_back_to_the_bit_or_not_at_all(
            loss in any::<f64>().prop_filter("JSON has only finite numbers", |loss| loss.is_finite()),
            lr in any::<f64>().prop_filter("JSON has only finite numbers", |lr| lr.is_finite()),
            tokens in any::<u64>(),
            at in any::<prop::sample::Index>(),
        ) {
            let settings = Map::from_iter([("learning rate".to_owned(), json!(lr))]);
            let state = State { step: 3, tokens, best_eval_loss: Some(loss), evaluations_since_best: 1, settings };
            let files = BTreeMap::from([("x".to_owned(), "00".to_owned())]);
            let mut text = seal(&state, &files).unwrap();
            let (back, _) = unseal(&text).unwrap();
            prop_assert_eq!(back.best_eval_loss.map(f64::to_bits), Some(loss.to_bits()));
            prop_assert_eq!(back.settings["learning rate"].as_f64().map(f64::to_bits), Some(lr.to_bits()));
            prop_assert_eq!(&back, &state);
            // A flipped bit is noticed, unless it only changes the layout.
            let at = at.index(text.len());
            text[at] ^= 1;
            prop_assert!(unseal(&text).map_or(true, |(damaged, _)| damaged == state));
        }
    }
}
