//! `qlora demo`: a real weight, quantized and multiplied on every device, checked against the CPU reference.

use std::time::Instant;

use clap::Args;
use ndarray::Array2;

use super::{devices, print_line, table};
use crate::bench::{Case, Op, measure};
use crate::device::{Device, GpuOptions, Select, devices as list_devices};
use crate::error::{Error, Result};
use crate::quant::{QuantOptions, QuantizedMatrix};

/// Quantizes a real weight, runs the fused layer on every device, and checks each against the CPU reference.
#[derive(Args, Debug)]
pub struct DemoArgs {}

/// Weights of the bundled model's first layer; assets/README.md says where they are from.
static LAYER: &[u8] = include_bytes!("../../assets/tiny-glossary-layer0.safetensors");
/// The one that the demo takes.
const WEIGHT: &str = "model.layers.0.mlp.gate_proj.weight";

/// Rows of X: one as in decoding, many as in training.
const ROWS: [usize; 2] = [1, 256];
const RANK: usize = 16;

/// Relative to the largest value of Y: f32 sums in another order, or f16 operands.
fn allowed(tier: &str) -> f64 {
    if tier.contains("f16") { 2e-3 } else { 1e-5 }
}

pub fn run(_args: &DemoArgs) -> Result<()> {
    print_line("Devices\n")?;
    devices::run(&devices::DevicesArgs::default())?;

    let weight = load()?;
    let (n, k) = weight.dim();
    let quant = QuantOptions::nf4().double_quant();
    let start = Instant::now();
    let values = weight.as_slice().unwrap_or_default();
    let packed = QuantizedMatrix::quantize(values.into(), n, k, &quant)?;
    let elapsed = start.elapsed();
    let restored = packed.dequantize();
    let largest = values.iter().zip(&restored).map(|(wanted, got)| (wanted - got).abs()).fold(0.0, f32::max);
    print_line(&format!(
        "\nQuantized {WEIGHT} [{n}, {k}] to NF4 with double-quantized scales in {:.2} ms:\n\
         {:.3} bits per weight, {} KiB instead of {} KiB, largest error {largest:.4}\n\n\
         Fused forward, Y = X W^T + s (X A^T) B^T with rank {RANK}, against the CPU reference\n",
        elapsed.as_secs_f64() * 1e3,
        packed.bits_per_weight(),
        packed.bytes() >> 10,
        (4 * n * k) >> 10,
    ))?;

    let best = Device::best()?;
    let found = list_devices();
    let mut rows = Vec::new();
    let mut wrong = Vec::new();
    for m in ROWS {
        let operands = Case { op: Op::Forward, m, n, k, rank: RANK, quant }.operands_of(weight.view())?;
        for info in &found {
            let device = match info.index {
                0 => Ok(Device::cpu()),
                index => Device::gpu(&GpuOptions { select: Select::Index(index), ..GpuOptions::default() }),
            };
            let row = match device.and_then(|device| measure(&operands, &device)) {
                Ok(row) => row,
                Err(error) => {
                    // The other devices still have their turn.
                    wrong.push(format!("{} ({error})", info.name));
                    continue;
                }
            };
            // A NaN is wrong too.
            let right = row.max_rel_err_vs_cpu <= allowed(&row.tier);
            if !right {
                wrong.push(format!("{} with M = {m} (error {:.1e})", row.adapter, row.max_rel_err_vs_cpu));
            }
            rows.push([
                format!("{}{}", row.adapter, if row.adapter == best.name() { " (best)" } else { "" }),
                row.tier,
                m.to_string(),
                format!("{:.3}", row.ms_median),
                format!("{:.1}", row.gflops),
                format!("{:.1e}", row.max_rel_err_vs_cpu),
                if right { "yes" } else { "NO" }.to_owned(),
            ]);
        }
    }
    let header = ["device", "tier", "M", "ms", "GFLOP/s", "rel. error", "as the CPU"];
    print_line(&table(header, 2, rows).to_string())?;
    if wrong.is_empty() {
        return print_line("\nEvery device agrees. Next: qlora bench --help, qlora quantize --help");
    }
    Err(Error::Device {
        device: wrong.join(", "),
        op: "the demo's forward pass".into(),
        message: "no result, or one that differs from the CPU reference by more than rounding".into(),
    })
}

fn load() -> Result<Array2<f32>> {
    let error = |message: String| Error::Tensor { path: "assets".into(), key: WEIGHT.into(), message };
    let file = safetensors::SafeTensors::deserialize(LAYER).map_err(|e| error(e.to_string()))?;
    let tensor = file.tensor(WEIGHT).map_err(|e| error(e.to_string()))?;
    let values: Vec<f32> = match tensor.dtype() {
        safetensors::Dtype::F32 => bytemuck::pod_collect_to_vec(tensor.data()),
        other => return Err(error(format!("is {other:?}, expected F32"))),
    };
    let shape = match *tensor.shape() {
        [rows, cols] => (rows, cols),
        _ => return Err(error("is not 2-D".into())),
    };
    Array2::from_shape_vec(shape, values).map_err(|e| error(e.to_string()))
}
