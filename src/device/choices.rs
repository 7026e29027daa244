//! The variants of kernels that were found to be fastest on a device, and whether its results
//! agree with the CPU's: kept in a file under the driver's version.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::formats::input::read_small;
use crate::hash::QuickState;

/// Maximum size of the file. A choice takes about 100 bytes.
const MOST_BYTES: u64 = 16 << 20;

/// The variant chosen for each case.
pub(super) type Choices = BTreeMap<String, usize>;

/// The choices made on a device.
pub(super) struct Tuner {
    known: Mutex<Choices>,
    /// Choices by a hash of the case, for fast lookup in a dispatch. If two cases collide, one may
    /// run a slower variant.
    quick: Mutex<HashMap<u64, usize, QuickState>>,
    /// Scope of a choice: the GPU, its driver, the tier and this crate's version.
    device: String,
    /// File that keeps the choices. Without one nothing is measured.
    pub file: Option<PathBuf>,
    /// The highest floating-point operations per second measured so far; 0: unknown.
    speed: AtomicU64,
}

/// Case under which the speed is stored, in 10^9 floating-point operations per second.
const SPEED: &str = "GFLOP/s";
const GIGA: u64 = 1_000_000_000;
/// Shortest time from which a speed is derived, in seconds.
const SHORTEST: f64 = 1e-5;

/// The file of choices, unless `QLORA_TUNE` is 0: in the folder `QLORA_CACHE`, or in the user's
/// cache folder.
pub(super) fn default_file() -> Option<PathBuf> {
    if std::env::var("QLORA_TUNE").is_ok_and(|value| value == "0") {
        return None;
    }
    let folder = std::env::var_os("QLORA_CACHE").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    Some(folder.or_else(|| Some(dirs::cache_dir()?.join("qlora-wgpu")))?.join("tuned.json"))
}

impl Tuner {
    /// Loads the choices for `device` from `file`. An unreadable file counts as empty, with a
    /// warning.
    pub(super) fn new(device: String, file: Option<PathBuf>) -> Tuner {
        let known = file.as_deref().map(|file| recall(file, &device));
        let known = known.unwrap_or_default();
        let speed = AtomicU64::new(known.get(SPEED).map_or(0, |&speed| speed as u64 * GIGA));
        Tuner { known: Mutex::new(known), quick: Mutex::default(), device, file, speed }
    }

    /// Floating-point operations per second that the device is known to reach; 0 if unknown.
    pub(super) fn speed(&self) -> u64 {
        self.speed.load(Ordering::Relaxed)
    }

    /// Updates the known speed from the time that some floating-point operations took.
    pub(super) fn note_speed(&self, flops: u64, seconds: f64) {
        // GPU clocks are too coarse for shorter times.
        if seconds < SHORTEST {
            return;
        }
        let speed = (flops as f64 / seconds) as u64;
        // Small gains aren't worth writing a file.
        if speed > GIGA && speed > self.speed.fetch_max(speed, Ordering::Relaxed) / 4 * 5 {
            self.set(SPEED, (speed / GIGA) as usize);
        }
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Choices> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn quick(&self) -> MutexGuard<'_, HashMap<u64, usize, QuickState>> {
        self.quick.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a choice in memory and in the file.
    pub(super) fn set(&self, case: &str, choice: usize) {
        let mut known = self.known();
        known.insert(case.to_owned(), choice);
        keep(self.file.as_deref(), &self.device, &known);
    }
}

/// Reads the choices for a device from the file. An unreadable file counts as empty, with a
/// warning.
pub(super) fn recall(file: &Path, device: &str) -> Choices {
    if !file.exists() {
        return Choices::new();
    }
    read(file).map(|all| of_device(&all, device)).unwrap_or_else(|error| {
        tracing::warn!("kernels will be measured and checked again: {error}");
        Choices::new()
    })
}

/// Writes the choices to the file. A failure doesn't change any results, so it only causes a
/// warning.
pub(super) fn keep(file: Option<&Path>, device: &str, choices: &Choices) {
    if let Some(Err(error)) = file.map(|file| write(file, device, choices)) {
        tracing::warn!("could not save the measurements of this device: {error}");
    }
}

/// Reads the choices of all devices.
fn read(file: &Path) -> Result<serde_json::Map<String, Value>> {
    serde_json::from_slice(&read_small(file, MOST_BYTES)?).map_err(|error| Error::io(file, error))
}

fn of_device(all: &serde_json::Map<String, Value>, device: &str) -> Choices {
    let choices = all.get(device).and_then(Value::as_object).into_iter().flatten();
    choices.filter_map(|(case, choice)| Some((case.clone(), usize::try_from(choice.as_u64()?).ok()?))).collect()
}

/// Merges the choices into the file, which another process may have written meanwhile.
fn write(file: &Path, device: &str, choices: &Choices) -> Result<()> {
    let io = |error: std::io::Error| Error::io(file, error);
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(io)?;
    let mut all = read(file).unwrap_or_default();
    let mut of_device = of_device(&all, device);
    of_device.extend(choices.clone());
    all.insert(device.to_owned(), of_device.into_iter().map(|(case, choice)| (case, Value::from(choice))).collect());
    let whole = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
    serde_json::to_writer_pretty(whole.as_file(), &all).map_err(|error| io(error.into()))?;
    whole.persist(file).map(drop).map_err(|error| io(error.error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_kept_for_their_device_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("deep/tuned.json");
        let new = |device: &str| Tuner::new(device.into(), Some(file.clone()));
        let get = |tuner: &Tuner, case| tuner.known().get(case).copied();
        let (one, other) = (new("one"), new("other"));
        assert_eq!(get(&one, "case"), None);
        one.set("case", 2);
        other.set("case", 1);
        one.set("second", 0);
        let [one, other] = ["one", "other"].map(new);
        assert_eq!((get(&one, "case"), get(&one, "second"), get(&other, "case")), (Some(2), Some(0), Some(1)));
        assert_eq!(get(&other, "second"), None);
        // An unreadable file counts as empty and is replaced.
        std::fs::write(&file, "{\"one\": ").unwrap();
        let one = new("one");
        assert_eq!(get(&one, "case"), None);
        one.set("case", 1);
        assert_eq!(get(&new("one"), "case"), Some(1));
    }

    #[test]
    fn the_highest_speed_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tuned.json");
        let new = |device: &str| Tuner::new(device.into(), Some(file.clone()));
        let one = new("one");
        assert_eq!(one.speed(), 0);
        // One too short to be true, one too slow to matter, one valid.
        for (flops, seconds, wanted) in [(GIGA, 1e-9, 0), (GIGA, 2.0, 0), (6 * GIGA, 1e-3, 6000 * GIGA)] {
            one.note_speed(flops, seconds);
            assert_eq!((one.speed(), new("one").speed()), (wanted, wanted), "{flops} in {seconds} s");
        }
        one.note_speed(GIGA, 1e-3);
        assert_eq!((new("one").speed(), new("other").speed()), (6000 * GIGA, 0));
    }
}
