//! Checkpoints of a run: folders `checkpoint-STEP` that appear whole or not at all.
//!
//! | file | what it is |
//! |---|---|
//! | `adapter_model.safetensors`, `adapter_config.json` | the adapter, as PEFT has it |
//! | `optimizer.safetensors` | AdamW's moments: `NAME.exp_avg` and `NAME.exp_avg_sq` of every tensor of the adapter |
//! | `state.json` | a [`State`] |
//!
//! A folder is filled under another name, flushed to the disk and renamed, so that a run that is killed at any moment
//! leaves complete ones only.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::peft::PeftAdapter;
use crate::formats::safetensors::{OutData, OutTensor, SafetensorsFile, TensorType, write};
use crate::optim::{AdamW, Optimizer};
use crate::tensor::Tensor;

const PREFIX: &str = "checkpoint-";
/// Of folders that are being written or removed.
const HIDDEN: &str = ".qlora-";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const MOMENTS: [&str; 2] = [".exp_avg", ".exp_avg_sq"];

/// Where a run is, beside its tensors. Data order and dropout follow from the step and the seed among the settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Updates done.
    pub step: u32,
    /// Tokens seen, padding left out.
    pub tokens: u64,
    /// The least evaluation loss so far.
    pub best_eval_loss: Option<f64>,
    /// Evaluations since then.
    pub evaluations_since_best: u32,
    /// What decides the run's course.
    pub settings: Map<String, Value>,
}

/// What a checkpoint holds.
pub(super) struct Checkpoint {
    pub adapter: PeftAdapter,
    pub optimizer: Optimizer,
    pub state: State,
}

/// Writes a checkpoint into `output` and returns its folder. One of the same step is the same, and stays.
pub(super) fn save(output: &Path, adapter: &PeftAdapter, optimizer: &Optimizer, state: &State) -> Result<PathBuf> {
    let folder = output.join(format!("{PREFIX}{}", state.step));
    if folder.exists() {
        return Ok(folder);
    }
    let start = Instant::now();
    let io_error = |e: io::Error| Error::io(&folder, e);
    // Removed again if anything below fails.
    let hidden = tempfile::Builder::new().prefix(HIDDEN).tempdir_in(output).map_err(io_error)?;
    adapter.write(hidden.path()).map_err(|e| renamed(e, hidden.path(), &folder))?;

    let mut tensors = Vec::new();
    for (name, first, second) in optimizer.moments() {
        for (suffix, tensor) in MOMENTS.into_iter().zip([first, second]) {
            let bytes: Vec<u8> = bytemuck::cast_slice(&tensor.to_vec()?).to_vec();
            let (name, shape) = (format!("{name}{suffix}"), tensor.shape().to_vec());
            tensors.push(OutTensor { name, dtype: TensorType::F32, shape, data: OutData::Bytes(bytes.into()) });
        }
    }
    write(&hidden.path().join(OPTIMIZER), tensors, BTreeMap::new()).map_err(|e| renamed(e, hidden.path(), &folder))?;

    let text = serde_json::to_vec_pretty(state).map_err(|e| io_error(e.into()))?;
    let path = hidden.path().join(STATE);
    fs::write(&path, text).and_then(|()| File::open(&path)?.sync_all()).map_err(io_error)?;
    sync_folder(hidden.path()).map_err(io_error)?;
    make_readable(hidden.path()).map_err(io_error)?;
    fs::rename(hidden.path(), &folder).map_err(io_error)?;
    sync_folder(output).map_err(io_error)?;
    // Nothing is left under its name to be removed.
    let _ = hidden.keep();
    tracing::info!(step = state.step, seconds = start.elapsed().as_secs_f64(), "wrote {}", folder.display());
    Ok(folder)
}

/// An error about a file in the hidden folder, under the name that it would have had.
fn renamed(error: Error, hidden: &Path, folder: &Path) -> Error {
    match error {
        Error::Io { path, message } => {
            let path = path.strip_prefix(hidden).map_or(path.clone(), |file| folder.join(file));
            Error::Io { path, message }
        }
        other => other,
    }
}

/// The entries of a folder survive a power cut too. Only Unix can, and need, be asked for that.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// The permissions of an ordinary new folder, not only the owner's.
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

/// The checkpoints in `output`, by step.
pub(super) fn list(output: &Path) -> Result<BTreeMap<u32, PathBuf>> {
    let io_error = |e: io::Error| Error::io(output, e);
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(output).map_err(io_error)? {
        let entry = entry.map_err(io_error)?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|step| step.parse().ok());
        if let Some(step) = step {
            found.insert(step, entry.path());
        }
    }
    Ok(found)
}

/// Removes all but the newest `keep` checkpoints, and what a run that was killed left half-written.
pub(super) fn clean(output: &Path, keep: usize) -> Result<()> {
    let io_error = |e: io::Error| Error::io(output, e);
    let all = list(output)?;
    for (step, folder) in all.iter().take(all.len().saturating_sub(keep)) {
        // Never half of it under its name.
        let hidden = output.join(format!("{HIDDEN}old-{step}"));
        fs::rename(folder, &hidden).map_err(io_error)?;
    }
    for entry in fs::read_dir(output).map_err(io_error)? {
        let entry = entry.map_err(io_error)?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(HIDDEN)) {
            let path = entry.path();
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.map_err(io_error)?;
        }
    }
    Ok(())
}

/// Where the run was that wrote the checkpoint in `folder`.
pub(super) fn state(folder: &Path) -> Result<State> {
    let path = folder.join(STATE);
    let text = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::File { path, message: e.to_string() })
}

/// Reads the checkpoint in `folder`; `config` is the optimizer's.
pub(super) fn load(folder: &Path, device: &Device, config: AdamW) -> Result<Checkpoint> {
    let state = state(folder)?;
    let adapter = PeftAdapter::read(folder)?;

    let file = SafetensorsFile::open(folder.join(OPTIMIZER))?;
    let mut moments = Vec::new();
    for name in file.names().iter().filter_map(|name| name.strip_suffix(MOMENTS[0])) {
        let tensor = |suffix: &str| {
            let key = format!("{name}{suffix}");
            let found = file.tensor(&key)?;
            let values = found.f32s().ok_or_else(|| file.tensor_error(&key, format!("is {}, not F32", found.dtype)))?;
            Tensor::from_slice(device, found.shape, &values)
        };
        moments.push((name.to_owned(), tensor(MOMENTS[0])?, tensor(MOMENTS[1])?));
    }
    Ok(Checkpoint { adapter, optimizer: Optimizer::restored(config, state.step, moments), state })
}
