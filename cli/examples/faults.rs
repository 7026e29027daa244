//! Interrupts a training run at the system calls that touch its files, one call at a time, by
//! killing it or failing the call. Then resumes the run and reports what is wrong.
//!
//! `scripts/faults.sh` builds and runs it. A run is right if, once resumed, it ends with status 0;
//! its adapters, plots, checkpoints and metrics (without speed and memory) equal those of an
//! undisturbed run; and nothing else is left in its folder. A failing call must end the run with
//! status 1 and a message, or have no effect. If nothing was saved yet, every other run is started
//! again without `--resume`.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

const USAGE: &str = "usage: faults [--full] [kill|eio]...";

/// Calls that make, change, name or remove files. Not every architecture has all; strace ignores
/// missing ones marked with `?`.
const CALLS: [&str; 14] = [
    "write",
    "pwrite64",
    "openat",
    "fsync",
    "fdatasync",
    "ftruncate",
    "copy_file_range",
    "?rename",
    "?renameat",
    "?renameat2",
    "?mkdir",
    "mkdirat",
    "?unlink",
    "unlinkat",
];

/// Points to test per kind of fault, unless all are requested: about a minute on two cores.
const SAMPLE: usize = 60;

/// A run that does nothing for this long hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// With evaluations, early stopping and several checkpoints, old ones of which are removed.
const FLAGS: [&str; 21] = [
    "--max-steps",
    "4",
    "--batch-size",
    "1",
    "--seq-len",
    "16",
    "--rank",
    "2",
    "--save-every",
    "1",
    "--keep",
    "2",
    "--eval-split",
    "0.5",
    "--eval-every",
    "2",
    "--early-stop",
    "9",
    "--device",
    "cpu",
    "--no-packing",
];

/// The `number`-th call of its kind that a thread makes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    call: String,
    number: usize,
}

struct Trial {
    qlora: PathBuf,
    model: PathBuf,
    data: PathBuf,
    /// Folder of all runs.
    folder: PathBuf,
}

/// Files that a run leaves, by name: metrics without speed and memory; for plots only their
/// existence.
type Left = BTreeMap<String, Vec<u8>>;

impl Trial {
    /// Runs in `output`, under strace if there are arguments for it. Returns the status (`None` if
    /// a signal ended it) and the last line on stderr.
    fn run(&self, output: &Path, strace: &[String], resume: bool) -> Result<(Option<i32>, String), Box<dyn Error>> {
        let mut command = Command::new(if strace.is_empty() { self.qlora.as_os_str() } else { "strace".as_ref() });
        if !strace.is_empty() {
            command.args(strace).arg(&self.qlora);
        }
        command
            .args(["finetune", "--model"])
            .arg(&self.model)
            .arg("--data")
            .arg(&self.data)
            .arg("--output")
            .arg(output);
        command.args(FLAGS).args(resume.then_some("--resume"));
        // One thread makes all calls, so that their numbers are the same every time.
        command.env("RAYON_NUM_THREADS", "1").env("QLORA_TUNE", "0");
        let log = output.with_extension("log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?);
        let mut child = command.spawn()?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > PATIENCE {
                child.kill()?;
                child.wait()?;
                return Ok((None, "hangs".into()));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
        Ok((status.code(), text.trim_end().lines().next_back().unwrap_or_default().to_owned()))
    }

    /// Does an undisturbed run in `output`. Returns the calls that touch its files, and the files
    /// it leaves.
    fn whole(&self, output: &Path) -> Result<(Vec<Point>, Left), Box<dyn Error>> {
        let trace = self.folder.join("trace");
        let calls = format!("trace={}", CALLS.join(","));
        let strace = ["-f", "-y", "-o", &trace.display().to_string(), "-e", &calls].map(str::to_owned);
        let (status, message) = self.run(output, &strace, false)?;
        if status != Some(0) {
            return Err(format!("an undisturbed run ends with {status:?}: {message}").into());
        }
        let mut numbers: HashMap<(String, String), usize> = HashMap::new();
        let mut points = Vec::new();
        for line in String::from_utf8_lossy(&fs::read(trace)?).lines() {
            // "1234 fsync(5</folder/file>) = 0"
            let Some((thread, rest)) = line.split_once(' ') else { continue };
            let Some((call, arguments)) = rest.trim_start().split_once('(') else { continue };
            let number = numbers.entry((thread.into(), call.into())).or_default();
            *number += 1;
            if arguments.contains(&output.display().to_string()) {
                points.push(Point { call: call.into(), number: *number });
            }
        }
        points.sort();
        points.dedup();
        Ok((points, left(output)?))
    }

    /// Lets the fault hit a run at this point, resumes the run, and returns what is wrong; `None`
    /// if the call was not made.
    fn hit(&self, point: &Point, fault: &str, output: &Path, wanted: &Left) -> Result<Option<String>, Box<dyn Error>> {
        let _ = fs::remove_dir_all(output);
        let Point { call, number } = point;
        let what = if fault == "kill" { "signal=SIGKILL" } else { "error=EIO" };
        let inject = format!("inject={call}:{what}:when={number}");
        let trace = format!("trace={call}");
        let strace = ["-f", "-o", "/dev/null", "-e", &trace, "-e", &inject].map(str::to_owned);
        let (status, message) = self.run(output, &strace, false)?;
        match status {
            Some(0) if fault == "kill" => return Ok(None),
            Some(0) => {}
            // Writing the message may itself be the call that fails.
            Some(1) if fault == "eio" && (message.starts_with("error: ") || call == "write") => {}
            None if fault == "kill" => {}
            status => return Ok(Some(format!("status {status:?}: {message}"))),
        }
        let saved = left(output)?.keys().any(|name| name.starts_with("checkpoint-"));
        let (status, message) = self.run(output, &[], saved || status == Some(0) || number % 2 == 0)?;
        if status != Some(0) {
            let message = message.replace(&output.display().to_string(), "OUT");
            return Ok(Some(format!("resumed, it ends with {status:?}: {message}")));
        }
        let found = left(output)?;
        let names: Vec<&str> = wanted.keys().chain(found.keys()).map(String::as_str).collect();
        let wrong = names.into_iter().find(|&name| wanted.get(name) != found.get(name));
        Ok(Some(wrong.map_or("right".into(), |name| format!("{name} differs from an undisturbed run's"))))
    }
}

/// Returns the contents of a folder and of the folders in it.
fn left(folder: &Path) -> Result<Left, Box<dyn Error>> {
    let mut all = Left::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        if !next.exists() {
            continue;
        }
        for entry in fs::read_dir(next)? {
            let path = entry?.path();
            let name = path.strip_prefix(folder)?.display().to_string();
            if path.is_dir() {
                all.insert(name, Vec::new());
                folders.push(path);
                continue;
            }
            let bytes = match path.file_name().and_then(|name| name.to_str()) {
                // A plot shows the metrics, and a state has their digest.
                Some("loss.png" | "loss.svg" | "state.json") => Vec::new(),
                Some("metrics.jsonl") => comparable(&fs::read_to_string(&path)?)?.into_bytes(),
                _ => fs::read(&path)?,
            };
            all.insert(name, bytes);
        }
    }
    Ok(all)
}

/// Removes from metrics what depends on the clock and on earlier work of the process.
fn comparable(metrics: &str) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    // If the run was killed, its last line may be cut off.
    for line in metrics.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let mut record: serde_json::Map<String, Value> = serde_json::from_str(line)?;
        ["tokens_per_second", "peak_bytes"].iter().for_each(|key| drop(record.remove(*key)));
        text += &(Value::from(record).to_string() + "\n");
    }
    Ok(text)
}

