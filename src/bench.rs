//! Benchmark cases: one layer on one device, timed alike by `qlora bench`, `cargo bench` and `qlora demo`.

use std::time::{Duration, Instant};

use ndarray::ArrayView2;
use rayon::prelude::*;
use serde::Serialize;

use crate::device::Device;
use crate::error::Result;
use crate::kernels::qmatmul_dx::{LoraDx, qmatmul_dx};
use crate::kernels::{DeviceMatrix, HostMatrix};
use crate::nn::{LoraAdapter, LoraConfig, QLoraLinear};
use crate::quant::{QuantOptions, QuantizedMatrix, Scales};
use crate::tensor::Tensor;

/// What a case times, of a [`QLoraLinear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Y = X * deq(W)^T + s * (X * A^T) * B^T.
    Forward,
    /// dX = dY * deq(W) + G * A, where G = s * dY * B is given.
    Backward,
}

impl Op {
    /// As in [`Row::op`].
    pub fn name(self) -> &'static str {
        match self {
            Op::Forward => "forward",
            Op::Backward => "backward",
        }
    }
}

/// One pass of a [`QLoraLinear`]: M rows through a [N, K] weight with an adapter.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Which pass.
    pub op: Op,
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
    /// "forward" or "backward".
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
    /// 10^9 floating-point operations per second at the median; see [`Case::flops`].
    pub gflops: f64,
    /// Packed weight bytes per second at the median, in 10^9.
    pub weight_gb_per_s: f64,
    /// Largest difference from the CPU, divided by the largest value: of the whole result against the CPU device, or for the CPU
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
    let value = |i: usize| {
        // The generator's state after i steps is known, so every value can be had by its index.
        let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).into_par_iter().map(|i| value(i) * amplitude).collect()
}

/// A case's operands on the host, to put on one device after another.
pub struct Operands {
    case: Case,
    base: QuantizedMatrix,
    a: Vec<f32>,
    b: Vec<f32>,
    /// X [M, K] of a forward pass, dY [M, N] of a backward pass.
    input: Vec<f32>,
    /// G [M, r] of a backward pass.
    g: Vec<f32>,
}

/// A case on a device.
pub enum Prepared {
    /// A layer and X.
    Forward(QLoraLinear, Tensor),
    /// The base, dY, and G and A of an adapter.
    Backward(DeviceMatrix, Tensor, Option<[Tensor; 2]>),
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
        let Case { op, m, n, k, rank, quant } = self;
        let standard = weight.as_standard_layout();
        let base = QuantizedMatrix::quantize(standard.as_slice().unwrap_or_default().into(), n, k, &quant)?;
        Ok(Operands {
            case: self,
            base,
            a: uniform(2, rank * k, 1.0 / (k as f32).sqrt()),
            b: uniform(3, n * rank, 0.05),
            input: uniform(4, m * if op == Op::Forward { k } else { n }, 1.0),
            g: if op == Op::Forward { Vec::new() } else { uniform(5, m * rank, 1.0) },
        })
    }

    /// Floating-point operations of a pass: forward 2 M (N K + r (N + K)), backward 2 M (N K + r K).
    pub fn flops(&self) -> f64 {
        let Case { op, m, n, k, rank, .. } = *self;
        let adapter = rank * if op == Op::Forward { n + k } else { k };
        2.0 * m as f64 * (n as f64 * k as f64 + adapter as f64)
    }
}

impl Operands {
    /// Copies the operands to a device.
    pub fn on(&self, device: &Device) -> Result<Prepared> {
        let Case { op, m, n, k, rank, .. } = self.case;
        let tensor = |shape: [usize; 2], values: &[f32]| Tensor::from_slice(device, &shape, values);
        let a = tensor([rank, k], &self.a)?;
        if op == Op::Backward {
            let adapter = if rank > 0 { Some([tensor([m, rank], &self.g)?, a]) } else { None };
            let base = DeviceMatrix::new(device, HostMatrix::from(self.base.clone()))?;
            return Ok(Prepared::Backward(base, tensor([m, n], &self.input)?, adapter));
        }
        let mut layer = QLoraLinear::new(device, self.base.clone())?;
        if rank > 0 {
            let LoraConfig { alpha, scaling, .. } = LoraConfig::new(rank, 2.0 * rank as f32);
            let adapter = LoraAdapter::from_tensors(a, tensor([n, rank], &self.b)?, alpha, scaling)?;
            layer = layer.with_adapter("default", adapter)?;
        }
        Ok(Prepared::Forward(layer, tensor([m, k], &self.input)?))
    }

    /// Bytes of the packed base.
    pub fn weight_bytes(&self) -> usize {
        self.base.bytes()
    }

    /// How far a sample of a result is from the formula in f64.
    fn sampled_error(&self, result: &[f32]) -> f64 {
        let Case { op, m, n, k, .. } = self.case;
        let width = if op == Op::Forward { n } else { k };
        let rows: Vec<usize> = (0..m).step_by(m.div_ceil(7)).collect();
        let columns: Vec<usize> = (0..width).step_by(width.div_ceil(61)).collect();
        let wanted = match op {
            Op::Forward => self.sampled_forward(&rows, &columns),
            Op::Backward => self.sampled_backward(&rows, &columns),
        };
        let got = rows.iter().flat_map(|row| columns.iter().map(move |column| result[row * width + column]));
        let wanted = wanted.into_iter().map(|value| value as f32).collect::<Vec<_>>();
        relative_error(&got.collect::<Vec<_>>(), &wanted)
    }

