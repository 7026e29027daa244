//! Chooses the fastest variant of a kernel on a GPU, among variants that give the same bits. Each
//! case is measured once, and the choice is kept in a file under the driver's version.
//!
//! `QLORA_TUNE=0` always takes the first variant in the kernel's table. Variants with another
//! order of sums are never chosen here: the result of a run must not depend on timing.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hash};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use super::gpu::Gpu;
use crate::error::{Error, Result};
use crate::formats::input::read_small;
use crate::hash::QuickState;

/// Minimum and maximum rounds of timed runs, each with one run per variant, and the total seconds
/// after which no more rounds are started.
const ROUNDS: (usize, usize, f64) = (3, 10, 0.01);

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
    file: Option<PathBuf>,
    /// The highest floating-point operations per second measured so far; 0: unknown.
    speed: AtomicU64,
}

/// Case under which the speed is stored, in 10^9 floating-point operations per second.
const SPEED: &str = "GFLOP/s";
const GIGA: u64 = 1_000_000_000;
/// Shortest time from which a speed is derived, in seconds.
const SHORTEST: f64 = 1e-5;

/// The environment variables that switch something off, and a description of that.
const SWITCHES: [(&str, &str); 2] = [
    ("QLORA_TUNE", "do not measure variants of kernels"),
    ("QLORA_CHECK", "do not compare a new driver's results with the CPU's"),
];

/// Checks the values of these variables.
///
/// # Errors
/// [`Error::Invalid`] unless each is 0, 1, empty or unset.
pub(super) fn check_variables() -> Result<()> {
    for (what, off) in SWITCHES {
        match std::env::var_os(what) {
            Some(value) if !["", "0", "1"].iter().any(|known| value == **known) => {
                return Err(Error::invalid(
                    "the environment",
                    what,
                    value.to_string_lossy(),
                    format!("it must be 0 ({off}) or 1 (the default)"),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

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
    fn note_speed(&self, flops: u64, seconds: f64) {
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

    fn known(&self) -> MutexGuard<'_, Choices> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn quick(&self) -> MutexGuard<'_, HashMap<u64, usize, QuickState>> {
        self.quick.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a choice in memory and in the file.
    fn set(&self, case: &str, choice: usize) {
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

impl Gpu {
    /// Returns the fastest of several variants for a case. `case` names the kernel and everything
    /// its time depends on; `key` is the same without text. `run` records one variant. It may be
    /// called many times and must have the same effect every time. Nothing is measured while
    /// profiling or planning.
    pub(crate) fn tuned(
        &self,
        key: impl Hash,
        case: impl FnOnce() -> String,
        variants: usize,
        run: impl Fn(usize) -> Result<()>,
    ) -> Result<usize> {
        let tuner = self.tuner();
        if variants < 2 || tuner.file.is_none() {
            return Ok(0);
        }
        let key = QuickState::default().hash_one(key);
        let quick = tuner.quick().get(&key).copied();
        if let Some(choice) = quick.filter(|&choice| choice < variants) {
            return Ok(choice);
        }
        let case = case();
        let known = tuner.known().get(&case).copied();
        if let Some(choice) = known.filter(|&choice| choice < variants) {
            tuner.quick().insert(key, choice);
            return Ok(choice);
        }
        if self.is_profiling() || self.is_planned() {
            return Ok(0);
        }
        let _span = tracing::trace_span!("tuning kernels").entered();
        // The first run of a variant compiles it.
        (0..variants).try_for_each(&run)?;
        let times = shortest(variants, |variant| {
            let before = self.recorded_flops();
            let time = self.time(|| run(variant))?.as_secs_f64();
            tuner.note_speed(self.recorded_flops() - before, time);
            Ok(time)
        })?;
        let best = (0..variants).min_by(|&one, &other| times[one].total_cmp(&times[other])).unwrap_or_default();
        let ms: Vec<String> = times.iter().map(|time| format!("{:.4}", time * 1e3)).collect();
        tracing::debug!("tuned {case}: variant {best} of [{}] ms", ms.join(", "));
        tuner.set(&case, best);
        tuner.quick().insert(key, best);
        Ok(best)
    }
}

/// Returns the shortest time of each variant. Variants take turns, so that a rising clock affects
/// all of them. Short runs are repeated more often, because their times vary more.
fn shortest(variants: usize, mut time: impl FnMut(usize) -> Result<f64>) -> Result<Vec<f64>> {
    let (fewest, most, enough) = ROUNDS;
    let mut shortest = vec![f64::INFINITY; variants];
    let (mut round, mut total) = (0, 0.0);
    while round < fewest || (round < most && total < enough) {
        for (variant, shortest) in shortest.iter_mut().enumerate() {
            let time = time(variant)?;
            *shortest = shortest.min(time);
            total += time;
        }
        round += 1;
    }
    Ok(shortest)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::device::{Device, GpuOptions};
    use crate::kernels::elementwise::add::add;
    use crate::tensor::Tensor;
    use crate::testing;

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
    fn variants_take_turns_and_short_ones_more_of_them() {
        for (seconds, rounds) in [(1.0, 3), (0.000_6, 5), (0.000_02, 10)] {
            let mut runs = Vec::new();
            let times = shortest(2, |variant| {
                // A clock that rises during the whole first round.
                let slow = if runs.len() < 2 { 5.0 } else { 1.0 };
                runs.push(variant);
                Ok(seconds * slow * if variant == 0 { 1.0 } else { 0.9 })
            })
            .unwrap();
            assert_eq!(times, [seconds, seconds * 0.9]);
            assert_eq!(runs, [0, 1].repeat(rounds), "{seconds}");
        }
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

    #[test]
    fn the_fastest_variant_is_measured_once() {
        let folder = tempfile::tempdir().unwrap();
        for (index, device) in testing::gpus_with(|options| {
            options.tune = Some(folder.path().join("tuned.json"));
        })
        .into_iter()
        .enumerate()
        {
            let Device::Gpu(gpu) = &device else { unreachable!("only GPUs were asked for") };
            let x = Tensor::from_slice(&device, &[1 << 18], &testing::values(1, 1 << 18, 1.0)).unwrap();
            let runs = RefCell::new(Vec::new());
            let run = |variant: usize| {
                runs.borrow_mut().push(variant);
                (0..[40, 1, 40][variant]).try_for_each(|_| add(&x, &x).map(drop))
            };
            let case = || format!("case {index}");
            assert_eq!(gpu.tuned(index, case, 3, run).unwrap(), 1, "{}", testing::name(&device));
            let measured = runs.borrow().clone();
            assert!(measured.chunks(3).all(|round| round == [0, 1, 2]), "they take turns: {measured:?}");
            assert!((3 * (1 + ROUNDS.0)..=3 * (1 + ROUNDS.1)).contains(&measured.len()), "{measured:?}");
            for key in [index, index + 100] {
                assert_eq!(gpu.tuned(key, case, 3, run).unwrap(), 1);
                assert_eq!(runs.borrow().len(), measured.len(), "it is known");
            }
            // A choice that no longer exists is made again.
            assert_eq!(gpu.tuned(index, case, 1, run).unwrap(), 0);
        }
        let plain = Device::gpu(&GpuOptions { tune: None, ..GpuOptions::default() });
        if let Ok(Device::Gpu(gpu)) = plain {
            assert_eq!(gpu.tuned(0, || "case".into(), 3, |_| panic!("nothing is measured")).unwrap(), 0);
        }
    }
}