/// Selects this many points, the same every time, spread over all kinds of calls: the same share
/// of each kind, and at least a few.
fn sample(points: &[Point], count: usize) -> Vec<Point> {
    let mut kinds: BTreeMap<&str, Vec<&Point>> = BTreeMap::new();
    points.iter().for_each(|point| kinds.entry(&point.call).or_default().push(point));
    let mut chosen = Vec::new();
    for of_kind in kinds.values() {
        let share = (of_kind.len() * count).div_ceil(points.len()).max(4).min(of_kind.len());
        chosen.extend((0..share).map(|at| of_kind[at * of_kind.len() / share].clone()));
    }
    chosen
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut faults: Vec<String> = std::env::args().skip(1).collect();
    let full = faults.iter().any(|argument| argument == "--full");
    faults.retain(|argument| argument != "--full");
    if faults.is_empty() {
        faults = vec!["kill".into(), "eio".into()];
    }
    if faults.iter().any(|fault| fault != "kill" && fault != "eio") {
        eprintln!("{USAGE}");
        return Ok(ExitCode::from(2));
    }
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    // This program is in the folder `examples` beside it.
    let qlora = std::env::current_exe()?.parent().and_then(Path::parent).ok_or("no folder of programs")?.join("qlora");
    let folder = tempfile::tempdir()?;
    let data = folder.path().join("data.jsonl");
    let text = fs::read_to_string(assets.join("devil_valid.jsonl"))?;
    fs::write(&data, text.lines().take(8).map(|line| line.to_owned() + "\n").collect::<String>())?;
    let trial = Trial { qlora, model: assets.join("tiny-glossary"), data, folder: folder.path().into() };
    let (points, wanted) = trial.whole(&folder.path().join("whole"))?;

    let mut wrong = 0;
    for fault in faults {
        let start = Instant::now();
        let chosen = if full { points.clone() } else { sample(&points, SAMPLE) };
        let results: Mutex<BTreeMap<String, Vec<String>>> = Mutex::default();
        let next = AtomicUsize::new(0);
        let work = |worker: usize| -> Result<(), String> {
            let output = folder.path().join(format!("{fault}{worker}"));
            while let Some(point) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Some(result) = trial.hit(point, &fault, &output, &wanted).map_err(|error| error.to_string())? {
                    let place = format!("{}:{}", point.call, point.number);
                    results.lock().map_err(|error| error.to_string())?.entry(result).or_default().push(place);
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers = std::thread::available_parallelism().map_or(1, usize::from).min(chosen.len().max(1));
            let handles: Vec<_> = (0..workers).map(|worker| scope.spawn(move || work(worker))).collect();
            handles.into_iter().try_for_each(|handle| handle.join().map_err(|_| "a worker panicked".to_owned())?)
        })?;
        println!("{fault}: {} of {} points in {} s", chosen.len(), points.len(), start.elapsed().as_secs());
        for (result, places) in results.into_inner()? {
            println!("  {:4} {result} {}", places.len(), places.iter().take(6).cloned().collect::<Vec<_>>().join(" "));
            wrong += if result == "right" { 0 } else { places.len() };
        }
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
