//! Measurements for `qlora bench` and `cargo bench`, all timed in the same way: a layer
//! ([`layer`]), a whole training step ([`step`]), the time of each kernel in one run of these
//! ([`kernel_times`]), and copies ([`copy`]).

pub mod copy;
pub mod kernel_times;
pub mod layer;
pub mod step;

use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;

use crate::device::Device;
use crate::error::Result;
use crate::quant::{DoubleQuant, QuantOptions};
use crate::seed::mix;
use kernel_times::KernelTimes;
use step::StepShape;

/// A measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// "forward", "backward" or "step".
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
    /// Rows of X; for a step, its tokens.
    pub m: usize,
    /// Rows of the weight; for a step, values inside the feed-forward part.
    pub n: usize,
    /// Columns of the weight; for a step, values of a hidden state.
    pub k: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Shortest run, in milliseconds.
    pub ms_min: f64,
    /// Median run, in milliseconds.
    pub ms_median: f64,
    /// 10^9 floating-point operations per second at the median. Each case documents what it
    /// counts.
    pub gflops: f64,
    /// Packed weight bytes per second at the median, in 10^9.
    pub weight_gb_per_s: f64,
    /// Largest difference from the CPU, divided by the largest value: Y or dX compared with the
    /// CPU device, or for the CPU device itself a sample compared with the plain reference in f64.
    /// For a step: its loss and gradient norm, each relative to the CPU device's.
    pub max_rel_err_vs_cpu: f64,
    /// Tokens per second at the median, for a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Maximum live device memory, for a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// The decoder, for a step.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub shape: Option<StepShape>,
    /// Time of each kernel in one further run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<KernelTimes>,
}

impl Row {
    /// Makes a row from the values that all cases have; the case fills in the sizes. `times` are
    /// in seconds; `weight_bytes` is the size of the packed base.
    fn new(
        op: &'static str,
        device: &Device,
        quant: &QuantOptions,
        mut times: Vec<f64>,
        flops: f64,
        weight_bytes: usize,
        max_rel_err_vs_cpu: f64,
    ) -> Row {
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        let (kind, tier) = match device {
            Device::Cpu(_) => ("cpu", String::new()),
            Device::Gpu(gpu) => ("gpu", gpu.tier().to_string()),
        };
        Row {
            op,
            device: kind,
            adapter: device.name().to_owned(),
            tier,
            format: quant.format.to_string(),
            double_quant: quant.double != DoubleQuant::None,
            m: 0,
            n: 0,
            k: 0,
            rank: 0,
            ms_min: times[0] * 1e3,
            ms_median: median * 1e3,
            gflops: flops / median / 1e9,
            weight_gb_per_s: weight_bytes as f64 / median / 1e9,
            max_rel_err_vs_cpu,
            tokens_per_second: None,
            peak_bytes: None,
            shape: None,
            profile: None,
        }
    }

    /// Title of the case, for example "forward, M = 1, 4096 x 14336".
    pub fn title(&self) -> String {
        match &self.shape {
            Some(shape) => format!("{} of {} tokens, {} layers", self.op, shape.tokens, shape.layers),
            None => format!("{}, M = {}, {} x {}", self.op, self.m, self.n, self.k),
        }
    }
}

/// Minimum and maximum timed runs of a case, and the total time after which no more are started.
const RUNS: (usize, usize, Duration) = (5, 50, Duration::from_secs(2));

/// Short runs are not timed at first: an idle GPU takes a while to reach its clock.
const WARM_UP: Duration = Duration::from_millis(300);

/// Returns the times of repeated runs, in seconds.
fn repeat(mut run: impl FnMut() -> Result<Duration>) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < WARM_UP {
        let time = run()?;
        if time > WARM_UP / 10 {
            times.push(time.as_secs_f64());
            break;
        }
    }
    let start = Instant::now();
    while times.len() < RUNS.0 || (times.len() < RUNS.1 && start.elapsed() < RUNS.2) {
        times.push(run()?.as_secs_f64());
    }
    Ok(times)
}

/// Largest difference of two arrays, divided by the second one's largest value.
pub fn relative_error(got: &[f32], wanted: &[f32]) -> f64 {
    let largest = wanted.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    // A NaN anywhere must make the result NaN.
    let worse = |most: f64, next: f64| if most.is_nan() || next.is_nan() { f64::NAN } else { most.max(next) };
    let difference = got.iter().zip(wanted).map(|(got, wanted)| f64::from((got - wanted).abs())).fold(0.0, worse);
    difference / f64::from(largest.max(f32::MIN_POSITIVE))
}

/// Returns `len` values, uniform in -amplitude..amplitude, by splitmix64. The same seed gives the
/// same values; computed in parallel.
pub fn uniform(seed: u64, len: usize, amplitude: f32) -> Vec<f32> {
    let value = |i: usize| (mix(seed, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0;
    (0..len).into_par_iter().map(|i| value(i) * amplitude).collect()
}

#[cfg(test)]
mod tests {
    use super::relative_error;

    #[test]
    fn an_error_is_seen() {
        assert_eq!(relative_error(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert!(relative_error(&[f32::NAN, 1.0], &[1.0, 1.0]).is_nan());
    }
}