    /// Y at these rows and columns.
    fn sampled_forward(&self, rows: &[usize], columns: &[usize]) -> Vec<f64> {
        let Case { k, rank, .. } = self.case;
        let dot = |left: &[f32], right: &[f32]| -> f64 {
            left.iter().zip(right).map(|(left, right)| f64::from(*left) * f64::from(*right)).sum()
        };
        let mut weight = vec![0.0; k];
        let mut wanted = vec![0.0; rows.len() * columns.len()];
        for (j, &column) in columns.iter().enumerate() {
            self.base.dequantize_rows(column..column + 1, &mut weight);
            for (i, row) in rows.iter().enumerate() {
                let x = &self.input[row * k..][..k];
                let up = (0..rank).map(|e| dot(x, &self.a[e * k..][..k]) * f64::from(self.b[column * rank + e]));
                wanted[i * columns.len() + j] = dot(x, &weight) + 2.0 * up.sum::<f64>();
            }
        }
        wanted
    }

    /// dX at these rows and columns.
    fn sampled_backward(&self, rows: &[usize], columns: &[usize]) -> Vec<f64> {
        let Case { n, k, rank, .. } = self.case;
        let mut weight = vec![0.0; k];
        let mut wanted = vec![0.0; rows.len() * columns.len()];
        // Adds a row of W or A, times a column of dY or G.
        let mut add = |weight: &[f32], left: &dyn Fn(usize) -> f32| {
            for (wanted, &row) in wanted.chunks_mut(columns.len()).zip(rows) {
                let left = f64::from(left(row));
                wanted.iter_mut().zip(columns).for_each(|(sum, &column)| *sum += left * f64::from(weight[column]));
            }
        };
        for e in 0..n {
            self.base.dequantize_rows(e..e + 1, &mut weight);
            add(&weight, &|row| self.input[row * n + e]);
        }
        for (e, a) in self.a.chunks(k).enumerate() {
            add(a, &|row| self.g[row * rank + e]);
        }
        wanted
    }
}

impl Prepared {
    /// Runs the case once; on a GPU this only records it.
    pub fn run(&self) -> Result<Tensor> {
        match self {
            Prepared::Forward(layer, x) => layer.forward(x),
            Prepared::Backward(base, dy, adapter) => {
                qmatmul_dx(dy, base, adapter.as_ref().map(|[g, a]| LoraDx { g, a, dropout: None }))
            }
        }
    }

    fn device(&self) -> Device {
        match self {
            Prepared::Forward(_, input) | Prepared::Backward(_, input, _) => input.device(),
        }
    }

    /// How long one pass takes on the device.
    pub fn time(&self) -> Result<Duration> {
        match &self.device() {
            Device::Cpu(_) => {
                let start = Instant::now();
                self.run()?;
                Ok(start.elapsed())
            }
            Device::Gpu(gpu) => gpu.time(|| self.run().map(|_| ())),
        }
    }
}

/// Fewest and most timed runs of a case, and the time after which it has been timed enough.
const RUNS: (usize, usize, Duration) = (5, 50, Duration::from_secs(2));

/// Times a case on a device and checks its result.
pub fn measure(operands: &Operands, device: &Device) -> Result<Row> {
    let prepared = operands.on(device)?;
    let y = prepared.run()?.to_vec()?;
    let max_rel_err_vs_cpu = match device {
        Device::Cpu(_) => operands.sampled_error(&y),
        Device::Gpu(_) => relative_error(&y, &operands.on(&Device::cpu())?.run()?.to_vec()?),
    };
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < RUNS.0 || (times.len() < RUNS.1 && start.elapsed() < RUNS.2) {
        times.push(prepared.time()?.as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let Case { op, m, n, k, rank, quant } = operands.case;
    let (kind, tier) = match device {
        Device::Cpu(_) => ("cpu", String::new()),
        Device::Gpu(gpu) => ("gpu", gpu.tier().to_string()),
    };
    Ok(Row {
        op: op.name(),
        device: kind,
        adapter: device.name().to_owned(),
        tier,
        format: quant.format.to_string(),
        double_quant: matches!(operands.base.scales(), Scales::Double(_)),
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
        for (op, rank) in [(Op::Forward, 4), (Op::Backward, 4), (Op::Backward, 0)] {
            let case = Case { op, m: 3, n: 130, k: 192, rank, quant: QuantOptions::nf4().double_quant() };
            let operands = case.operands().unwrap();
            for device in crate::testing::devices() {
                let row = measure(&operands, &device).unwrap();
                let allowed = if op == Op::Backward && crate::testing::is_f16(&device) { 2e-3 } else { 1e-5 };
                assert!(row.max_rel_err_vs_cpu < allowed, "{row:?}");
                assert!(row.ms_min > 0.0 && row.ms_min <= row.ms_median && row.gflops > 0.0, "{row:?}");
            }
        }
    }

    #[test]
    fn an_error_is_seen() {
        assert_eq!(relative_error(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert!(relative_error(&[f32::NAN, 1.0], &[1.0, 1.0]).is_nan());
    }
}
