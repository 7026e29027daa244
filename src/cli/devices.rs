//! `qlora devices`: what there is to run on.

use clap::Args;

use super::{check, print_json, print_line, table};
use crate::device::devices;
use crate::error::Result;

/// Lists the devices that `--device` and QLORA_DEVICE can name.
#[derive(Args, Debug)]
pub struct DevicesArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Also run the fused layer on each of them, and compare the result with the CPU's.
    #[arg(long, conflicts_with = "json")]
    check: bool,
}

pub fn run(args: &DevicesArgs) -> Result<()> {
    let found = devices();
    if args.json {
        return print_json(&found);
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
    if args.check { check::run(&found) } else { Ok(()) }
}
