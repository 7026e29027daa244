//! Measures a whole training step of a decoder with random weights.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::kernel_times::KernelTimes;
use super::{Row, repeat, uniform};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::peft::PeftConfig;
use crate::kernels::elementwise::rope::{RopeConfig, RopeLayout, RopeScaling};
use crate::nn::{Architecture, Batch, Decoder, ModelConfig, Tokens, WeightSource, shifted_labels};
use crate::optim::{AdamW, Schedule};
use crate::quant::HostMatrix;
use crate::quant::{DenseData, DenseMatrix, QuantOptions, QuantizedMatrix};
use crate::seed::mix;
use crate::train::{StepReport, TrainOptions, Trainer};

/// The decoder of a step: Llama's architecture with a tied head, and adapters on all linear
/// layers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StepShape {
    /// Values of a hidden state.
    pub hidden: usize,
    /// Values inside the feed-forward part.
    pub ffn: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Rows of the embedding and the head.
    pub vocabulary: usize,
    /// Tokens of the single sequence.
    pub tokens: usize,
    /// Whether to save only layer inputs for the backward pass and recompute the rest.
    pub checkpoint_activations: bool,
}

/// A step to measure.
#[derive(Clone, Copy, Debug)]
pub struct StepCase {
    /// The decoder.
    pub shape: StepShape,
    /// Rank of every adapter.
    pub rank: usize,
    /// Quantization of the base.
    pub quant: QuantOptions,
    /// Whether to run one more step to time each kernel.
    pub profile: bool,
}

/// Weights derived from a hash of their names: the same on every device.
struct MadeUp {
    quant: QuantOptions,
    weight_bytes: usize,
}

impl WeightSource for MadeUp {
    fn vector(&mut self, _: &str, len: usize) -> Result<Vec<f32>> {
        Ok(vec![1.0; len])
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> Result<HostMatrix> {
        let seed = name.bytes().fold(0, |seed, byte| mix(seed, u64::from(byte)));
        let values = uniform(seed, rows * cols, 1.0 / (cols as f32).sqrt());
        if !linear {
            return Ok(DenseMatrix::new(rows, cols, DenseData::F32(values))?.into());
        }
        let matrix = QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, &self.quant)?;
        self.weight_bytes += matrix.bytes();
        Ok(matrix.into())
    }
}

impl StepCase {
    /// Configuration of the model.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the numbers of heads don't divide.
    fn config(&self) -> Result<ModelConfig> {
        let StepShape { hidden, ffn, layers, heads, kv_heads, vocabulary, tokens, .. } = self.shape;
        if !hidden.is_multiple_of(2 * heads) || !heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid(
                "bench",
                "the decoder's shape",
                format!("{hidden} values for {heads} heads and {kv_heads} key heads"),
                "heads must have one even size and be a multiple of the key heads",
            ));
        }
        let head_dim = hidden / heads;
        Ok(ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: vocabulary,
            hidden_size: hidden,
            intermediate_size: ffn,
            layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta: 10_000.0, head_dim, scaling: RopeScaling::None, layout: RopeLayout::HalfSplit },
            max_position_embeddings: tokens,
            tie_word_embeddings: true,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![None; layers],
            dtype: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
            quantized: false,
        })
    }

    /// Floating-point operations of a step: products with W and the head, forward and backward,
    /// and the adapters' two products three times. Attention and elementwise work are not counted.
    fn flops(&self) -> f64 {
        let StepShape { hidden, ffn, layers, heads, kv_heads, vocabulary, tokens, .. } = self.shape;
        let kv = kv_heads * (hidden / heads);
        let shapes = [
            (hidden, hidden),
            (kv, hidden),
            (kv, hidden),
            (hidden, hidden),
            (ffn, hidden),
            (ffn, hidden),
            (hidden, ffn),
        ];
        let base: usize = shapes.iter().map(|(n, k)| n * k).sum();
        let adapters: usize = shapes.iter().map(|(n, k)| self.rank * (n + k)).sum();
        tokens as f64
            * (layers as f64 * (4.0 * base as f64 + 6.0 * adapters as f64) + 4.0 * (vocabulary * hidden) as f64)
    }
}

struct Prepared {
    model: Decoder,
    trainer: Trainer,
    batch: Batch,
    weight_bytes: usize,
}

impl StepCase {
    fn on(&self, device: &Device) -> Result<Prepared> {
        let shape = self.shape;
        let mut source = MadeUp { quant: self.quant, weight_bytes: 0 };
        let mut model = Decoder::build(device, self.config()?, &mut source)?;
        if self.rank > 0 {
            model.attach("default", &PeftConfig::new(self.rank, 2.0 * self.rank as f32), 1)?;
        }
        let ids: Vec<u32> = (0..shape.tokens).map(|i| (mix(5, i as u64) % shape.vocabulary as u64) as u32).collect();
        let labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let tokens = Tokens::new(ids, 1)?;
        let labels = shifted_labels(&tokens, &labels, shape.vocabulary)?;
        let batch = model.batch(&tokens, Some(&labels))?;
        let optimizer = AdamW { lr: 1e-4, ..AdamW::default() };
        let trainer = Trainer::new(TrainOptions {
            optimizer,
            schedule: Schedule::constant(),
            max_norm: Some(1.0),
            checkpoint_activations: shape.checkpoint_activations,
            seed: 0,
        });
        Ok(Prepared { model, trainer, batch, weight_bytes: source.weight_bytes })
    }
}

