//! Benchmark cases: one layer on one device, timed alike by `qlora bench`, `cargo bench` and `qlora demo`.

use std::time::{Duration, Instant};

use ndarray::ArrayView2;
use rayon::prelude::*;
use serde::Serialize;

use crate::device::Device;
use crate::error::Result;
use crate::nn::{LoraAdapter, LoraConfig, QLoraLinear};
use crate::quant::{QuantOptions, QuantizedMatrix};
use crate::seed::mix;
use crate::tensor::Tensor;

/// One forward pass of a [`QLoraLinear`]: M rows through a [N, K] weight with an adapter.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Rows of X.
    pub m: usize,
    /// Rows of the weight.
    pub n: usize,
    /// Columns of the weight.
    pub k: usize,
    /// Of the adapter; 0: none.
    pub rank: usize,
    /// How the base is quantized.
    pub quant: QuantOptions,
}

/// What was measured; the fields of `qlora bench --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// "forward".
    pub op: &'static str,
    /// "cpu" or "gpu".
    pub device: &'static str,
    /// The device's name.
    pub adapter: String,
    /// The tier of its kernels; empty for the CPU device.
    pub tier: String,
    /// "nf4", "fp4" or "int4".
    pub format: String,
    /// Whether the scales are quantized too.
    pub double_quant: bool,
    /// Rows of X.
    pub m: usize,
    /// Rows of the weight.
    pub n: usize,
    /// Columns of the weight.
    pub k: usize,
    /// Of the adapter.
    pub rank: usize,
    /// Shortest run, in milliseconds.
    pub ms_min: f64,
    /// Median run, in milliseconds.
    pub ms_median: f64,
    /// 10^9 floating-point operations per second at the median: 2 M (N K + r (N + K)).
    pub gflops: f64,
    /// Packed weight bytes per second at the median, in 10^9.
    pub weight_gb_per_s: f64,
    /// Largest difference from the CPU, divided by the largest value: of all of Y against the CPU device, or for the CPU
    /// device itself of a sample against the plain reference in f64.
    pub max_rel_err_vs_cpu: f64,
}

/// The largest difference of two arrays, divided by the second one's largest value.
pub fn relative_error(got: &[f32], wanted: &[f32]) -> f64 {
    let largest = wanted.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    // A NaN must not vanish in the maximum, wherever it stands.
    let worse = |most: f64, next: f64| if most.is_nan() || next.is_nan() { f64::NAN } else { most.max(next) };
    let difference = got.iter().zip(wanted).map(|(got, wanted)| f64::from((got - wanted).abs())).fold(0.0, worse);
    difference / f64::from(largest.max(f32::MIN_POSITIVE))
}

