//! `qlora devices`: lists the devices. With --check, it also multiplies with a real weight on each
//! of them and compares with the CPU.

use std::time::Instant;

use clap::Args;
use half::f16;
use ndarray::Array2;
use qlora_wgpu::device::{Device, DeviceInfo, GpuOptions, Select, devices};
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::bench::Row;
use qlora_wgpu::internal::bench::layer::{Case, Op, measure};
use qlora_wgpu::quant::{QuantOptions, QuantizedMatrix};
use serde::Serialize;

use crate::bundled;
use crate::measurements::parts::allowed;
use crate::output::{print_json, print_line, table};

/// Lists the devices that `--device` and QLORA_DEVICE can name.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora devices\n  \
    qlora devices --check")]
pub struct DevicesArgs {
    /// Print JSON, an object per device: index, name, kind, backend, driver, tier, tiers,
    /// max_binding_bytes, subgroup_sizes, cooperative_matrix. --check adds `check`: m, tier,
    /// ms_median, gflops, max_rel_err_vs_cpu, agrees, and error (null if there is a result).
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

/// A weight of the bundled model. Unlike random numbers, real weights have outliers and rows of
/// different spread.
const WEIGHT: &str = "model.embed_tokens.weight";

/// Rows of X: one as in decoding, many as in training.
const ROWS: [usize; 2] = [1, 256];
const RANK: usize = 16;

/// One device's result for one number of rows.
#[derive(Serialize)]
struct Checked {
    #[serde(skip)]
    index: usize,
    #[serde(skip)]
    device: String,
    /// Rows of X.
    m: usize,
    tier: Option<String>,
    ms_median: Option<f64>,
    gflops: Option<f64>,
    max_rel_err_vs_cpu: Option<f64>,
    agrees: bool,
    /// Why there is no result, if so.
    error: Option<String>,
}

/// Results for all devices, and a description of the packed weight.
struct Check {
    packing: String,
    checked: Vec<Checked>,
    /// Name of the default device.
    best: String,
}

impl Check {
    /// Runs the fused layer on each device. If one fails, the others still run.
    fn run(found: &[DeviceInfo]) -> Result<Check> {
        let weight = load()?;
        let (n, k) = weight.dim();
        let quant = QuantOptions::nf4().double_quant();
        let start = Instant::now();
        let values = weight.as_slice().unwrap_or_default();
        let packed = QuantizedMatrix::quantize(values.into(), n, k, &quant)?;
        let elapsed = start.elapsed();
        let restored = packed.dequantize();
        let largest = values.iter().zip(&restored).map(|(wanted, got)| (wanted - got).abs()).fold(0.0, f32::max);
        let packing = format!(
            "Quantized {WEIGHT} [{n}, {k}] to NF4 with double-quantized scales in {:.2} ms:\n\
             {:.3} bits per weight, {} KiB instead of {} KiB, largest error {largest:.4}",
            elapsed.as_secs_f64() * 1e3,
            packed.bits_per_weight(),
            packed.bytes() >> 10,
            (4 * n * k) >> 10,
        );
        let mut checked = Vec::new();
        for m in ROWS {
            let operands = Case { op: Op::Forward, m, n, k, rank: RANK, quant }.operands_of(weight.view())?;
            for info in found {
                let device = match info.index {
                    0 => Ok(Device::cpu()),
                    index => Device::gpu(&GpuOptions { select: Select::Index(index), ..GpuOptions::default() }),
                };
                let row = device.and_then(|device| measure(&operands, &device, false));
                checked.push(Checked::new(info, m, row));
            }
        }
        Ok(Check { packing, checked, best: Device::best()?.name().to_owned() })
    }

    /// Results for one device.
    fn of(&self, info: &DeviceInfo) -> impl Iterator<Item = &Checked> {
        self.checked.iter().filter(move |checked| checked.index == info.index)
    }

    /// The results as a table for people.
    fn describe(&self) -> String {
        let rows = self.checked.iter().filter(|checked| checked.error.is_none()).map(|checked| {
            let best = if checked.device == self.best { " (best)" } else { "" };
            let number = |value: Option<f64>, text: fn(f64) -> String| value.map_or(String::new(), text);
            [
                format!("{}{best}", checked.device),
                checked.tier.clone().unwrap_or_default(),
                checked.m.to_string(),
                number(checked.ms_median, |ms| format!("{ms:.3}")),
                number(checked.gflops, |gflops| format!("{gflops:.1}")),
                number(checked.max_rel_err_vs_cpu, |error| format!("{error:.1e}")),
                if checked.agrees { "yes" } else { "NO" }.to_owned(),
            ]
        });
        let header = ["device", "tier", "M", "ms", "GFLOP/s", "rel. error", "agrees"];
        let what = format!("Fused forward, Y = X W^T + s (X A^T) B^T with rank {RANK}, against the CPU reference");
        format!("\n{}\n\n{what}\n\n{}", self.packing, table(header, 2, rows.collect()))
    }

    /// # Errors
    /// [`Error::Device`] that lists every device that fails or differs.
    fn verdict(&self) -> Result<()> {
        let wrong: Vec<String> = self.checked.iter().filter(|checked| !checked.agrees).map(Checked::fault).collect();
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::Device {
            device: wrong.join(", "),
            op: "the fused forward pass".into(),
            message: "no result, or one that differs from the CPU reference by more than rounding".into(),
        })
    }
}

impl Checked {
    fn new(info: &DeviceInfo, m: usize, row: Result<Row>) -> Checked {
        let none = Checked {
            index: info.index,
            device: info.name.clone(),
            m,
            tier: None,
            ms_median: None,
            gflops: None,
            max_rel_err_vs_cpu: None,
            agrees: false,
            error: None,
        };
        match row {
            // NaN doesn't agree.
            Ok(row) => Checked {
                agrees: row.max_rel_err_vs_cpu <= allowed(row.tier.parse().ok(), false),
                tier: Some(row.tier),
                ms_median: Some(row.ms_median),
                gflops: Some(row.gflops),
                max_rel_err_vs_cpu: Some(row.max_rel_err_vs_cpu),
                ..none
            },
            Err(error) => Checked { error: Some(error.to_string()), ..none },
        }
    }

    fn fault(&self) -> String {
        match (&self.error, self.max_rel_err_vs_cpu) {
            (None, Some(error)) => format!("{} with M = {} (error {error:.1e})", self.device, self.m),
            (error, _) => format!("{} with M = {} ({})", self.device, self.m, error.as_deref().unwrap_or_default()),
        }
    }
}

fn load() -> Result<Array2<f32>> {
    let error = |message: String| Error::Tensor { path: "the bundled model".into(), key: WEIGHT.into(), message };
    let file = safetensors::SafeTensors::deserialize(bundled::MODEL).map_err(|e| error(e.to_string()))?;
    let tensor = file.tensor(WEIGHT).map_err(|e| error(e.to_string()))?;
    let (safetensors::Dtype::F16, &[rows, cols]) = (tensor.dtype(), tensor.shape()) else {
        return Err(error(format!("is {} {:?}, expected an F16 matrix", tensor.dtype(), tensor.shape())));
    };
    let values = tensor.data().chunks_exact(2).map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
    Array2::from_shape_vec((rows, cols), values.collect()).map_err(|e| error(e.to_string()))
}
