//! Compiles every variant of every kernel to machine code for GPUs that aren't in this machine,
//! and reports the rules it breaks.
//!
//! `scripts/codegen.sh` (`make test-codegen`) fetches everything it needs, builds it and runs it.
//! Mesa's compilers run without hardware: mesa-drm-shim makes a driver believe that there is a
//! GPU. Nothing is computed, so this shows registers, spills, occupancy and instructions, but no
//! times. NAK is not NVIDIA's own compiler, and Honeykrisp's is not Metal's.
//!
//! The rules are in `rules.rs`. Everything compiles. Nothing spills. A minimum number of subgroups
//! fits on a unit at once. Kernels for matrix instructions have some, and at most as many gathers
//! and as many transposes. The loops of products load 16 bytes at a time. Three measures match
//! `table.json` within 10 %:
//!
//! - `vector/matrix`: vector instructions per matrix instruction, for cooperative matrices
//! - `vector/weight`: vector instructions per weight that an iteration of the loop decodes, for
//!   matrix-vector products
//! - `FMA-share`: FMAs divided by all vector and memory instructions, for register tiles
//!
//! All three apply to the hot loop, the innermost one around the most matrix instructions or FMAs,
//! with every instruction counted once. If you improve a figure, update the table (`--update`); if
//! you make one worse, say why.
//!
//! For work on a kernel: `sh scripts/codegen.sh --gpu navi31 --show qmatmul_gemv` prints
//! statistics and loops of its variants, and `--keep FOLDER` keeps the listings.

mod amd;
#[cfg_attr(not(target_os = "linux"), path = "no_compile.rs")]
mod compile;
mod gpus;
mod listing;
mod nak;
mod report;
mod rules;
mod table;
mod variants;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;

use gpus::Gpu;
use rules::Record;
use table::Table;

/// A driver that takes this long for all kernels hangs, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(3600);

/// GPUs at a time.
const AT_ONCE: usize = 2;

/// Compiles all kernels for GPUs that aren't in this machine, and judges the machine code. Exit
/// status 1: a rule is broken.
#[derive(Parser, Debug)]
#[command(name = "codegen")]
struct Options {
    /// Only these GPUs: ampere, navi31, gfx1201, navi21, m1, adreno.
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = |name: &str| Gpu::named(name).map(|gpu| gpu.name))]
    gpu: Vec<&'static str>,
    /// Only kernels whose names contain this.
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    kernel: Vec<String>,
    /// Only variants whose constants contain this; '!ragged' excludes.
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    label: Vec<String>,
    /// Print statistics and loops of this kernel's variants, and compile no other kernel.
    #[arg(long, value_name = "KERNEL")]
    show: Option<String>,
    /// Print a table of registers, subgroups and measures, with a line per kernel and GPU.
    #[arg(long)]
    table: bool,
    /// Print every broken rule. By default, only the worst of a kernel's variants that break the
    /// same rule on a GPU.
    #[arg(long)]
    all: bool,
    /// Write the measures to scripts/codegen/table.json.
    #[arg(long)]
    update: bool,
    /// Keep the listings in this folder.
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
    /// Folder with Mesa's packages, unpacked; scripts/codegen.sh sets it.
    #[arg(long, value_name = "FOLDER")]
    mesa: PathBuf,
    /// Folder with mesa-drm-shim's packages, unpacked.
    #[arg(long, value_name = "FOLDER")]
    shims: PathBuf,
    /// Compile for this GPU, whose driver this process runs on, and print one record per line.
    #[arg(long, hide = true)]
    compile: Option<String>,
}

impl Options {
    fn kernels(&self) -> Vec<String> {
        self.show.as_ref().map_or_else(|| self.kernel.clone(), |kernel| vec![kernel.clone()])
    }

    fn gpus(&self) -> Vec<&'static Gpu> {
        gpus::ALL.iter().filter(|gpu| self.gpu.is_empty() || self.gpu.contains(&gpu.name)).collect()
    }
}

