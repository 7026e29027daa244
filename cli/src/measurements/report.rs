//! Measurements with their date and machine: the file of `qlora bench --output`.

use std::io::Write;
use std::path::Path;

use jiff::{Timestamp, Unit};
use qlora_wgpu::device::Device;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::StagedFile;
use serde::Serialize;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use super::Measured;

/// The rows of one run on one device.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this program.
    pub version: &'static str,
    /// End of the run, for example `2026-01-31T12:00:00Z`.
    pub date: String,
    /// The computer, before the run.
    pub machine: Machine,
    /// The device's name.
    pub device: String,
    /// Driver and its version; for the CPU device its threads.
    pub driver: String,
    /// The measurements.
    pub rows: Vec<Measured>,
}

/// A computer. Unknown values are empty or 0.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model name of the processor.
    pub cpu: String,
    /// Cores, not threads.
    pub cores: usize,
    /// Size of the memory.
    pub memory_bytes: u64,
    /// The operating system and its version.
    pub os: String,
    /// Average number of processes that wanted a core, over the last minute. Measurements on a
    /// busy machine are unreliable.
    pub load: f64,
}

impl Report {
    /// Makes a report of rows measured on this device until now. `machine` describes the computer
    /// before the run.
    pub fn new(machine: Machine, device: &Device, rows: Vec<Measured>) -> Report {
        let now = Timestamp::now();
        Report {
            version: env!("CARGO_PKG_VERSION"),
            date: now.round(Unit::Second).unwrap_or(now).to_string(),
            machine,
            device: device.name().to_owned(),
            driver: device.driver(),
            rows,
        }
    }
}

impl Machine {
    /// Describes this computer as it is now.
    pub fn this() -> Machine {
        let refresh = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(refresh);
        Machine {
            cpu: system.cpus().first().map_or(String::new(), |cpu| cpu.brand().trim().to_owned()),
            cores: System::physical_core_count().unwrap_or(0),
            memory_bytes: system.total_memory(),
            os: System::long_os_version().unwrap_or_default(),
            load: System::load_average().one,
        }
    }
}

/// Writes a report as JSON; the file appears complete or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, report: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(report).map_err(|error| Error::io(path, error))?;
    StagedFile::new(path, |out| writeln!(out, "{text}").map_err(|error| Error::io(path, error)))?.commit()
}