/// `len` values, uniform in -amplitude..amplitude, by splitmix64: the same for the same seed, made in parallel.
pub fn uniform(seed: u64, len: usize, amplitude: f32) -> Vec<f32> {
    let value = |i: usize| (mix(seed, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0;
    (0..len).into_par_iter().map(|i| value(i) * amplitude).collect()
}

/// A case's operands on the host, to put on one device after another.
pub struct Operands {
    case: Case,
    base: QuantizedMatrix,
    a: Vec<f32>,
    b: Vec<f32>,
    x: Vec<f32>,
}

/// A case on a device.
pub struct Prepared {
    layer: QLoraLinear,
    x: Tensor,
}

impl Case {
    /// Makes random operands and quantizes the base.
    pub fn operands(self) -> Result<Operands> {
        let Case { n, k, .. } = self;
        let weight = uniform(1, n * k, 0.05);
        self.operands_of(ArrayView2::from_shape((n, k), &weight).map_err(|error| crate::Error::Shape {
            op: "bench",
            what: "weight",
            expected: format!("[{n}, {k}]"),
            got: error.to_string(),
        })?)
    }

    /// As [`Case::operands`], with this weight [N, K].
    pub fn operands_of(self, weight: ArrayView2<'_, f32>) -> Result<Operands> {
        let Case { m, n, k, rank, quant } = self;
        let standard = weight.as_standard_layout();
        let base = QuantizedMatrix::quantize(standard.as_slice().unwrap_or_default().into(), n, k, &quant)?;
        Ok(Operands {
            case: self,
            base,
            a: uniform(2, rank * k, 1.0 / (k as f32).sqrt()),
            b: uniform(3, n * rank, 0.05),
            x: uniform(4, m * k, 1.0),
        })
    }

    /// Floating-point operations of a pass.
    pub fn flops(&self) -> f64 {
        let Case { m, n, k, rank, .. } = *self;
        2.0 * m as f64 * (n as f64 * k as f64 + rank as f64 * (n + k) as f64)
    }
}

impl Operands {
    /// Copies the operands to a device.
    pub fn on(&self, device: &Device) -> Result<Prepared> {
        let Case { m, n, k, rank, .. } = self.case;
        let mut layer = QLoraLinear::new(device, self.base.clone())?;
        if rank > 0 {
            let a = Tensor::from_slice(device, &[rank, k], &self.a)?;
            let b = Tensor::from_slice(device, &[n, rank], &self.b)?;
            let LoraConfig { alpha, scaling, .. } = LoraConfig::new(rank, 2.0 * rank as f32);
            layer = layer.with_adapter("default", LoraAdapter::from_tensors(a, b, alpha, scaling)?)?;
        }
        Ok(Prepared { layer, x: Tensor::from_slice(device, &[m, k], &self.x)? })
    }

    /// Bytes of the packed base.
    pub fn weight_bytes(&self) -> usize {
        self.base.bytes()
    }

    /// How far a sample of `y` is from the formula in f64.
    fn sampled_error(&self, y: &[f32]) -> f64 {
        let Case { m, n, k, rank, .. } = self.case;
        let dot = |left: &[f32], right: &[f32]| -> f64 {
            left.iter().zip(right).map(|(left, right)| f64::from(*left) * f64::from(*right)).sum()
        };
        let mut weight = vec![0.0; k];
        let (mut got, mut wanted) = (Vec::new(), Vec::new());
        for column in (0..n).step_by(n.div_ceil(61).max(1)) {
            self.base.dequantize_rows(column..column + 1, &mut weight);
            for row in (0..m).step_by(m.div_ceil(7).max(1)) {
                let x = &self.x[row * k..][..k];
                let up = (0..rank).map(|j| dot(x, &self.a[j * k..][..k]) * f64::from(self.b[column * rank + j]));
                wanted.push((dot(x, &weight) + 2.0 * up.sum::<f64>()) as f32);
                got.push(y[row * n + column]);
            }
        }
        relative_error(&got, &wanted)
    }
}

impl Prepared {
    /// Runs the case once; on a GPU this only records it.
    pub fn forward(&self) -> Result<Tensor> {
        self.layer.forward(&self.x)
    }

    /// How long one pass takes on the device.
    pub fn time(&self) -> Result<Duration> {
        match &self.x.device() {
            Device::Cpu(_) => {
                let start = Instant::now();
                self.forward()?;
                Ok(start.elapsed())
            }
            Device::Gpu(gpu) => gpu.time(|| self.forward().map(|_| ())),
        }
    }
}

/// Fewest and most timed runs of a case, and the time after which it has been timed enough.
const RUNS: (usize, usize, Duration) = (5, 50, Duration::from_secs(2));

/// Times a case on a device and checks its result.
pub fn measure(operands: &Operands, device: &Device) -> Result<Row> {
    let prepared = operands.on(device)?;
    let y = prepared.forward()?.to_vec()?;
    let max_rel_err_vs_cpu = match device {
        Device::Cpu(_) => operands.sampled_error(&y),
        Device::Gpu(_) => relative_error(&y, &operands.on(&Device::cpu())?.forward()?.to_vec()?),
    };
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < RUNS.0 || (times.len() < RUNS.1 && start.elapsed() < RUNS.2) {
        times.push(prepared.time()?.as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let Case { m, n, k, rank, quant } = operands.case;
    let (kind, tier) = match device {
        Device::Cpu(_) => ("cpu", String::new()),
        Device::Gpu(gpu) => ("gpu", gpu.tier().to_string()),
    };
    Ok(Row {
        op: "forward",
        device: kind,
        adapter: device.name().to_owned(),
        tier,
        format: quant.format.to_string(),
        double_quant: prepared.layer.is_double_quantized(),
        m,
        n,
        k,
        rank,
        ms_min: times[0] * 1e3,
        ms_median: median * 1e3,
        gflops: operands.case.flops() / median / 1e9,
        weight_gb_per_s: operands.weight_bytes() as f64 / median / 1e9,
        max_rel_err_vs_cpu,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_measured_and_right_on_every_device() {
        let case = Case { m: 3, n: 130, k: 192, rank: 4, quant: QuantOptions::nf4().double_quant() };
        let operands = case.operands().unwrap();
        for device in crate::testing::devices() {
            let row = measure(&operands, &device).unwrap();
            assert!(row.max_rel_err_vs_cpu < 1e-5, "{row:?}");
            assert!(row.ms_min > 0.0 && row.ms_min <= row.ms_median && row.gflops > 0.0, "{row:?}");
        }
    }

    #[test]
    fn an_error_is_seen() {
        assert_eq!(relative_error(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert!(relative_error(&[f32::NAN, 1.0], &[1.0, 1.0]).is_nan());
    }
}