impl Prepared {
    fn step(&mut self) -> Result<(StepReport, Duration)> {
        let start = Instant::now();
        let report = self.trainer.step(&mut self.model, std::slice::from_ref(&self.batch))?;
        Ok((report, start.elapsed()))
    }
}

/// Times a training step on a device: forward, backward, clipping, update, and reading loss and
/// norm back. The first step's loss and gradient norm are compared with the CPU device's.
pub fn measure_step(case: &StepCase, device: &Device) -> Result<Row> {
    let mut prepared = case.on(device)?;
    device.reset_peak();
    let (report, _) = prepared.step()?;
    let error = match device {
        Device::Cpu(_) => 0.0,
        Device::Gpu(_) => {
            let (wanted, _) = case.on(&Device::cpu())?.step()?;
            let relative = |got: f32, wanted: f32| f64::from(((got - wanted) / wanted).abs());
            relative(report.loss, wanted.loss).max(relative(report.grad_norm, wanted.grad_norm))
        }
    };
    let peak_bytes = device.memory().peak_bytes;
    let times = repeat(|| Ok(prepared.step()?.1))?;
    let profile = case.profile.then(|| KernelTimes::measure(device, || prepared.step().map(drop))).transpose()?;
    let row = Row::new("step", device, &case.quant, times, case.flops(), prepared.weight_bytes, error);
    Ok(Row {
        m: case.shape.tokens,
        n: case.shape.ffn,
        k: case.shape.hidden,
        rank: case.rank,
        tokens_per_second: Some(case.shape.tokens as f64 / (row.ms_median / 1e3)),
        peak_bytes: Some(peak_bytes),
        shape: Some(case.shape),
        profile,
        ..row
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: StepShape = StepShape {
        hidden: 64,
        ffn: 96,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        vocabulary: 50,
        tokens: 12,
        checkpoint_activations: true,
    };

    #[test]
    fn a_step_is_measured_and_right_on_every_device() {
        let case = StepCase { shape: SHAPE, rank: 4, quant: QuantOptions::nf4().double_quant(), profile: false };
        for device in crate::testing::devices() {
            let row = measure_step(&case, &device).unwrap();
            let allowed = if crate::testing::is_f16(&device) { 1e-2 } else { 1e-4 };
            assert!(row.max_rel_err_vs_cpu < allowed, "{row:?}");
            assert!(row.tokens_per_second.unwrap() > 0.0 && row.peak_bytes.unwrap() > 0, "{row:?}");
        }
    }

    #[test]
    fn a_profile_has_every_kernel_and_less_than_the_step() {
        let case = StepCase { shape: SHAPE, rank: 4, quant: QuantOptions::nf4(), profile: true };
        // Separate devices, because other tests' kernels would be seen too.
        for device in crate::testing::gpus_with(|_| ()).into_iter().chain([Device::cpu()]) {
            let profile = match (measure_step(&case, &device), &device) {
                (Ok(row), Device::Gpu(_)) => row.profile.unwrap(),
                // The CPU device, and backends without timestamps.
                (Err(error @ Error::Unsupported { .. }), _) => {
                    assert!(error.to_string().contains("time of each kernel"), "{error}");
                    continue;
                }
                (other, _) => panic!("{}: {other:?}", device.name()),
            };
            // Kernels that every tier runs.
            for kernel in ["rms_norm", "rope", "silu_mul", "cross_entropy", "adamw"] {
                let row = profile.kernels.iter().find(|row| row.kernel == kernel);
                assert!(row.is_some_and(|row| row.dispatches >= 1 && row.ms > 0.0), "{kernel}: {profile:?}");
            }
            let products = profile.kernels.iter().find(|row| row.kernel == "silu_mul").unwrap();
            // Forward, and again in the backward pass, in each of two layers.
            assert_eq!(products.dispatches, 4, "{profile:?}");
            assert!((0.0..1.0).contains(&profile.outside_kernels), "{profile:?}");
            let shares: f64 = profile.kernels.iter().map(|row| row.share).sum();
            assert!((shares + profile.outside_kernels - 1.0).abs() < 1e-9, "{profile:?}");
        }
    }

    #[test]
    fn heads_that_do_not_divide_are_an_error() {
        let shape = StepShape { heads: 3, ..SHAPE };
        let case = StepCase { shape, rank: 4, quant: QuantOptions::nf4(), profile: false };
        assert_eq!(
            measure_step(&case, &Device::cpu()).unwrap_err().to_string(),
            "bench: the decoder's shape is 64 values for 3 heads and 2 key heads; heads must have one even size and \
             be a multiple of the key heads"
        );
    }
}
