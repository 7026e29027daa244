//! Measures one layer, forward or backward.

use std::time::{Duration, Instant};

use ndarray::ArrayView2;

use super::kernel_times::KernelTimes;
use super::{Row, relative_error, repeat, uniform};
use crate::device::Device;
use crate::error::Result;
use crate::nn::{LoraAdapter, LoraConfig, QLoraLinear, Saved};
use crate::quant::{QuantOptions, QuantizedMatrix};
use crate::tensor::Tensor;

/// The pass to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Y = X * deq(W)^T + s * (X * A^T) * B^T.
    Forward,
    /// dX, dA and dB from dY, like [`QLoraLinear::backward`](crate::nn::AdaptedLinear::backward).
    Backward,
}

/// One pass of a [`QLoraLinear`]: M rows through a [N, K] weight with an adapter.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The pass to time.
    pub op: Op,
    /// Rows of X.
    pub m: usize,
    /// Rows of the weight.
    pub n: usize,
    /// Columns of the weight.
    pub k: usize,
    /// Rank of the adapter; 0: no adapter.
    pub rank: usize,
    /// Quantization of the base.
    pub quant: QuantOptions,
}

/// Operands of a case on the host, to be put on one device after another.
pub struct Operands {
    case: Case,
    base: QuantizedMatrix,
    a: Vec<f32>,
    b: Vec<f32>,
    x: Vec<f32>,
    /// dY of a backward pass; empty for a forward pass.
    dy: Vec<f32>,
}

/// A case on a device.
pub struct Prepared {
    layer: QLoraLinear,
    x: Tensor,
    /// dY, and the tensors that the forward pass has saved.
    backward: Option<(Tensor, Saved)>,
}

impl Case {
    /// Makes random operands and quantizes the base.
    pub fn operands(self) -> Result<Operands> {
        let Case { n, k, .. } = self;
        let weight = uniform(1, n * k, 0.05);
        let wrong = |error| crate::Error::shape("bench", "weight", format!("[{n}, {k}]"), error);
        self.operands_of(ArrayView2::from_shape((n, k), &weight).map_err(wrong)?)
    }

    /// Like [`Case::operands`], with this weight [N, K].
    pub fn operands_of(self, weight: ArrayView2<'_, f32>) -> Result<Operands> {
        let Case { op, m, n, k, rank, quant } = self;
        let standard = weight.as_standard_layout();
        let base = QuantizedMatrix::quantize(standard.as_slice().unwrap_or_default().into(), n, k, &quant)?;
        Ok(Operands {
            case: self,
            base,
            a: uniform(2, rank * k, 1.0 / (k as f32).sqrt()),
            b: uniform(3, n * rank, 0.05),
            x: uniform(4, m * k, 1.0),
            dy: if op == Op::Backward { uniform(5, m * n, 1.0) } else { Vec::new() },
        })
    }

    /// Floating-point operations of a pass: forward 2 M (N K + r (N + K)), backward 2 M (N K + 2 r
    /// (N + K)).
    pub fn flops(&self) -> f64 {
        let Case { op, m, n, k, rank, .. } = *self;
        let products = if op == Op::Forward { 1.0 } else { 2.0 };
        2.0 * m as f64 * (n as f64 * k as f64 + products * rank as f64 * (n + k) as f64)
    }
}

impl Operands {
    /// Copies the operands to a device.
    pub fn on(&self, device: &Device) -> Result<Prepared> {
        let Case { op, m, n, k, rank, .. } = self.case;
        let mut layer = QLoraLinear::new(device, self.base.clone())?;
        if rank > 0 {
            let a = Tensor::from_slice(device, &[rank, k], &self.a)?;
            let b = Tensor::from_slice(device, &[n, rank], &self.b)?;
            let LoraConfig { alpha, scaling, .. } = LoraConfig::new(rank, 2.0 * rank as f32);
            layer = layer.with_adapter("default", LoraAdapter::from_tensors(a, b, alpha, scaling)?)?;
        }
        let x = Tensor::from_slice(device, &[m, k], &self.x)?;
        let backward = if op == Op::Backward {
            Some((Tensor::from_slice(device, &[m, n], &self.dy)?, layer.forward_train(&x, 0)?.1))
        } else {
            None
        };
        Ok(Prepared { layer, x, backward })
    }

    /// Bytes of the packed base.
    pub fn weight_bytes(&self) -> usize {
        self.base.bytes()
    }

    /// Error of a sample of Y or dX, compared with the formula in f64.
    fn sampled_error(&self, result: &[f32]) -> f64 {
        let Case { op, m, n, k, .. } = self.case;
        let width = if op == Op::Forward { n } else { k };
        let rows: Vec<usize> = (0..m).step_by(m.div_ceil(7)).collect();
        let columns: Vec<usize> = (0..width).step_by(width.div_ceil(61)).collect();
        let wanted = match op {
            Op::Forward => self.sampled_forward(&rows, &columns),
            Op::Backward => self.sampled_backward(&rows, &columns),
        };
        let got: Vec<f32> =
            rows.iter().flat_map(|row| columns.iter().map(move |column| result[row * width + column])).collect();
        let wanted: Vec<f32> = wanted.into_iter().map(|value| value as f32).collect();
        relative_error(&got, &wanted)
    }