/// Result of compiling the kernels for one GPU.
struct Run {
    gpu: &'static Gpu,
    /// Names of the GPU and its driver.
    name: String,
    records: Vec<Record>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match &options.compile {
        Some(gpu) => Gpu::named(gpu).map_err(Into::into).and_then(|gpu| compile_for(gpu, &options)).map(|()| true),
        None => judge(&options),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("codegen: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs in a GPU's own process. Prints its name, then one record per line.
fn compile_for(gpu: &Gpu, options: &Options) -> Result<(), Box<dyn Error>> {
    let driver = compile::Driver::open(gpu.robust)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", driver.name)?;
    let variants = variants::matching(&options.kernels(), &options.label);
    for (at, variant) in variants.iter().filter(|variant| driver.runs(variant)).enumerate() {
        let mut record = Record {
            kernel: variant.kernel.name.into(),
            tier: variant.tier.to_string(),
            label: variant.label.clone(),
            error: None,
            subgroup: 0,
            statistics: BTreeMap::new(),
            summary: None,
        };
        match driver.compile(variant) {
            Err(error) => record.error = Some(error.to_string()),
            Ok(compiled) => {
                let code = compiled.texts.last();
                record.summary = gpu.parse.zip(code).map(|(parse, (_, text))| parse(text).summary());
                (record.subgroup, record.statistics) = (compiled.subgroup, compiled.statistics);
                if let Some(folder) = &options.keep {
                    let stem = format!("{}.{at:04}.{}", gpu.name, variant.kernel.name);
                    keep(folder, &stem, &variant.label, &compiled.texts)?;
                }
            }
        }
        writeln!(out, "{}", serde_json::to_string(&record)?)?;
    }
    out.flush()?;
    // Skips the cleanup of drivers that believe in a GPU that isn't there.
    std::process::exit(0)
}

fn keep(folder: &Path, stem: &str, label: &str, texts: &[(String, String)]) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    for (name, text) in texts {
        let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        fs::write(folder.join(format!("{stem}.{}.txt", name.to_lowercase())), format!("; {label}\n{text}"))?;
    }
    Ok(())
}

/// Compiles for every selected GPU, in a process each, and prints the results. Returns whether all
/// rules hold.
fn judge(options: &Options) -> Result<bool, Box<dyn Error>> {
    let start = Instant::now();
    let mut table = Table::load()?;
    let scratch = tempfile::tempdir()?;
    let gpus = options.gpus();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(&gpu) = gpus.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = run(gpu, options, scratch.path()).map_err(|error| format!("{}: {error}", gpu.name));
                    results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (mut runs, mut failures) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(run) => runs.push(run),
            Err(error) => failures.push(error),
        }
    }
    runs.sort_by_key(|run| run.gpu.name);
    if options.show.is_some() {
        report::show(&runs);
    }
    if options.table {
        report::families(&runs);
    }
    // The keys that a run with these options covers completely.
    let kernels = options.kernels();
    let names: Vec<_> = runs.iter().map(|run| run.gpu.name).collect();
    let meant = |key: &str| {
        let mut words = key.split(' ');
        let (kernel, gpu) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let named = kernels.is_empty() || kernels.iter().any(|part| kernel.contains(part.as_str()));
        options.label.is_empty() && named && names.contains(&gpu)
    };
    let found = runs.iter().flat_map(|run| {
        run.records.iter().filter_map(|record| {
            let measure = record.measure()?;
            Some((record.key(run.gpu, &measure), measure.value))
        })
    });
    let found: BTreeMap<String, f64> = found.collect();
    if options.update {
        table.update(&found, meant)?;
    }
    let holds = report::verdict(&runs, &table, table.others(&found, meant), options.all, start.elapsed());
    failures.iter().for_each(|error| eprintln!("codegen: {error}"));
    Ok(holds && failures.is_empty())
}

/// Starts a process on the GPU's driver that compiles for it.
fn run(gpu: &'static Gpu, options: &Options, scratch: &Path) -> Result<Run, Box<dyn Error>> {
    let (out, log) = (scratch.join(format!("{}.out", gpu.name)), scratch.join(format!("{}.log", gpu.name)));
    let mut command = gpu.command(&options.mesa, &options.shims, scratch)?;
    command.args(std::env::args_os().skip(1)).args(["--compile", gpu.name]);
    command.stdin(Stdio::null()).stdout(fs::File::create(&out)?).stderr(fs::File::create(&log)?);
    let mut child = command.spawn()?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            return Err(format!("still compiling after {} s", PATIENCE.as_secs()).into());
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let text = fs::read_to_string(out)?;
    let mut lines = text.lines();
    let (true, Some(name)) = (status.success(), lines.next()) else {
        let log = String::from_utf8_lossy(&fs::read(log)?).into_owned();
        let after = text.lines().next_back().and_then(|line| serde_json::from_str::<Record>(line).ok());
        let after = after.map_or(String::new(), |record| format!(" after {} [{}]", record.kernel, record.label));
        return Err(format!("{status}{after}: {}", log.trim_end().lines().next_back().unwrap_or_default()).into());
    };
    let records = lines.map(serde_json::from_str).collect::<Result<Vec<_>, _>>()?;
    Ok(Run { gpu, name: name.into(), records })
}
