//! What was measured, with when and where: the file of `qlora bench --output`.

use jiff::{Timestamp, Unit};
use serde::Serialize;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use super::Row;
use crate::device::Device;

/// The rows of one run on one device.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of this program.
    pub version: &'static str,
    /// When the run ended, as `2026-01-31T12:00:00Z`.
    pub date: String,
    /// The computer, before the run.
    pub machine: Machine,
    /// The device's name.
    pub device: String,
    /// Its driver and version; of the CPU device its threads.
    pub driver: String,
    /// What was measured.
    pub rows: Vec<Row>,
}

/// A computer; what it does not tell is empty or 0.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's model, as it calls itself.
    pub cpu: String,
    /// Cores, not threads.
    pub cores: usize,
    /// Its memory.
    pub memory_bytes: u64,
    /// The operating system and its version.
    pub os: String,
    /// How many processes wanted a core, on average over the last minute. What is measured on a busy machine says little.
    pub load: f64,
}

impl Report {
    /// Rows that were measured on this device until now, with how the computer was before.
    pub fn new(machine: Machine, device: &Device, rows: Vec<Row>) -> Report {
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
    /// The computer that this runs on, now.
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