    /// Returns Y at these rows and columns.
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
                let x = &self.x[row * k..][..k];
                let up = (0..rank).map(|e| dot(x, &self.a[e * k..][..k]) * f64::from(self.b[column * rank + e]));
                wanted[i * columns.len() + j] = dot(x, &weight) + 2.0 * up.sum::<f64>();
            }
        }
        wanted
    }

    /// Returns dX at these rows and columns.
    fn sampled_backward(&self, rows: &[usize], columns: &[usize]) -> Vec<f64> {
        let Case { n, k, rank, .. } = self.case;
        let mut wanted = vec![0.0; rows.len() * columns.len()];
        // Adds a row of W or A to each row of the result, multiplied by a factor per row.
        let mut add = |weight: &[f32], left: &dyn Fn(usize) -> f64| {
            for (wanted, &row) in wanted.chunks_mut(columns.len()).zip(rows) {
                let left = left(row);
                wanted.iter_mut().zip(columns).for_each(|(sum, &column)| *sum += left * f64::from(weight[column]));
            }
        };
        let mut weight = vec![0.0; k];
        for e in 0..n {
            self.base.dequantize_rows(e..e + 1, &mut weight);
            add(&weight, &|row| f64::from(self.dy[row * n + e]));
        }
        for (e, a) in self.a.chunks(k).enumerate() {
            let g = |row: usize| {
                let products = (0..n).map(|j| f64::from(self.dy[row * n + j]) * f64::from(self.b[j * rank + e]));
                2.0 * products.sum::<f64>()
            };
            add(a, &g);
        }
        wanted
    }
}

impl Prepared {
    /// Runs the case once and returns Y or dX. On a GPU this only records it.
    pub fn run(&self) -> Result<Tensor> {
        let Some((dy, saved)) = &self.backward else { return self.layer.forward(&self.x) };
        let gradients = self.layer.backward(dy, saved, true)?;
        // dX is always there, because it was requested.
        gradients.dx.map_or_else(|| Tensor::zeros(&self.x.device(), self.x.shape()), Ok)
    }

    /// Device time of one pass.
    pub fn time(&self) -> Result<Duration> {
        match &self.x.device() {
            Device::Cpu(_) => {
                let start = Instant::now();
                self.run()?;
                Ok(start.elapsed())
            }
            Device::Gpu(gpu) => gpu.time(|| self.run().map(|_| ())),
        }
    }
}

/// Times a case on a device and checks its result. With `profile`, runs it once more to time each
/// kernel.
pub fn measure(operands: &Operands, device: &Device, profile: bool) -> Result<Row> {
    let prepared = operands.on(device)?;
    let result = prepared.run()?.to_vec()?;
    let error = match device {
        Device::Cpu(_) => operands.sampled_error(&result),
        Device::Gpu(_) => relative_error(&result, &operands.on(&Device::cpu())?.run()?.to_vec()?),
    };
    let Case { op, m, n, k, rank, quant } = operands.case;
    let times = repeat(|| prepared.time())?;
    let profile = profile.then(|| KernelTimes::measure(device, || prepared.run().map(drop))).transpose()?;
    let op = if op == Op::Forward { "forward" } else { "backward" };
    let row = Row::new(op, device, &quant, times, operands.case.flops(), operands.weight_bytes(), error);
    Ok(Row { m, n, k, rank, profile, ..row })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn a_case_is_measured_and_right_on_every_device() {
        for (op, rank) in [(Op::Forward, 4), (Op::Backward, 4), (Op::Backward, 0)] {
            let case = Case { op, m: 3, n: 130, k: 192, rank, quant: QuantOptions::nf4().double_quant() };
            let operands = case.operands().unwrap();
            for device in crate::testing::devices() {
                let row = measure(&operands, &device, false).unwrap();
                let allowed = if op == Op::Backward && crate::testing::is_f16(&device) { 2e-3 } else { 1e-5 };
                assert!(row.max_rel_err_vs_cpu < allowed, "{row:?}");
                assert!(row.ms_min > 0.0 && row.ms_min <= row.ms_median && row.gflops > 0.0, "{row:?}");
            }
        }
    }

    #[test]
    fn a_profile_has_the_kernels_of_one_run() {
        for op in [Op::Forward, Op::Backward] {
            let case = Case { op, m: 3, n: 130, k: 192, rank: 4, quant: QuantOptions::nf4() };
            let operands = case.operands().unwrap();
            // Separate devices, because other tests' kernels would be seen too.
            for device in crate::testing::gpus_with(|_| ()).into_iter().chain([Device::cpu()]) {
                let profile = match (measure(&operands, &device, true), &device) {
                    (Ok(row), Device::Gpu(_)) => row.profile.unwrap(),
                    // The CPU device, and backends without timestamps.
                    (Err(error @ Error::Unsupported { .. }), _) => {
                        assert!(error.to_string().contains("time of each kernel"), "{error}");
                        continue;
                    }
                    (other, _) => panic!("{}: {other:?}", device.name()),
                };
                let dispatches: usize = profile.kernels.iter().map(|row| row.dispatches).sum();
                // The timed runs alone would exceed this: at least five, with two dispatches or
                // more each.
                assert!((2..12).contains(&dispatches), "{profile:?}");
                assert!(profile.kernels.iter().all(|row| row.ms > 0.0), "{profile:?}");
                assert!((0.0..1.0).contains(&profile.outside_kernels), "{profile:?}");
            }
        }
    }
}
