//! `qlora devices`: lists the devices.

use clap::Args;
use serde::Serialize;

use super::check::{Check, Checked};
use super::{print_json, print_line, table};
use crate::device::{DeviceInfo, devices};
use crate::error::Result;

/// Lists the devices that `--device` and QLORA_DEVICE can name.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora devices\n  \
    qlora devices --check")]
pub struct DevicesArgs {
    /// Print JSON, an object per device: index, name, kind, backend, driver, tier, tiers,
    /// max_binding_bytes, subgroup_sizes, cooperative_matrix. --check adds `check`: m, tier, ms_median, gflops,
    /// max_rel_err_vs_cpu, agrees, and error (null if there is a result).
    #[arg(long)]
    json: bool,
    /// Also run the fused layer on each device and compare the result with the CPU's; status 1 if
    /// one differs.
    #[arg(long)]
    check: bool,
}

/// A device, with its check results if requested.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    info: &'a DeviceInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Vec<&'a Checked>>,
}

pub fn run(args: &DevicesArgs) -> Result<()> {
    let found = devices();
    if args.json {
        let check = args.check.then(|| Check::run(&found)).transpose()?;
        let of = |info: &DeviceInfo| check.as_ref().map(|check| check.of(info).collect());
        print_json(&found.iter().map(|info| Report { info, check: of(info) }).collect::<Vec<_>>())?;
        return check.map_or(Ok(()), |check| check.verdict());
    }
    let rows = found.iter().map(|info| {
        let binding = match info.max_binding_bytes {
            0 => String::new(),
            bytes => format!("{} MiB", bytes >> 20),
        };
        [
            info.index.to_string(),
            info.name.clone(),
            info.kind.to_owned(),
            info.driver.clone(),
            info.tier.clone(),
            info.tiers.join(" "),
            binding,
        ]
    });
    let header = ["index", "name", "kind", "driver", "tier", "can run", "largest binding"];
    print_line(&table(header, 6, rows.collect()).to_string())?;
    if !args.check {
        return Ok(());
    }
    let check = Check::run(&found)?;
    print_line(&check.describe())?;
    check.verdict()?;
    print_line("\nEvery device agrees.")
}
