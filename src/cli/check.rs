//! `qlora devices --check`: a real weight, quantized and multiplied on every device, compared with the CPU.

use std::time::Instant;

use half::f16;
use ndarray::Array2;

use super::{bundled, print_line, table};
use crate::bench::layer::{Case, Op, measure};
use crate::device::{Device, DeviceInfo, GpuOptions, Select};
use crate::error::{Error, Result};
use crate::quant::{QuantOptions, QuantizedMatrix};

/// A weight of the bundled model: real ones, unlike random numbers, have outliers and rows of different spread.
const WEIGHT: &str = "model.embed_tokens.weight";

/// Rows of X: one as in decoding, many as in training.
const ROWS: [usize; 2] = [1, 256];
const RANK: usize = 16;

/// Relative to the largest value of Y: f32 sums in another order, or f16 operands.
fn allowed(tier: &str) -> f64 {
    if tier.contains("f16") { 2e-3 } else { 1e-5 }
}

/// Runs the fused layer on each of these devices, and prints how far it is from the CPU's.
///
/// # Errors
/// [`Error::Device`] with every device that fails or differs.
pub(super) fn run(found: &[DeviceInfo]) -> Result<()> {
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
    let mut rows = Vec::new();
    let mut wrong = Vec::new();
    for m in ROWS {
        let operands = Case { op: Op::Forward, m, n, k, rank: RANK, quant }.operands_of(weight.view())?;
        for info in found {
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
        return print_line("\nEvery device agrees.");
    }
    Err(Error::Device {
        device: wrong.join(", "),
        op: "the fused forward pass".into(),
        message: "no result, or one that differs from the CPU reference by more than rounding".into(),
    })
}

fn load() -> Result<Array2<f32>> {
    let error = |message: String| Error::Tensor { path: "the bundled model".into(), key: WEIGHT.into(), message };
    let file = safetensors::SafeTensors::deserialize(bundled::MODEL).map_err(|e| error(e.to_string()))?;
    let tensor = file.tensor(WEIGHT).map_err(|e| error(e.to_string()))?;
    let (safetensors::Dtype::F16, &[rows, cols]) = (tensor.dtype(), tensor.shape()) else {
        return Err(error(format!("is {:?} {:?}, expected an F16 matrix", tensor.dtype(), tensor.shape())));
    };
    let values = tensor.data().chunks_exact(2).map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
    Array2::from_shape_vec((rows, cols), values.collect()).map_err(|e| error(e.to_string()))
}
